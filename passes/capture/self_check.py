"""Run a module and its captured graph on the same example under the same random state, and compare.

Outputs, buffers and gradients must agree. Gradients are compared because a graph can be right in forward and wrong in
backward: export loses the backward of a custom ``autograd.Function``, and that of a reentrant checkpoint, whose forward
runs without gradients.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from passes.base import CaptureError
from passes.capture.calls import ModuleCall, flatten_result
from passes.capture.module_state import StateChanges, canonical_kernels, find_state_changes, restored_state
from passes.compat import pytree
from passes.quantize.packed_weights import PackedWeight

#: Largest accepted difference between a captured graph and eager: (relative, absolute) by dtype.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-10),
    torch.complex128: (1e-9, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.complex64: (1e-4, 1e-5),
    torch.float16: (1e-2, 1e-3),
    torch.bfloat16: (2e-2, 1e-2),
}
#: Accepted difference of gradients, as a fraction of the largest value: they sum many values, in mixed dtypes.
_GRADIENT_TOLERANCE = 0.02
#: Gradients are compared for parameters with up to this many elements, and for the smallest parameter.
_LARGEST_PROBE = 2**14

Observation = Mapping[str, Any]


def observe_eager(module: nn.Module, call: ModuleCall) -> Observation:
    """Outputs, buffers and gradients of a call in eager mode, by name.

    The call may change attributes if that has no effect on later calls, see :func:`_changes_have_no_effect`; a graph
    does not change them.

    Raises:
        CaptureError: the call changes state that a graph cannot change.
    """
    args, kwargs = call.rebuild(call.tensors)
    changes = StateChanges()

    leaves, spec = pytree.tree_flatten((args, kwargs))

    def run() -> list[Any]:
        with find_state_changes(module, changes):
            return flatten_result(module.forward(*args, **kwargs))[0]

    seen = observe_run(module, call, run)
    after, spec_after = pytree.tree_flatten((args, kwargs))
    if changes.attributes and not changes.others and _changes_have_no_effect(module, call):
        changes.attributes.clear()
    if spec_after != spec or any(a is not b for a, b in zip(leaves, after, strict=True)):
        changes.others.append("replaces values in its arguments")
    if changes.first is not None:
        raise CaptureError(f"{type(module).__name__} {changes.first}, which a graph would not repeat")
    return seen


def _changes_have_no_effect(module: nn.Module, call: ModuleCall) -> bool:
    """Whether the attributes that a call changes are only a record or a cache.

    A second call must change nothing more, and a call with other values must return the same before and after.
    """
    other = dataclasses.replace(call, tensors=tuple(map(change_values, call.tensors)))
    again = StateChanges()
    with canonical_kernels(), restored_state(module), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with restored_state(module):
                before = _run_seeded(module, other)
            _run_seeded(module, call)
            with find_state_changes(module, again):
                _run_seeded(module, call)
            after = _run_seeded(module, other)
        except Exception:  # the module's own code may refuse such values with any exception
            return False
    return again.first is None and len(before) == len(after) and all(map(is_identical, before, after))


def _run_seeded(module: nn.Module, call: ModuleCall) -> list[Any]:
    """The leaves of the result under a fixed random seed; the caller restores the random states."""
    torch.manual_seed(0)
    random.seed(0)
    args, kwargs = copy.deepcopy(call.rebuild(call.tensors))
    return [_detached(leaf) for leaf in flatten_result(module.forward(*args, **kwargs))[0]]


def change_values(tensor: torch.Tensor) -> torch.Tensor:
    """Other values that the module very likely accepts: half of each float, or the smallest integer everywhere."""
    tensor = tensor.detach()
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor * 0.5
    if tensor.dtype == torch.bool or not tensor.numel():
        return tensor.clone()
    return tensor.new_full(tensor.shape, int(tensor.min()))


def is_identical(one: Any, other: Any) -> bool:
    """Whether two values are equal, tensors exactly and with the same shape and dtype; nan equals nan."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def observe_run(module: nn.Module, call: ModuleCall, run: Callable[[], list[Any]]) -> Observation:
    """Outputs of ``run``, the buffers after it, and gradients, by name; the module's state is restored.

    Args:
        module: the owner of the buffers and parameters.
        call: the arguments that ``run`` uses.
        run: computes the leaves of the result.
    """
    with canonical_kernels(), restored_state(module), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _probed(_find_probes(module), call) as probes:
            leaves = run()
            seen: dict[str, Any] = {f"output {i}": _detached(leaf) for i, leaf in enumerate(leaves)}
            seen |= {f"buffer {name}": buffer.detach().clone() for name, buffer in module.named_buffers()}
            seen |= _read_gradients(leaves, probes)
    return seen


