"""Stop a training run anywhere and go on bit for bit: one file with all that a step depends on.

The file is safetensors with JSON in its header: adapters, fully trained parameters, buffers, gradients that
are being accumulated, the optimizer's state, the budget's, those of a GradScaler or scheduler, and the random
generators'. It is written beside and renamed, so that a process that is killed leaves the file before or the
file after, never a part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from adapter_compiler.adapters.compact import compact_adapters
from adapter_compiler.errors import CheckpointError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.saving.adapters import (
    Kind,
    adopt_starts,
    assert_is_adapted,
    describe_sites,
    explained,
    find_kept,
    find_saved_tensors,
    find_targets,
    fit_tensors,
    match_starts,
    note_model,
    write_values,
)
from adapter_compiler.saving.primitives.files import written_beside
from adapter_compiler.saving.primitives.plain_data import (
    FileFormat,
    copy_state,
    decode,
    encode,
    is_same_state,
    read_file,
    read_sites,
)
from adapter_compiler.saving.primitives.snapshot import Snapshot
from adapter_compiler.training.budget import RankBudget
from adapter_compiler.training.random_state import read_random_state, write_random_state
from passes.adapt.compact_ranks import compact_plan
from passes.planning.plan import AdapterPlan

#: Name of the file in the folder given to :func:`save_training_state`.
TRAINING_FILE = "training_state.safetensors"

_FORMAT = FileFormat(kind="training state", version=1, writer="save_training_state")

_STATES = ("gradients", "optimizer", "budget", "others", "random")

#: What torch's optimizers call the tensors that they keep in the shape of a parameter.
_MOMENTS = {
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "momentum_buffer",
    "square_avg",
    "grad_avg",
    "acc_delta",
}


class Stateful(Protocol):
    """A GradScaler, a learning-rate scheduler, a data loader that can resume."""

    def state_dict(self) -> dict[str, Any]:
        """Its state."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take over a state."""


def save_training_state(
    directory: str | Path,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None = None,
    **others: Stateful,
) -> Path:
    """Write ``directory/training_state.safetensors``, replacing an earlier one only when complete.

    Args:
        directory: a folder; it is made if need be.
        adapted: the model in training.
        optimizer: its optimizer.
        budget: its rank budget, if it has one.
        others: whatever else has a state, by a name of your choice: ``scaler=scaler, scheduler=scheduler``.

    Returns:
        The file's path.

    Raises:
        CheckpointError: a state holds something that is neither plain data nor a tensor.
    """
    path = Path(directory) / TRAINING_FILE
    values = find_saved_tensors(adapted)
    tensors = {f"values.{name}": tensor.detach().contiguous().clone() for name, tensor in values.items()}
    state = {
        "gradients": {name: t.grad for name, t in values.items() if t.grad is not None},
        "optimizer": optimizer.state_dict(),
        "budget": None if budget is None else budget.state_dict(),
        "others": {name: other.state_dict() for name, other in others.items()},
        "random": read_random_state(),
    }
    header = {
        "torch": torch.__version__,
        "sites": describe_sites(adapted),
        "optimizer": _describe_optimizer(adapted, optimizer),
        "state": {name: encode(part, name, tensors) for name, part in state.items()},
    }
    with written_beside(path) as draft:
        save_file(tensors, draft, metadata=_FORMAT.make_metadata(header))
    return path


