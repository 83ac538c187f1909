"""Re-diagonalise P, λ, Q while they train, and point what is unused to where the gradient is now.

Training takes P and Q away from orthonormal, so that λ no longer are singular values. The same ΔW has another
factorisation in which they are: with QR decompositions P = U_P R_P and Qᵀ = U_Q R_Q,

    R_P diag(λ) R_Qᵀ = X Σ Yᵀ  (r × r)   →   P = U_P X,  λ = Σ,  Q = (U_Q Y)ᵀ

Triplets that have become zero then are free to go anywhere without changing the model: where the gradient G of
the weight has left the subspace, ‖P PᵀG + G QᵀQ‖ < threshold · ‖G‖, they take the largest singular vectors of what
is outside of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from adapter_compiler.adapted import AdaptedModel
from adapter_compiler.errors import ConfigError
from adapter_compiler.gradients import Loss, as_batches, find_weight_gradients

logger = logging.getLogger(__name__)

#: λ below this share of the largest one count as zero, in multiples of the dtype's rounding.
_NEGLIGIBLE = 8


@torch.no_grad()
def rediagonalise(adapted: AdaptedModel, optimizer: torch.optim.Optimizer | None = None) -> list[str]:
    """Make P and Q of live triplets orthonormal and λ the singular values of ΔW / s, without changing ΔW.

    Triplets with λ = 0, such as a budget has pruned, stay as they are, in their places. λ come in falling order
    within the live places of each site. What the optimizer knows of the parameters (moments) is about other
    directions and is forgotten.

    Args:
        adapted: the model; adapters without λ are left alone.
        optimizer: whose state for the parameters is reset.

    Returns:
        The sites that were changed.
    """
    changed = []
    parameters = adapted.adapters.keyed_parameters
    for site in adapted.adapters.prunable_sites:
        P, lam, Q = (parameters[site, name] for name in ("P", "lam", "Q"))
        live = (lam != 0).nonzero()[:, 0]
        if not len(live):
            continue
        left, values, right = _diagonalise(P[:, live], lam[live], Q[live])
        P[:, live], lam[live], Q[live] = left.to(P.dtype), values.to(lam.dtype), right.to(Q.dtype)
        changed.append(site)
        for parameter in (P, lam, Q) if optimizer is not None else ():
            optimizer.state.pop(parameter, None)  # type: ignore[union-attr]
    return changed


def _diagonalise(
    P: torch.Tensor, lam: torch.Tensor, Q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular value decomposition of P diag(λ) Q, at the cost of r² (d1 + d2); negligible values are zero."""
    wide = torch.promote_types(P.dtype, torch.float32 if P.device.type == "mps" else torch.float64)
    left, upper = torch.linalg.qr(P.to(wide))
    right, lower = torch.linalg.qr(Q.to(wide).mT)
    X, values, Y = torch.linalg.svd(upper * lam.to(wide) @ lower.mT)
    smallest = _NEGLIGIBLE * torch.finfo(P.dtype).eps * values[:1]
    return left @ X, values.where(values > smallest, 0), Y @ right.mT


def measure_alignment(P: torch.Tensor, Q: torch.Tensor, gradient: torch.Tensor) -> float:
    """‖P PᵀG + G QᵀQ‖_F / ‖G‖_F for orthonormal P [out, r] and Q [r, in]: how much of G the adapter can follow.

    Directions on both sides count twice, so that it lies between 0 and 2.
    """
    norm = torch.linalg.matrix_norm(gradient)
    reached = P @ (P.mT @ gradient) + (gradient @ Q.mT) @ Q
    return float(torch.linalg.matrix_norm(reached) / norm) if norm > 0 else 2.0


class Realigner:
    """Re-diagonalises every few steps of an optimizer, and re-aligns unused triplets where batches are given.

    Attributes:
        every: optimizer steps from one time to the next.
        alignment: what was measured at each site the last time.
        step: number of optimizer steps seen.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        optimizer: torch.optim.Optimizer,
        *,
        realign_every: int,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
        threshold: float = 0.5,
    ) -> None:
        """Hook to ``optimizer``, beside a :class:`~adapter_compiler.RankBudget` if there is one.

        Args:
            adapted: the model.
            optimizer: the one that trains it.
            realign_every: steps.
            batches: for the gradients of the weights; without them nothing is re-aligned.
            loss: ``loss(model, batch)``.
            threshold: re-align sites whose alignment is below, see :func:`measure_alignment`.

        Raises:
            ConfigError: a value cannot work, or no adapter has a λ.
        """
        if type(realign_every) is not int or realign_every < 1:
            raise ConfigError(f"Realigner(realign_every={realign_every!r}): expected an integer of at least 1")
        if (batches is None) != (loss is None):
            raise ConfigError("Realigner got one of batches and loss, expected both or none; give the other too")
        if not adapted.adapters.prunable_sites:
            raise ConfigError("no adapter has a λ to re-diagonalise; compile with AdapterConfig(kind='svd')")
        self.every = realign_every
        self.threshold = threshold
        self.alignment: Mapping[str, float] = {}
        self.step = 0
        self._adapted = adapted
        self._optimizer = optimizer
        self._batches = None if batches is None else as_batches(batches)
        self._loss = loss
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def detach(self) -> None:
        """Take the hook off the optimizer."""
        self._handle.remove()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        if self.step % self.every == 0:
            self.realign()

    def realign(self) -> list[str]:
        """Do it now. Returns the sites that were re-aligned to the gradient."""
        rediagonalise(self._adapted, self._optimizer)
        if self._batches is None or self._loss is None:
            return []
        turned, alignment = [], {}
        found = find_weight_gradients(self._adapted, self._batches, self._loss, with_adapters=True)
        parameters = self._adapted.adapters.keyed_parameters
        prunable = set(self._adapted.adapters.prunable_sites)
        for adapter, gradient in found:
            site = adapter.site.name
            if site not in prunable or not adapter.rank:
                continue
            P, lam, Q = (parameters[site, name] for name in ("P", "lam", "Q"))
            live = lam.detach() != 0
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            basis = P.detach()[:, live].to(wide.dtype), Q.detach()[live].to(wide.dtype)
            alignment[site] = measure_alignment(*basis, wide)
            if alignment[site] < self.threshold and not bool(live.all()):
                _turn((P, Q), ~live, basis, wide)
                turned.append(site)
        self.alignment = alignment
        logger.info("re-aligned %d of %d sites at step %d", len(turned), len(alignment), self.step)
        return turned


@torch.no_grad()
def _turn(
    factors: tuple[torch.Tensor, torch.Tensor],
    free: torch.Tensor,
    basis: tuple[torch.Tensor, torch.Tensor],
    gradient: torch.Tensor,
) -> None:
    """Let free triplets (λ = 0) take the largest singular vectors of the gradient outside of the others, the basis."""
    (P, Q), (left, right) = factors, basis
    outside = gradient - left @ (left.mT @ gradient)
    outside = outside - (outside @ right.mT) @ right
    count = int(free.sum())
    U, _, V = torch.linalg.svd(outside, full_matrices=False)
    places = free.nonzero()[:, 0]
    P[:, places], Q[places] = U[:, :count].to(P.dtype), V[:count].to(Q.dtype)
