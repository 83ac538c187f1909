"""Re-diagonalize P, λ, Q while they train, and point what is unused to where the gradient is now.

Training takes P and Q away from orthonormal, so that λ no longer are singular values. The same ΔW has another
factorization in which they are: with QR decompositions P = U_P R_P and Qᵀ = U_Q R_Q,

    R_P diag(λ) R_Qᵀ = X Σ Yᵀ  (r × r)   →   P = U_P X,  λ = Σ,  Q = (U_Q Y)ᵀ

Where ΔW has a smaller rank than there are triplets, the others carry nothing. They get P = 0 and λ = 1 beside a Q
that is orthonormal to the rest, as a fresh adapter has them: with λ = 0 they would look as if they were pruned.

Triplets that carry nothing are free to go anywhere without changing the model: where the gradient G of the weight has
left the subspace, ‖P PᵀG + G QᵀQ‖ < threshold · ‖G‖, they take the largest singular vectors of what is outside of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from adapter_compiler.errors import CheckpointError, ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.calibration.gradients import Loss, as_batches, find_weight_gradients

logger = logging.getLogger(__name__)

#: λ below this share of the largest one count as zero, in multiples of the dtype's rounding.
_NEGLIGIBLE = 8

_STATE_VERSION = 1


@torch.no_grad()
def rediagonalize(adapted: AdaptedModel, optimizer: torch.optim.Optimizer | None = None) -> list[str]:
    """Make P and Q of live triplets orthonormal and λ the singular values of ΔW / s, without changing ΔW.

    Triplets with λ = 0, such as a budget has pruned, stay as they are, in their places. λ come in falling order
    within the live places of each site; where ΔW has a smaller rank than there are live triplets, the last of them
    start again with P = 0, λ = 1 and a Q that is orthonormal to the others, so that they can learn. A site whose ΔW
    is 0, as at the default start, stays as it is. What the optimizer knows of the parameters that are changed
    (moments) is about other directions and is forgotten.

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
        found = _diagonalize(P[:, live], lam[live], Q[live])
        if found is not None:
            P[:, live], lam[live], Q[live] = found
            changed.append(site)
            _forget(optimizer, (P, lam, Q))
    return changed


def _forget(optimizer: torch.optim.Optimizer | None, parameters: Iterable[torch.Tensor]) -> None:
    for parameter in parameters if optimizer is not None else ():
        optimizer.state.pop(parameter, None)  # type: ignore[union-attr]


