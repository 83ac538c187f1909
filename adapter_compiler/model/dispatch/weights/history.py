"""The autograd history of W + ΔW: functions whose backward can run several times.

A weight may be kept and used in several calls, each with a backward of its own. So these functions hold their operands
themselves; what ``save_for_backward`` holds is freed by the first backward. Writes into the operands between the last
use of the values and backward are refused, as autograd does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from passes.adapt.apply_adapters import BoundAdapter, adapted_sum
from passes.compat import is_transformed, version_of
from passes.fuse.differentiate import differentiate


class _Written:
    """Counts the writes into adapted weights, because assigning to ``.data`` changes no version.

    Attributes:
        count: the number of writes so far.
    """

    count = 0


written = _Written()

#: The adapters of one weight with their parameters.
BoundAdapters = tuple[BoundAdapter, ...]


def keep_operands(ctx: Any, base: torch.Tensor, adapters: BoundAdapters, versions: Sequence[Any]) -> None:
    """Let a function's context hold what :func:`differentiate_sum` needs.

    Args:
        ctx: the context.
        base: W.
        adapters: its adapters.
        versions: the versions of W and the parameters at the last use of the values.
    """
    ctx.operands = (base, *find_parameters(adapters))
    ctx.versions = versions
    ctx.adapters = [(adapter.planned, tuple(adapter.parameters)) for adapter in adapters]


def differentiate_sum(ctx: Any, gradient: torch.Tensor, needed: Sequence[bool]) -> list[torch.Tensor | None]:
    """The gradients of W and of the adapters' parameters, from that of W + ΔW.

    Raises:
        RuntimeError: W or a parameter has changed since the values were used.
    """
    first = 0 if any(planned.form.rescales for planned, _ in ctx.adapters) else 1  # a sum's gradients do not need W
    if ctx.versions and list(map(find_version, ctx.operands))[first:] != list(ctx.versions)[first:-1]:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a weight "
            "or the parameters of its adapter changed between forward and backward"
        )

    def run(base: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
        rest = iter(parameters)
        bound = [BoundAdapter(planned, {n: next(rest) for n in names}) for planned, names in ctx.adapters]
        return [adapted_sum(base, bound)]

    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return differentiate(run, ctx.operands, needed, (gradient,))


def compute_sum(base: torch.Tensor, adapters: BoundAdapters, versions: list[Any]) -> torch.Tensor:
    """W + ΔW as a plain tensor with such a history; ``versions`` becomes those of W and the parameters."""
    versions[:] = [*map(find_version, (base, *find_parameters(adapters))), written.count]
    if not torch.is_grad_enabled() or is_transformed():
        with outside_inference_mode(base):
            return adapted_sum(base, adapters)
    total: torch.Tensor = _Sum.apply(adapters, versions, base, *find_parameters(adapters))  # type: ignore[no-untyped-call]
    return total


def outside_inference_mode(base: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which new tensors are ordinary ones, as W is: they may be kept and used where gradients are."""
    is_inside = torch.is_inference_mode_enabled() and not base.is_inference()
    return _ordinary_without_grad() if is_inside else contextlib.nullcontext()


@contextlib.contextmanager
def _ordinary_without_grad() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, adapters: BoundAdapters, versions: list[Any], base: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        keep_operands(ctx, base, adapters, versions)
        return adapted_sum(base, adapters)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return None, None, *differentiate_sum(ctx, gradient, ctx.needs_input_grad[2:])


def find_parameters(adapters: BoundAdapters) -> list[torch.Tensor]:
    """The parameters of all adapters."""
    return [parameter for adapter in adapters for parameter in adapter.parameters.values()]


def find_version(tensor: torch.Tensor) -> Any:
    """A value that differs after each write in place; for an inference tensor, which has no version, at each call."""
    return object() if tensor.is_inference() else version_of(tensor)
