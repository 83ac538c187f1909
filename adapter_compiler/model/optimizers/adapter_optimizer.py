"""Optimizers that take an adapter's factors as matrices.

For each factor X = P or Q (B or A in LoRA) with gradient g:

    m ← μ m + (1 − μ) g
    n = (1 − μ) g + μ m
    X ← X − lr √max(d, r) u      AdapterMuon:        u = n (nᵀn)^(-1/2), or (n nᵀ)^(-1/2) n for wide matrices
    x_i ← x_i − lr √d u_i        AdapterNormalized:  u_i = n_i / ‖n_i‖ for the vector x_i of each triplet

where d is the length of a triplet's vector in X. An element then moves by about lr, as with Adam. λ, magnitudes and
fully trained parameters are updated by AdamW. Weight decay is decoupled: X ← (1 − lr · weight_decay) X.

A triplet whose gradient is exactly zero, as after a rank budget has pruned it for good, does not move and has no
influence on the direction of the others. So a masked run and a compacted run are the same within rounding.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.adapters.parameters.sharded import gather_full, is_sharded, replicate_like
from adapter_compiler.model.optimizers.batches import Batch, find_batches, stack
from adapter_compiler.model.optimizers.directions import normalize_vectors, orthogonalize
from adapter_compiler.model.optimizers.groups import LEFT, OTHER, assert_group_valid, find_groups, find_names
from passes.compat import foreach_lerp_, foreach_mul, foreach_sub_


class AdapterOptimizer(torch.optim.Optimizer, abc.ABC):
    """The base class: groups by role, momentum, AdamW for other parameters, and states that keep their dtypes."""

    #: The names of the parameters, for messages; copies and pickles do not have them.
    _names: Mapping[torch.Tensor, str] = {}

    def __init__(
        self,
        params: AdapterState | Iterable[Any],
        lr: float,
        *,
        other_lr: float | None = None,
        momentum: float = 0.8,
        betas: tuple[float, float] = (0.8, 0.9),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Take the trainable parameters.

        Args:
            params: the adapted model, or groups with ``params`` and a ``role``: ``"left"`` for P and B, ``"right"`` for
                Q and A, ``"other"`` for parameters that AdamW updates. A group may have options of its own.
            lr: learning rate of the factors.
            other_lr: learning rate of the other parameters, by default ``lr``.
            momentum: μ.
            betas: of AdamW.
            eps: of AdamW.
            weight_decay: weight decay; for an adapted model, λ, magnitudes and fully trained vectors have none.

        Raises:
            ConfigError: an option or a group cannot work, or the model has nothing to train.
        """
        groups = find_groups(params) if isinstance(params, AdapterState) else list(params)
        self._names = find_names(params) if isinstance(params, AdapterState) else {}
        options = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if other_lr is not None:
            groups = [{"lr": other_lr, **g} if isinstance(g, dict) and g.get("role") == OTHER else g for g in groups]
        super().__init__(groups, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with a ``role``.

        Raises:
            ConfigError: an option or a parameter cannot work.
        """
        params = param_group["params"]
        group = {**param_group, "params": [params] if isinstance(params, torch.Tensor) else list(params)}
        assert_group_valid(type(self).__name__, self.defaults | group)
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss and the gradients.

        Returns:
            The closure's loss.

        Raises:
            ConfigError: a gradient is sparse or complex.
            NonFiniteGradientError: a gradient has inf or nan. Nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for batch in find_batches(self.param_groups, self.state, self._names):
            updates, length = _find_adamw(batch) if batch.group["role"] == OTHER else self._find_factors(batch)
            _subtract(batch, updates, length)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; torch casts moments to the parameters' dtypes, here they keep their own."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(parameters, indices, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                loaded = self.state[parameter][key]
                if isinstance(value, torch.Tensor) and value.dtype != loaded.dtype:
                    self.state[parameter][key] = value.to(loaded.device, copy=True)

    def _find_factors(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """Update the momentum; the directions of the factors, [n, a, b], and their length at a learning rate of 1."""
        momentum, dim = batch.group["momentum"], -2 if batch.group["role"] == LEFT else -1
        moments = batch.moments("momentum_buffer")
        foreach_lerp_(moments, batch.gradients, 1 - momentum)
        gradients = gather_full(batch.stacked_gradients)
        n = torch.lerp(gradients, gather_full(stack(moments)), momentum)
        moves = gradients.abs().sum(dim, keepdim=True) > 0
        if bool(moves.all()):
            return self._find_directions(n, dim)
        directions, length = self._find_directions(n.where(moves, 0), dim)
        return directions.where(moves, 0), length  # zeros, not rounding errors

    @abc.abstractmethod
    def _find_directions(self, n: torch.Tensor, dim: int) -> tuple[torch.Tensor, float]:
        """The direction of each matrix, and the length of a step along it at a learning rate of 1.

        Args:
            n: [n, a, b], in at least float32.
            dim: the dimension along which the triplets' vectors are.
        """


class AdapterMuon(AdapterOptimizer):
    """Steps with equal singular values: the polar factor of the momentum of P and Q, AdamW for the others."""

    def _find_directions(self, n: torch.Tensor, dim: int) -> tuple[torch.Tensor, float]:
        return orthogonalize(n), math.sqrt(max(n.shape[-2:]))


class AdapterNormalized(AdapterOptimizer):
    """Steps of equal length for every triplet: normalized momentum of P's columns and Q's rows, AdamW for the others.

    Cheaper than :class:`AdapterMuon`; on the digits about a point behind it.
    """

    def _find_directions(self, n: torch.Tensor, dim: int) -> tuple[torch.Tensor, float]:
        return normalize_vectors(n, dim), math.sqrt(n.shape[dim])


def _find_adamw(batch: Batch) -> tuple[torch.Tensor, float]:
    """Update AdamW's moments; its directions, [n, …], and their length at a learning rate of 1."""
    (beta1, beta2), eps = batch.group["betas"], batch.group["eps"]
    first, second = batch.moments("exp_avg"), batch.moments("exp_avg_sq")
    steps = float(batch.states[0].get("step", 0)) + 1  # the same for the whole batch
    for state in batch.states:
        state["step"] = torch.tensor(steps, dtype=torch.float32, device="cpu")
    foreach_lerp_(first, batch.gradients, 1 - beta1)
    foreach_lerp_(second, foreach_mul(batch.gradients, batch.gradients), 1 - beta2)
    root = stack(second).sqrt() / math.sqrt(1 - beta2**steps)
    return stack(first) / (root + eps), 1 / (1 - beta1**steps)


def _subtract(batch: Batch, updates: torch.Tensor, length: float) -> None:
    """X ← (1 − lr · weight_decay) X − lr · length · update."""
    rate, decay = float(batch.group["lr"]), float(batch.group["weight_decay"])
    if decay:
        for parameter in batch.parameters:
            parameter.mul_(1 - rate * decay)
    if is_sharded(batch.parameters[0]):
        (parameter,), update = batch.parameters, updates[0]
        parameter.sub_(update if is_sharded(update) else replicate_like(update, parameter), alpha=rate * length)
    else:
        foreach_sub_(batch.parameters, updates.unbind(), alpha=rate * length)
