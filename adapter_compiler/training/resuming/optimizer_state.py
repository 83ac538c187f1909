"""The state of an optimizer in a file, and the checks before it is loaded."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.model.optimizers import AdapterOptimizer
from adapter_compiler.saving.adapters import find_saved_tensors
from adapter_compiler.saving.fit_tensors import Kind
from passes.planning.json_schema import Field, Source, check_object, is_list_of, is_or_null, is_text, show

#: Shapes and dtypes of tensors, by name.
Kinds = Mapping[str, Kind]

#: The advice of errors.
ADVICE = "make the same optimizer, with the parameters in the same order"

#: The description of the optimizer in a file, in addition to its state.
_DESCRIPTION: Mapping[str, Field] = {
    "class": Field(expected="the name of a class", fits=is_text),
    "package": Field(expected="the name of a package", fits=is_text, required=False),
    "parameters": Field(expected="lists of names", fits=is_list_of(is_list_of(is_or_null(is_text)))),
}

#: The required keys of a state; an optimizer may add more.
_STATE: Mapping[str, Field] = {
    "param_groups": Field(
        expected="a list of groups with the numbers of their parameters",
        fits=is_list_of(
            lambda group: isinstance(group, dict) and is_list_of(lambda index: type(index) is int)(group.get("params"))
        ),
    ),
    "state": Field(expected="an object of states", fits=lambda value: isinstance(value, dict)),
}

#: The names of tensors that torch's optimizers keep in the shape of a parameter.
_MOMENTS = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg"),
    *("acc_delta", "sum", "prev", "step_size", "ax", "variance"),
}

#: The names of their means of squares over the rows and the columns of a parameter.
_FACTORS = {"row_var", "col_var"}


def describe_optimizer(adapted: AdaptedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The class of an optimizer, and the names of its parameters by group (``None`` for parameters of other models)."""
    names = {id(tensor): name for name, tensor in find_saved_tensors(adapted).items()}
    parameters = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    package = type(optimizer).__module__.partition(".")[0]
    return {"class": type(optimizer).__name__, "package": package, "parameters": parameters}


