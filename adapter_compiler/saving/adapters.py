"""Save and load trained adapters: one safetensors file, described by JSON in its header.

The file holds the adapters, the fully trained parameters and the model's persistent buffers (running
statistics move while adapters train). It is written beside and renamed, so it is whole or absent.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.adapters.compact import compact_adapters
from adapter_compiler.adapters.named_adapters import find_module_tensors
from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.primitives.adapter_file import ADAPTERS, FILE_NAME, describe_plan
from adapter_compiler.saving.primitives.files import written_beside
from adapter_compiler.saving.primitives.plain_data import read_file, read_sites
from adapter_compiler.saving.primitives.snapshot import Snapshot
from passes.adapt.compact_ranks import compact_plan
from passes.forms import find_form
from passes.planning.plan import AdapterPlan

#: Shape and dtype of a tensor.
Kind = tuple[tuple[int, ...], torch.dtype]


def save_adapters(adapted: AdapterState, directory: str | Path, *, name: str | None = None) -> Path:
    """Write ``directory/adapters.safetensors``, replacing an earlier one only when complete.

    Args:
        adapted: the model.
        directory: a folder; it is made if need be.
        name: which adapter of it; by default the active one.

    Returns:
        The file's path.

    Raises:
        CheckpointError: a tensor is on the meta device.
        OSError: the folder cannot be made or written.
    """
    path = Path(directory) / FILE_NAME
    tensors = {key: tensor.detach().contiguous().clone() for key, tensor in find_saved_tensors(adapted, name).items()}
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(
                f"{key} is on the meta device, which holds no values; expected a tensor with values; load them first"
            )
    with written_beside(path) as draft:
        save_file(tensors, draft, metadata=ADAPTERS.make_metadata(_describe(adapted, name)))
    return path


def load_adapters(adapted: AdapterState, directory: str | Path) -> None:
    """Read what :meth:`AdaptedModel.save` wrote into the active adapter. Nothing changes if it does not fit.

    To add it as a further adapter, with whatever ranks and sites it has, see :meth:`AdaptedModel.load_adapter`.

    Sites that had fewer triplets when they were saved, because a budget compacted them, get as few here; make
    optimizers and budgets afterwards.

    A tensor of another dtype is cast if this model's dtype holds each of its values exactly, as float32 does those of
    bfloat16. A cast that rounds, or turns what is out of range into inf, is refused: the adapter would not be the one
    that was trained, and nothing would tell.

    Args:
        adapted: the same model, compiled with the same kind, rank, alpha and sites as the one that was trained. It
            need not be initialized in the same way: where the file's adapters start from is in the file.
        directory: the folder that was given to ``save``.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to other sites, shapes, scales or dtypes.
    """
    assert_is_adapted(adapted, "load_adapters")
    path = Path(directory) / FILE_NAME
    header, tensors = read_file(path, ADAPTERS)
    sites = read_sites(path, header)
    plan = match_starts(adapted.plan, sites)
    kept = find_kept(path, sites, plan)
    values = fit_tensors(path, tensors, find_targets(adapted, compact_plan(plan, kept)))
    before = Snapshot()
    note_model(before, adapted)
    with before.put_back_if_it_fails(), explained(path, "the adapters"):
        adopt_starts(adapted, plan)
        if kept:
            compact_adapters(adapted, kept)
        write_values(adapted, values)


def assert_is_adapted(adapted: object, function: str) -> None:
    """Raise :class:`CheckpointError` unless ``function`` was given an adapted model."""
    if not isinstance(adapted, AdapterState):
        raise CheckpointError(
            f"{function}(adapted=...) is a {type(adapted).__name__}, expected an AdaptedModel; give what "
            "compile_with_adapters returned"
        )


@contextlib.contextmanager
def explained(path: Path, what: str) -> Iterator[None]:
    """Let whatever goes wrong inside name the file and what of it could not be taken over."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CheckpointError) and str(error).startswith(str(path)):
            raise
        kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: {what} could not be taken over ({kind}{reason}), expected what fits the objects that are given; "
            "everything is as it was before; make them as in the run that was saved"
        ) from error


def find_kept(path: Path, saved: Mapping[str, Any], plan: AdapterPlan) -> dict[str, torch.Tensor]:
    """The sites that had fewer triplets when saved, and as many indices as they had.

    Raises:
        CheckpointError: other sites, shapes or scales, or a site that had more triplets.
    """
    mine = describe_plan(plan)
    assert_same_sites(path, saved, mine, apart_from=("rank",))
    kept = {}
    for name, expected in mine.items():
        found = saved[name].get("rank")
        if not isinstance(found, int) or not 0 <= found <= expected["rank"]:
            raise CheckpointError(
                f"{path}: site {name} was saved with rank={found}, this model has rank={expected['rank']}; compile "
                "with the rank and alpha that the run started with"
            )
        if found < expected["rank"]:
            kept[name] = torch.arange(found)
    return kept


def match_starts(plan: AdapterPlan, saved: Mapping[str, Any]) -> AdapterPlan:
    """The plan with forms that keep starting values where those of a file do, as far as the kinds are the same."""
    adapters = []
    for adapter in plan:
        name = saved.get(adapter.site.name, {}).get("form", adapter.form.name)
        try:
            form = find_form(name)
        except (KeyError, ValueError):  # unknown, which the comparison of the sites then says
            form = adapter.form
        same_kind = form.core.name == adapter.form.core.name
        adapters.append(dataclasses.replace(adapter, form=form) if same_kind else adapter)
    return AdapterPlan(adapters=tuple(adapters))