def assert_same(owner: str, found: Observation, expected: Observation) -> float:
    """Compare two runs and return the largest difference of outputs and buffers.

    Args:
        owner: the module's name, for the message.
        found: the run of the graph, from :func:`observe_run`.
        expected: the run in eager mode.

    Raises:
        CaptureError: an output, a buffer or a gradient differs by more than the tolerance of its dtype.
    """
    largest = 0.0
    for name, want in expected.items():
        if not name.startswith("gradient"):
            largest = max(largest, _measure(owner, name, found[name], want))
        elif found.get(name) is not want:
            _assert_same_gradient(owner, name, found.get(name), want)
    return largest


def _find_probes(module: nn.Module) -> dict[str, nn.Parameter]:
    plain = [(n, p) for n, p in module.named_parameters() if not isinstance(p, PackedWeight)]
    floats = [(n, p) for n, p in plain if p.is_floating_point() and p.is_leaf and not p.is_meta]
    small = {name: p for name, p in floats if p.numel() <= _LARGEST_PROBE}
    smallest = min(floats, key=lambda pair: pair[1].numel(), default=None)
    return small if smallest is None else {smallest[0]: smallest[1], **small}


@contextlib.contextmanager
def _probed(probes: dict[str, nn.Parameter], call: ModuleCall) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, the probes require gradients; afterwards ``requires_grad`` and ``grad`` of every leaf are restored."""
    leaves = [t for t in (*probes.values(), *call.tensors) if t.is_leaf]
    before = [(leaf, leaf.requires_grad, leaf.grad) for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    for parameter in probes.values():
        parameter.requires_grad_(True)
    try:
        yield probes
    finally:
        for leaf, flag, gradient in before:
            leaf.grad = gradient
            leaf.requires_grad_(flag)


def _read_gradients(leaves: list[Any], probes: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Gradients of a weighted sum of all outputs; empty if backward fails, as where a module supports none."""
    terms = [_mix(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not terms:
        return {f"gradient {name}": None for name in probes}
    dtype = torch.float32 if any(term.device.type == "mps" for term in terms) else torch.float64
    total = torch.stack([term.to(terms[0].device, dtype) for term in terms]).sum()
    try:
        total.backward()  # not torch.autograd.grad, which reentrant checkpoints do not support
    except Exception:  # a backward of the module's own may raise any exception
        return {}
    return {f"gradient {name}": None if p.grad is None else p.grad.to_dense() for name, p in probes.items()}


def _mix(leaf: torch.Tensor) -> torch.Tensor:
    values = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    weights = torch.arange(values.numel(), device=values.device, dtype=torch.float32).add(1).cos()
    return (values.float() * weights.view(values.shape)).nan_to_num(posinf=0.0, neginf=0.0).mean()


def _detached(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _assert_same_gradient(owner: str, name: str, found: torch.Tensor | None, want: torch.Tensor | None) -> None:
    zero = torch.zeros(())
    mine, theirs = (zero if g is None else g.float().nan_to_num() for g in (found, want))
    largest, difference = float(theirs.abs().max()), float((mine - theirs).abs().max())
    if difference > 1e-5 + _GRADIENT_TOLERANCE * largest:
        raise CaptureError(
            f"{owner}: {name} through the captured graph differs from eager by {difference:.3g} of {largest:.3g}; "
            "a custom autograd.Function or a reentrant checkpoint does not capture"
        )


def _measure(owner: str, name: str, found: Any, want: Any) -> float:
    if not isinstance(want, torch.Tensor):
        if found != want:
            raise CaptureError(f"{owner}: {name} of the captured graph is {found!r}, eager gives {want!r}")
        return 0.0
    if want.is_meta:
        return 0.0
    rtol, atol = TOLERANCES.get(want.dtype, (0.0, 0.0))
    same_kind = found.shape == want.shape and found.dtype == want.dtype
    if same_kind and torch.allclose(found, want, rtol=rtol, atol=atol, equal_nan=True):
        return _largest_difference(found, want)
    detail = f"by up to {_largest_difference(found, want):.3g}" if same_kind else ""
    raise CaptureError(
        f"{owner}: {name} of the captured graph ({found.dtype}, {tuple(found.shape)}) differs from eager "
        f"({want.dtype}, {tuple(want.shape)}) {detail} beyond rtol {rtol:g}, atol {atol:g} under the same random state"
    )


def _largest_difference(found: torch.Tensor, want: torch.Tensor) -> float:
    """Largest absolute difference; where both are nan or the same infinity there is none."""
    wide = torch.complex128 if want.is_complex() else torch.float64
    difference = (found.to("cpu", wide) - want.to("cpu", wide)).abs()
    both = ((found == want) | ((found != found) & (want != want))).cpu()
    return float(difference.masked_fill(both, 0.0).max()) if want.numel() else 0.0