def _diagonalize(
    P: torch.Tensor, lam: torch.Tensor, Q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The singular value decomposition of P diag(λ) Q, at the cost of r² (d1 + d2); ``None`` if all values are zero.

    In place of negligible values there is 1, and a column of zeros in P.
    """
    wide = torch.promote_types(P.dtype, torch.float32 if P.device.type == "mps" else torch.float64)
    left, upper = torch.linalg.qr(P.to(wide))
    right, lower = torch.linalg.qr(Q.to(wide).mT)
    X, values, Y = torch.linalg.svd(upper * lam.to(wide) @ lower.mT)
    smallest = _NEGLIGIBLE * torch.finfo(P.dtype).eps * values[:1]
    # Half precision holds no values below 6e-8, whatever the largest one is.
    is_negligible = (values <= smallest) | (values.to(lam.dtype) == 0)
    if bool(is_negligible.all()):
        return None
    left, values = (left @ X).masked_fill(is_negligible, 0), values.masked_fill(is_negligible, 1)
    return left.to(P.dtype), values.to(lam.dtype), (Y @ right.mT).to(Q.dtype)


def measure_alignment(P: torch.Tensor, Q: torch.Tensor, gradient: torch.Tensor) -> float:
    """‖P PᵀG + G QᵀQ‖_F / ‖G‖_F for orthonormal P [out, r] and Q [r, in]: how much of G the adapter can follow.

    Directions on both sides count twice, so that it lies between 0 and 2.
    """
    norm = torch.linalg.matrix_norm(gradient)
    reached = P @ (P.mT @ gradient) + (gradient @ Q.mT) @ Q
    return float(torch.linalg.matrix_norm(reached) / norm) if norm > 0 else 2.0


class Realigner:
    """Re-diagonalizes every few steps of an optimizer, and re-aligns unused triplets where batches are given.

    To stop a run and go on, give it to both of ``save_training_state(..., realigner=realigner)`` and
    ``load_training_state``.

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
            raise ConfigError("no adapter has a λ to re-diagonalize; compile with AdapterConfig(kind='svd')")
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

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on bit for bit, together with the model's and the optimizer's states."""
        return {**self._options, "step": self.step, "alignment": dict(self.alignment)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`. Nothing changes if it does not fit.

        The batches are not part of it: give the same ones, in the same order.

        Raises:
            CheckpointError: it has another version or other options, or is no such state.
        """
        for key, mine in self._options.items():
            if state.get(key) != mine:
                raise CheckpointError(
                    f"the Realigner's state has {key}={state.get(key)!r}, this one has {key}={mine!r}; resume with the "
                    "same options, and give what Realigner.state_dict() gave"
                )
        step, alignment = state.get("step"), state.get("alignment")
        sites = set(self._adapted.adapters.prunable_sites)
        if type(step) is not int or step < 0 or not isinstance(alignment, Mapping) or not alignment.keys() <= sites:
            raise CheckpointError(
                f"the Realigner's state has step={step!r} and alignment={alignment!r}, expected a number of steps and "
                "numbers by site of this model; give what Realigner.state_dict() gave for the same model"
            )
        self.step, self.alignment = step, dict(alignment)

    @property
    def _options(self) -> dict[str, Any]:
        """What must be the same where a run goes on."""
        batches = None if self._batches is None else len(self._batches)
        return {"version": _STATE_VERSION, "every": self.every, "threshold": self.threshold, "batches": batches}

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        if self.step % self.every == 0:
            self.realign()

    def realign(self) -> list[str]:
        """Do it now. Returns the sites that were re-aligned to the gradient."""
        rediagonalize(self._adapted, self._optimizer)
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
            live = _find_carrying(P, lam, Q)
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            basis = P.detach()[:, live].to(wide.dtype), Q.detach()[live].to(wide.dtype)
            alignment[site] = measure_alignment(*basis, wide)
            if alignment[site] < self.threshold and not bool(live.all()):
                _turn((P, lam, Q), ~live, basis, wide)
                _forget(self._optimizer, (P, lam, Q))
                turned.append(site)
        self.alignment = alignment
        logger.info("re-aligned %d of %d sites at step %d", len(turned), len(alignment), self.step)
        return turned


def _find_carrying(P: torch.Tensor, lam: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """Which triplets have a part in ΔW, [r]."""
    found: torch.Tensor = (lam.detach() != 0) & (P.detach() != 0).any(0) & (Q.detach() != 0).any(1)
    return found


@torch.no_grad()
def _turn(
    factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    free: torch.Tensor,
    basis: tuple[torch.Tensor, torch.Tensor],
    gradient: torch.Tensor,
) -> None:
    """Let free triplets take the largest singular vectors of the gradient outside of the others, the basis.

    ΔW stays: where λ is 0, P and Q are these vectors, and λ has the singular value for its gradient; where it is not,
    P is 0, and its gradient has the direction and the size that the vectors stand for.
    """
    (P, lam, Q), (left, right) = factors, basis
    outside = gradient - left @ (left.mT @ gradient)
    outside = outside - (outside @ right.mT) @ right
    count = int(free.sum())
    U, _, V = torch.linalg.svd(outside, full_matrices=False)
    places = free.nonzero()[:, 0]
    P[:, places] = U[:, :count].masked_fill(lam[places] != 0, 0).to(P.dtype)
    Q[places] = V[:count].to(Q.dtype)
