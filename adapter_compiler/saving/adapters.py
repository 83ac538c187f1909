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
from adapter_compiler.adapters.named_adapters import find_module_tensors, find_moved_buffers
from adapter_compiler.adapters.parameters.sharded import is_sharded
from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.fit_tensors import Kind, fit_tensors
from adapter_compiler.saving.layer_kinds import find_layer_kind, find_trained_names
from adapter_compiler.saving.primitives.adapter_file import (
    ADAPTERS,
    FILE_NAME,
    describe_file,
    describe_plan,
    read_sites,
)
from adapter_compiler.saving.primitives.file_format import read_file
from adapter_compiler.saving.primitives.files import written_beside
from adapter_compiler.saving.primitives.snapshot import Snapshot
from adapter_compiler.saving.quantized_formats import describe_formats, find_formats
from passes.forms import find_form
from passes.planning.compact_plan import compact_plan
from passes.planning.json_schema import show
from passes.planning.plan import AdapterPlan


def save_adapters(
    adapted: AdapterState,
    directory: str | Path,
    *,
    name: str | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write ``directory/adapters.safetensors``, replacing an earlier one only when complete.

    Args:
        adapted: the model.
        directory: a folder; it is made if need be.
        name: which adapter of it; by default the active one.
        tensors: what :func:`find_saved_tensors` gives, gathered, if it is sharded.

    Returns:
        The file's path.

    Raises:
        CheckpointError: a tensor is sharded, on the meta device, or of a dtype that files cannot hold.
        OSError: the folder cannot be made or written.
    """
    path = Path(directory) / FILE_NAME
    found = find_saved_tensors(adapted, name) if tensors is None else tensors
    if sharded := [key for key, tensor in found.items() if is_sharded(tensor)]:
        raise CheckpointError(
            f"{path}: {sharded[0].removeprefix('module.')} is trained fully and is a DTensor, expected a tensor that "
            "is whole; call save of what shard(adapted) returned, on every rank"
        )
    tensors = {key: tensor.detach().contiguous().clone() for key, tensor in found.items()}
    with written_beside(path) as draft:
        save_file(tensors, draft, metadata=ADAPTERS.make_metadata(_describe(adapted, name, tensors), tensors))
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
    _assert_is_not_peft(path)
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


def _assert_is_not_peft(path: Path) -> None:
    if not path.exists() and (path.parent / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path.parent} holds adapters of PEFT, expected a folder that AdaptedModel.save wrote; add them with "
            "adapted.load_adapter(name, folder) and choose them with use(name), or convert the folder with "
            "adapter-compiler adapters convert"
        )


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
        if isinstance(error, CheckpointError):  # which says what to do
            raise CheckpointError(
                f"{path}: {what} could not be taken over: {error}. Everything is as it was before"
            ) from error
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: {what} could not be taken over ({type(error).__name__}: {reason}), expected what fits the "
            "objects that are given; everything is as it was before; make them as in the run that was saved"
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


def find_targets(adapted: AdapterState, plan: AdapterPlan, name: str | None = None) -> dict[str, Kind]:
    """What :func:`find_saved_tensors` will have with the forms and ranks of ``plan``."""
    now = {key: (tuple(t.shape), t.dtype) for key, t in find_saved_tensors(adapted, name).items()}
    others = {key: kind for key, kind in now.items() if not key.startswith("adapters.")}
    own: dict[str, Kind] = {}
    for adapter in plan:
        for parameter, shape in adapter.parameter_shapes.items():
            key = f"adapters.{adapter.site.name}.{parameter}"
            own[key] = shape, now[key][1] if key in now else adapter.dtype
    return own | others


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


def _describe(adapted: AdapterState, name: str | None, tensors: Collection[str]) -> dict[str, Any]:
    plan = adapted.plan if name is None else adapted.adapter_set.plans[name]
    layers = {weight: find_layer_kind(adapted.module, weight) for weight in plan.by_weight}
    quantized = describe_formats(find_formats(adapted.module))
    saved = {key.removeprefix("module.") for key in tensors if key.startswith("module.")}
    modules, moved = {weight.rpartition(".")[0] for weight in layers}, find_moved_buffers(adapted, name)
    trained = find_trained_names(adapted.module, modules, saved, moved)
    options = adapted.options.to_dict()
    return describe_file(plan, layers=layers, quantized=quantized, trained=trained.describe(), options=options)


def describe_sites(adapted: AdapterState, name: str | None = None) -> dict[str, dict[str, Any]]:
    """What a file of an adapter (the active one) must agree with, by site."""
    return describe_plan(adapted.plan if name is None else adapted.adapter_set.plans[name])


def assert_same_sites(
    path: Path, saved: Mapping[str, Any], mine: Mapping[str, Any], *, apart_from: Collection[str] = ()
) -> None:
    """Raise :class:`CheckpointError` unless two descriptions from :func:`describe_sites` agree, some keys apart."""
    if odd := sorted(saved.keys() ^ mine.keys()):
        side = "the file" if odd[0] in saved else "this model"
        raise CheckpointError(
            f"{path}: {len(odd)} sites differ, for example {show(odd[0])[1:-1]} is in {side} only, expected the same "
            "sites; compile the model that was trained, with the same sites="
        )
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
