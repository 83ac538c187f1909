"""Carry an optimizer's moments along when a triplet's factors are re-diagonalized.

The new factors are P' = P A and Q' = B Q, with A = R_P⁻¹ X and B = Yᵀ R_Q⁻ᵀ in the notation of
:mod:`adapter_compiler.training.calibration.realign`. A gradient is transformed by the inverse transpose of that,

    g_P' = g_P R_Pᵀ X,    g_Q' = Yᵀ R_Q g_Q,    g_λ' = diag(P'ᵀ g_P') / λ'

which needs no inverse. First moments are sums of gradients, and are transformed as they are. Second moments are sums of
squares: each is the sum over the old elements with squared coefficients, as if gradients of elements were uncorrelated.
A triplet that starts again gets a first moment of zero and the mean second moment of the others, so that its first
steps are not longer than theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

#: What is summed up from gradients, from their squares, and what belongs to no direction, in the states of optimizers.
_FIRST, _SECOND, _OTHER = {"exp_avg", "momentum_buffer"}, {"exp_avg_sq", "max_exp_avg_sq"}, {"step"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorChange:
    """How the live triplets of a site have changed.

    Attributes:
        live: their indices.
        left: R_Pᵀ X, [r, r]; a column of zeros for a triplet that starts again.
        right: Yᵀ R_Q, [r, r]; a row of zeros for such a triplet.
        P: the new P, [out, r].
        values: the new λ, [r].
        starts: which triplets start again, [r] of bool.
    """

    live: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    P: torch.Tensor
    values: torch.Tensor
    starts: torch.Tensor


def carry_moments(
    optimizer: torch.optim.Optimizer, P: torch.Tensor, lam: torch.Tensor, Q: torch.Tensor, change: FactorChange
) -> None:
    """Transform the states of P, λ and Q in place; states of an unknown kind are deleted, so that they start again."""
    states = {name: optimizer.state.get(p) for name, p in (("P", P), ("lam", lam), ("Q", Q))}
    if not all(_is_known(state, p) for state, p in zip(states.values(), (P, lam, Q), strict=True)):
        forget(optimizer, P, lam, Q)
        return
    for key in _FIRST | _SECOND:
        power = 2 if key in _SECOND else 1
        left, right = change.left**power, change.right**power
        new_P = _transform(states["P"], key, lambda old, t=left: old.index_select(1, change.live).to(t.dtype) @ t)
        new_Q = _transform(states["Q"], key, lambda old, t=right: t @ old.index_select(0, change.live).to(t.dtype))
        _store(states["P"], key, 1, new_P, change)
        _store(states["Q"], key, 0, new_Q, change)
        new_lam = None if new_P is None else (change.P**power * new_P).sum(0) / change.values**power
        _store(states["lam"], key, 0, new_lam, change)


def restart_moments(
    optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, torch.Tensor], starts: torch.Tensor
) -> None:
    """Let triplets start again: a first moment of zero, and the mean second moment of the others.

    Args:
        optimizer: the optimizer, if there is one.
        parameters: P, lam and Q.
        starts: which triplets start again, [r] of bool. If all do, the states are deleted.
    """
    if optimizer is None:
        return
    states = {name: optimizer.state.get(p) for name, p in parameters.items()}
    if bool(starts.all()) or not all(_is_known(states[name], p) for name, p in parameters.items()):
        forget(optimizer, *parameters.values())
        return
    for name, state in states.items():
        for key in (_FIRST | _SECOND) & (state or {}).keys():
            _fill(state[key], 1 if name == "P" else 0, starts, key)  # type: ignore[index]


def forget(optimizer: torch.optim.Optimizer | None, *parameters: torch.Tensor) -> None:
    """Delete the states of parameters."""
    for parameter in parameters if optimizer is not None else ():
        optimizer.state.pop(parameter, None)  # type: ignore[union-attr]


def _is_known(state: Mapping[str, Any] | None, parameter: torch.Tensor) -> bool:
    """Whether a state has moments of the parameter's shape and nothing else, or is empty."""
    for key, value in (state or {}).items():
        if key in _FIRST | _SECOND:
            if value is not None and (not isinstance(value, torch.Tensor) or value.shape != parameter.shape):
                return False
        elif key not in _OTHER:
            return False
    return True


def _transform(state: Mapping[str, Any] | None, key: str, transform: Any) -> torch.Tensor | None:
    old = (state or {}).get(key)
    return None if old is None else transform(old)


def _store(state: Mapping[str, Any] | None, key: str, dim: int, new: torch.Tensor | None, change: FactorChange) -> None:
    """Write the moments of the live triplets; without new ones, as for λ beside a P without them, the mean."""
    moment = (state or {}).get(key)
    if moment is None:
        return
    if new is None:
        new = moment.index_select(dim, change.live)
        new = new.mean(dim, keepdim=True).expand_as(new) if key in _SECOND else torch.zeros_like(new)
    moment.index_copy_(dim, change.live, new.to(moment.dtype))
    starts = torch.zeros(moment.shape[dim], dtype=torch.bool, device=moment.device)
    starts[change.live] = change.starts.to(moment.device)
    _fill(moment, dim, starts, key)


def _fill(moment: torch.Tensor, dim: int, starts: torch.Tensor, key: str) -> None:
    if bool(starts.any()):
        others = moment.index_select(dim, (~starts).nonzero()[:, 0])
        value = others.mean(dim, keepdim=True) if key in _SECOND and others.numel() else moment.new_zeros(())
        shape = [1] * moment.dim()
        shape[dim] = -1
        moment.copy_(torch.where(starts.view(shape), value, moment))