def load_training_state(
    directory: str | Path,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None = None,
    **others: Stateful,
) -> None:
    """Go on from what :func:`save_training_state` wrote.

    The model is compiled, the optimizer and the budget are made as at the start of the run; adapters that had
    been compacted when the state was saved are compacted here. What the file holds is checked before anything
    changes; if one of the objects refuses its state all the same, everything is put back as it was: parameters,
    buffers, gradients, ranks, the optimizer, the budget, the others and the random generators.

    An object of ``others`` is put back by its own ``load_state_dict``, where its attributes alone do not bring
    ``state_dict`` back; what it changes outside of both is not noticed.

    Args:
        directory: the folder that was given to ``save_training_state``.
        adapted: the model, compiled as in the run that was saved.
        optimizer: its optimizer, made in the same way.
        budget: its rank budget, if it had one.
        others: the other objects, by the same names.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to other sites, shapes, options or objects.
    """
    assert_is_adapted(adapted, "load_training_state")
    path = Path(directory) / TRAINING_FILE
    saved = _read_fitting(path, adapted, optimizer, budget, others)
    with _all_or_nothing(path, adapted, optimizer, budget, others):
        with explained(path, "the adapters"):
            _put_model(adapted, optimizer, budget, saved)
        with explained(path, f"the state of the optimizer ({type(optimizer).__name__})"):
            _put_optimizer(optimizer, saved.state["optimizer"])
        if budget is not None:
            with explained(path, "the state of the budget"):
                budget.load_state_dict(saved.state["budget"])
        for name, other in others.items():
            with explained(path, f"the state of {name!r} ({type(other).__name__})"):
                _put_other(other, saved.state["others"][name])
        with explained(path, "the states of the random generators"):
            write_random_state(saved.state["random"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Saved:
    """What is in a file that fits.

    Attributes:
        plan: the model's, with the forms of the file.
        kept: by site that had fewer triplets, as many indices as it had.
        values: of :func:`find_saved_tensors`.
        state: the nested states by name, :data:`_STATES`.
    """

    plan: AdapterPlan
    kept: Mapping[str, torch.Tensor]
    values: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]


def _read_fitting(
    path: Path,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None,
    others: Mapping[str, Stateful],
) -> _Saved:
    """Read the file and check it against the objects, of which none is changed."""
    header, tensors = read_file(path, _FORMAT)
    sites = read_sites(path, header)
    state = _read_state(path, header, tensors)
    plan = match_starts(adapted.plan, sites)
    kept = find_kept(path, sites, plan)
    targets = find_targets(adapted, compact_plan(plan, kept))
    values = {name.removeprefix("values."): t for name, t in tensors.items() if name.startswith("values.")}
    _assert_values_fit(path, values, state["gradients"], targets)
    mine = _describe_optimizer(adapted, optimizer)
    _assert_same_optimizer(path, header.get("optimizer"), state["optimizer"], mine)
    if type(optimizer).__module__.startswith("torch.optim"):  # others give these names to tensors of any shape
        _assert_moments_fit(path, state["optimizer"], mine, targets)
    _assert_objects_fit(path, state, budget, others)
    return _Saved(plan=plan, kept=kept, values=values, state=state)


def _read_state(path: Path, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The nested states of the file, each of the kind that it must be."""
    saved = header.get("state")
    if not isinstance(saved, dict) or saved.keys() != set(_STATES):
        found = sorted(saved) if isinstance(saved, dict) else saved
        raise CheckpointError(f"{path} holds the states {found!r}, expected {', '.join(_STATES)}; save the state again")
    state = {}
    for name in _STATES:
        with explained(path, f"what was saved as {name!r}"):
            state[name] = decode(saved[name], tensors)
        if not isinstance(state[name], dict) and (name, state[name]) != ("budget", None):
            raise CheckpointError(f"{path}: {name!r} is a {type(state[name]).__name__}, expected a dict; save it again")
    return state


def _assert_values_fit(
    path: Path, values: Mapping[str, torch.Tensor], gradients: Mapping[str, Any], targets: Mapping[str, Kind]
) -> None:
    for name, value in values.items():
        if name in targets and value.dtype != targets[name][1]:
            raise CheckpointError(
                f"{path}: {name} is {value.dtype}, this model has {targets[name][1]}, expected the same, as training "
                "goes on bit for bit; compile the model in that dtype"
            )
    fit_tensors(path, values, targets)
    for name, gradient in gradients.items():
        shape = tuple(gradient.shape) if isinstance(gradient, torch.Tensor) else type(gradient).__name__
        if name not in targets or shape != targets[name][0]:
            expected = f"shape {targets[name][0]}" if name in targets else "no such parameter"
            raise CheckpointError(f"{path}: the gradient of {name} has {shape}, expected {expected}; save it again")


def _describe_optimizer(adapted: AdaptedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer must agree in: its class, and the names of its parameters by group (``None`` if not ours)."""
    names = {id(tensor): name for name, tensor in find_saved_tensors(adapted).items()}
    parameters = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "parameters": parameters}


def _assert_same_optimizer(path: Path, described: Any, state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    with explained(path, "the state of the optimizer"):
        saved = [len(group["params"]) for group in state["param_groups"]]
        for index in itertools.chain(*(group["params"] for group in state["param_groups"])):
            dict(state["state"].get(index, {}))
    own = [len(group) for group in mine["parameters"]]
    if saved != own:
        raise CheckpointError(
            f"{path}: the optimizer had groups of {saved} parameters, this one has {own}; make it the same way"
        )
    if described is None:  # files of earlier versions do not say it
        return
    with explained(path, "the description of the optimizer"):
        found, expected = ([one["class"], *itertools.chain(*one["parameters"])] for one in (described, mine))
    for number, (before, now) in enumerate(itertools.zip_longest(found, expected)):
        if before != now:
            what = f"the optimizer's parameter {number - 1}" if number else "the optimizer's class"
            raise CheckpointError(
                f"{path}: {what} was {before}, expected {now}; make the same optimizer, with the parameters in the "
                "same order"
            )


def _assert_moments_fit(
    path: Path, state: Mapping[str, Any], mine: Mapping[str, Any], targets: Mapping[str, Kind]
) -> None:
    """Raise :class:`CheckpointError` if torch's optimizers have tensors for a parameter that are of another shape."""
    indices = itertools.chain(*(group["params"] for group in state["param_groups"]))
    for index, name in zip(indices, itertools.chain(*mine["parameters"]), strict=True):
        held = state["state"].get(index, {})
        for key in sorted(_MOMENTS & held.keys()) if name in targets else ():
            found, (expected, _) = getattr(held[key], "shape", None), targets[name]
            if found is not None and tuple(found) != expected:
                raise CheckpointError(
                    f"{path}: the optimizer's {key} of {name} has shape {tuple(found)}, expected that of the "
                    f"parameter, {expected}; save the state again"
                )


def _assert_objects_fit(
    path: Path, state: Mapping[str, Any], budget: RankBudget | None, others: Mapping[str, Stateful]
) -> None:
    if (state["budget"] is None) != (budget is None):
        found, expected = ("no", "one") if state["budget"] is None else ("a", "none")
        raise CheckpointError(f"{path} was saved with {found} budget, but {expected} was given")
    if budget is not None:
        with explained(path, "the state of the budget"):
            budget.assert_same_run(state["budget"])
    if odd := sorted(state["others"].keys() ^ others.keys()):
        raise CheckpointError(f"{path}: the state of {odd[0]!r} is on one side only; give the same objects as to save")
    with explained(path, "the states of the random generators"):
        # On generators of their own: these take what the global ones take.
        torch.Generator().set_state(state["random"]["torch"])
        random.Random().setstate(state["random"]["python"])


@contextlib.contextmanager
def _all_or_nothing(
    path: Path,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None,
    others: Mapping[str, Stateful],
) -> Iterator[None]:
    """Put everything back that loading a training state changes, if the block raises."""
    generators = read_random_state()
    before = Snapshot()
    for owner in (*_find_optimizers(optimizer, *others.values()), *_find_parts(budget)):
        before.add_attributes(owner)
    note_model(before, adapted)
    states: dict[str, Any] = {}
    for name, other in others.items():
        with explained(path, f"the present state of {name!r}"):
            states[name] = copy_state(other.state_dict())
        before.add_attributes(other, levels=1)
    try:
        yield
    except BaseException:
        with contextlib.ExitStack() as stack:  # what cannot be put back keeps nothing else from it
            stack.callback(write_random_state, generators)
            for name, other in others.items():
                stack.callback(_put_back_other, path, name, other, states[name])
            stack.callback(before.put_back)
        raise


def _find_optimizers(*objects: object) -> list[torch.optim.Optimizer]:
    """Those of the objects that are optimizers, and the optimizers that these wrap."""
    found = [one for one in objects if isinstance(one, torch.optim.Optimizer)]
    inner = [part for one in found for part in vars(one).values() if isinstance(part, torch.optim.Optimizer)]
    return [*found, *inner]


def _find_parts(budget: RankBudget | None) -> list[object]:
    """A budget and the objects that it consists of."""
    if budget is None:
        return []
    package = RankBudget.__module__.rpartition(".")[0]
    return [budget, *(part for part in vars(budget).values() if type(part).__module__.startswith(package))]


def _put_back_other(path: Path, name: str, other: Stateful, before: Any) -> None:
    """Let an object have the state that it had, unless its attributes have brought that back already.

    Raises:
        CheckpointError: it does not take its own state.
    """
    try:
        if not is_same_state(other.state_dict(), before):
            _put_other(other, before)
    except Exception as error:
        raise CheckpointError(
            f"{path}: the state could not be taken over, and {name!r} ({type(other).__name__}) does not take back the "
            f"state that it had ({type(error).__name__}: {error}); everything else is as it was; make {name!r} anew"
        ) from error


def _put_model(
    adapted: AdaptedModel, optimizer: torch.optim.Optimizer, budget: RankBudget | None, saved: _Saved
) -> None:
    adopt_starts(adapted, saved.plan)
    if saved.kept and budget is not None:
        budget.shrink(saved.kept)
    elif saved.kept:
        compact_adapters(adapted, saved.kept, optimizer)
    write_values(adapted, saved.values)
    gradients = saved.state["gradients"]
    for name, target in find_saved_tensors(adapted).items():
        if isinstance(target, torch.nn.Parameter):
            target.grad = gradients[name].to(target.device) if name in gradients else None


def _put_other(other: Stateful, state: Any) -> None:
    if isinstance(other, torch.optim.Optimizer):
        _put_optimizer(other, state)
    else:
        other.load_state_dict(state)


def _put_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state; torch casts it to the parameters' dtypes, which would round wider moments, so it is put back."""
    optimizer.load_state_dict(state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    for parameter, index in zip(parameters, indices, strict=True):
        for key, value in state["state"].get(index, {}).items():
            loaded = optimizer.state[parameter][key]
            if isinstance(value, torch.Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(loaded.device)