def adopt_starts(adapted: AdapterState, plan: AdapterPlan) -> None:
    """Give a model the forms of a plan that keep starting values or not; parameters that train keep their identity."""
    if plan != adapted.plan:
        adapted.adapters.adopt(plan)
        adapted.rebuild(plan)


def find_targets(adapted: AdapterState, plan: AdapterPlan) -> dict[str, Kind]:
    """What :func:`find_saved_tensors` will have with the forms and ranks of ``plan``."""
    now = {name: (tuple(t.shape), t.dtype) for name, t in find_saved_tensors(adapted).items()}
    others = {name: kind for name, kind in now.items() if not name.startswith("adapters.")}
    own: dict[str, Kind] = {}
    for adapter in plan:
        for key, shape in adapter.parameter_shapes.items():
            name = f"adapters.{adapter.site.name}.{key}"
            own[name] = shape, now[name][1] if name in now else adapter.dtype
    return own | others


def fit_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], targets: Mapping[str, Kind]
) -> dict[str, torch.Tensor]:
    """The tensors of a file in the dtypes of the places that they are for.

    Raises:
        CheckpointError: there are others, or a shape is another, or a dtype that cannot hold the values.
    """
    if odd := sorted(targets.keys() ^ tensors.keys()):
        raise CheckpointError(f"{path}: tensor {odd[0]} is on one side only; compile with the same trainable=")
    for name, (shape, _) in targets.items():
        if shape != tuple(tensors[name].shape):
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, this model expects {shape}")
    return {name: cast_exactly(path, name, tensors[name], dtype) for name, (_, dtype) in targets.items()}


def cast_exactly(path: Path, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a file in another dtype, in which each value is the same.

    Raises:
        CheckpointError: a value would be rounded or become inf.
    """
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    # float64 holds the values of all other floats, those of 8 bits as well, which cannot be compared by themselves.
    back, values = (t.double() if t.is_floating_point() else t for t in (cast.to(tensor.dtype), tensor))
    changed = ((back != values) & ~(back.isnan() & values.isnan())).reshape(-1)
    if bool(changed.any()):
        example = tensor.reshape(-1)[changed][0].item()
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype}, this model has {dtype}, which does not hold {int(changed.sum())} of "
            f"its {tensor.numel()} values ({example!r} would become {cast.reshape(-1)[changed][0].item()!r}), expected "
            f"a dtype that does; compile a model of {tensor.dtype}, or with AdapterConfig(dtype={tensor.dtype})"
        )
    return cast


def find_saved_tensors(adapted: AdapterState, name: str | None = None) -> dict[str, torch.Tensor]:
    """What training changes: parameters of an adapter (the active one), fully trained ones, persistent buffers."""
    name = adapted.active_adapter if name is None else name
    adapter_parameters, inactive = adapted.parameters_of_adapter(name), adapted.adapter_set.find_inactive(name)
    tensors = find_module_tensors(adapted) if inactive is None else inactive
    return {
        **{f"adapters.{key}": p for key, p in adapter_parameters.named_parameters()},
        **{f"module.{key}": tensor for key, tensor in tensors.items()},
    }


@torch.no_grad()
def write_values(adapted: AdapterState, values: Mapping[str, torch.Tensor]) -> None:
    """Give the tensors of :func:`find_saved_tensors` these values."""
    for name, target in find_saved_tensors(adapted).items():
        target.copy_(values[name])


def _describe(adapted: AdapterState, name: str | None) -> dict[str, Any]:
    plan = adapted.plan if name is None else adapted.adapter_set.plans[name]
    aliases = {alias: adapter.site.weight for adapter in plan for alias in adapter.site.aliases}
    return {"sites": describe_sites(adapted, name), "aliases": aliases}


def describe_sites(adapted: AdapterState, name: str | None = None) -> dict[str, dict[str, Any]]:
    """What a file of an adapter (the active one) must agree with, by site."""
    return describe_plan(adapted.plan if name is None else adapted.adapter_set.plans[name])


def assert_same_sites(
    path: Path, saved: Mapping[str, Any], mine: Mapping[str, Any], *, apart_from: Collection[str] = ()
) -> None:
    """Raise :class:`CheckpointError` unless two descriptions from :func:`describe_sites` agree, some keys apart."""
    if odd := sorted(saved.keys() ^ mine.keys()):
        side = "the file" if odd[0] in saved else "this model"
        raise CheckpointError(f"{path}: {len(odd)} sites differ, for example {odd[0]} is in {side} only")
    for name, expected in mine.items():
        for key, value in expected.items():
            found = saved[name].get(key)
            if found != value and key not in apart_from:
                raise CheckpointError(
                    f"{path}: site {name} was saved with {key}={found}, this model has "
                    f"{key}={value}; compile the same model with the same rank and alpha"
                )


def note_model(snapshot: Snapshot, adapted: AdapterState) -> None:
    """Note what loading changes in a model: which adapters stand where, and the values of all that trains."""
    for module in adapted.modules():
        snapshot.add_attributes(module, levels=2)
    for tensor in find_saved_tensors(adapted).values():
        snapshot.add_tensor(tensor)