def assert_optimizer_fits(
    source: Source, described: Any, state: Any, adapted: AdaptedModel, optimizer: torch.optim.Optimizer, kinds: Kinds
) -> None:
    """Raise the source's error unless a saved state fits an optimizer.

    Args:
        source: the origin of the state, for messages.
        described: the result of :func:`describe_optimizer` when it was saved; ``None`` if the file does not have it.
        state: the state.
        adapted: the model.
        optimizer: the optimizer that will load the state.
        kinds: the shapes and dtypes that the model's tensors will have, by name.
    """
    mine = describe_optimizer(adapted, optimizer)
    # Adapters of rank 0 do not train, so optimizers do not have their parameters.
    empty = {name for name, (shape, _) in kinds.items() if 0 in shape}
    mine["parameters"] = [[name for name in group if name not in empty] for group in mine["parameters"]]
    check_object(source, "", state, _STATE, allow_unknown=True)
    groups, own = state["param_groups"], optimizer.state_dict()["param_groups"]
    numbers = itertools.count()
    own = [{**g, "params": [next(numbers) for _ in n]} for g, n in zip(own, mine["parameters"], strict=True)]
    found, expected = [len(group["params"]) for group in groups], [len(group) for group in mine["parameters"]]
    if found != expected:
        source.fail(f"it has groups of {found} parameters, this one has {expected}, expected as many")
    if described is not None:
        _assert_same_description(source, check_object(source, "its description", described, _DESCRIPTION), mine)
    for number, (group, current) in enumerate(zip(groups, own, strict=True)):
        _assert_options_fit(source, f"group {number}", group, current)
    names = [name for group in mine["parameters"] for name in group]
    held = find_saved_tensors(adapted)
    skipped = {id(held[name]) for name in empty & held.keys()}
    parameters = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in skipped]
    _assert_states_fit(source, state, _find_places(state, names, parameters, kinds), optimizer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """A parameter of an optimizer: its name in messages, and the shape and dtype that it will have."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def _find_places(
    state: Mapping[str, Any], names: Sequence[str | None], parameters: Sequence[torch.Tensor], kinds: Kinds
) -> dict[int, _Place]:
    """The parameters by their numbers in a state."""
    indices = [index for group in state["param_groups"] for index in group["params"]]
    places = {}
    for index, name, parameter in zip(indices, names, parameters, strict=True):
        # Adapters will get the ranks of the file.
        shape, dtype = kinds.get(name or "", (tuple(parameter.shape), parameter.dtype))
        places[index] = _Place(name=name or f"parameter {index}", shape=shape, dtype=dtype)
    return places


def _assert_same_description(source: Source, found: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    package = found.get("package", mine["package"])
    # A class that was defined in __main__ may be in a package later.
    if package != mine["package"] and "__main__" not in (package, mine["package"]):
        source.fail(f"its package was {package}, expected {mine['package']}")
    before, now = ([one["class"], *itertools.chain(*one["parameters"])] for one in (found, mine))
    for number, (one, other) in enumerate(itertools.zip_longest(before, now)):
        if one != other:
            what = f"its parameter {number - 1}" if number else "its class"
            source.fail(f"{what} was {_name(one)}, expected {_name(other)}")


def _name(value: str | None) -> str:
    """A name for messages, shortened if it is long."""
    return "nothing" if value is None else show(value)[1:-1]


def _assert_options_fit(source: Source, where: str, group: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise unless the options of a group have the types of this optimizer's options, and its parameters the order."""
    if group["params"] != own["params"]:
        source.fail(f"{where}: params is {show(group['params'])}, expected {show(own['params'])}")
    for key, mine in own.items():
        if key in group and _is_number(mine) and not _is_finite_number(group[key]):
            source.fail(f"{where}: {key} is {show(group[key])}, expected a finite number")
        if key in group and isinstance(mine, bool) and not isinstance(group[key], (bool, type(None))):
            source.fail(f"{where}: {key} is {show(group[key])}, expected true or false")
    if "lr" in own and "lr" not in group:
        source.fail(f"{where}: the key 'lr' is missing, expected the learning rate there")


def _assert_states_fit(
    source: Source, state: Mapping[str, Any], places: Mapping[int, _Place], optimizer: torch.optim.Optimizer
) -> None:
    """Raise unless the state of each parameter fits the parameter."""
    # Other libraries use these names for tensors of any shape.
    is_known = type(optimizer).__module__.startswith("torch.optim") or isinstance(optimizer, AdapterOptimizer)
    for index, held in state["state"].items():
        if is_known and (index not in places or not isinstance(held, dict)):
            source.fail(f"it has {show(held)} for parameter {show(index)}, expected states of {len(places)} parameters")
        if index not in places or not isinstance(held, dict):
            continue
        for key, value in held.items():
            if key == "step" and not (_is_finite_number(value) and float(value) >= 0):
                source.fail(f"the step of {places[index].name} is {show(value)}, expected a number of steps, 0 or more")
            if is_known and key in _MOMENTS | _FACTORS and value is not None:
                _assert_moment_fits(source, places[index], key, value)


def _assert_moment_fits(source: Source, place: _Place, key: str, value: Any) -> None:
    shape = place.shape
    if key in _FACTORS:
        axis = len(shape) - (1 if key == "row_var" else 2)
        shape = tuple(1 if number == axis else size for number, size in enumerate(shape))
    found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
    if found != shape:
        source.fail(f"{key} of {place.name} has shape {found}, expected {shape} for this parameter")
    if value.dtype.is_floating_point != place.dtype.is_floating_point:
        source.fail(f"{key} of {place.name} is {value.dtype}, expected floating-point numbers, as the parameter has")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite_number(value: Any) -> bool:
    """Whether a value is a finite number, or a tensor of one."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex() and math.isfinite(value.item())
    return _is_number(value) and abs(value) < math.inf


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state and keep its dtypes; torch casts tensors to the parameters' dtypes, which would round wider ones."""
    optimizer.load_state_dict(state)
    for parameter, held in _pair(optimizer, state):
        for key, value in held.items():
            loaded = optimizer.state[parameter][key]
            if isinstance(value, torch.Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(loaded.device)


def _pair(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Each parameter with its entry in a state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    for parameter, index in zip(parameters, indices, strict=True):
        yield parameter, state["state"].get(index, {})
