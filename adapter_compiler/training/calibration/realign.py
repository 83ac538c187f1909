"""Re-diagonalize P, λ, Q during training, and re-align unused triplets with the present gradient.

Training makes P and Q less orthonormal, and then λ are not singular values any more. The same ΔW has another
factorization in which they are. With QR decompositions P = U_P R_P and Qᵀ = U_Q R_Q,

    R_P diag(λ) R_Qᵀ = X Σ Yᵀ  (r × r)   →   P = U_P X,  λ = Σ,  Q = (U_Q Y)ᵀ

If the rank of ΔW is smaller than the number of triplets, the others are unused. They get P = 0, λ = 1 and a Q that is
orthonormal to the other rows, as in a new adapter. With λ = 0 they would count as pruned.

Unused triplets can take any direction without changing the model. If the gradient G of the weight has left the
subspace, ‖P PᵀG + G QᵀQ‖ < threshold · ‖G‖, they take the largest singular vectors of the part of G outside of it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from adapter_compiler.errors import CheckpointError, ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.calibration.carried_moments import (
    FactorChange,
    carry_moments,
    restart_moments,
)
from adapter_compiler.training.calibration.gradients import Loss, as_batches, assert_matrices, find_weight_gradients
from passes.planning.json_schema import is_finite

logger = logging.getLogger(__name__)

#: λ below this multiple of the dtype's epsilon times the largest λ count as zero.
_NEGLIGIBLE = 8

_STATE_VERSION = 1


@torch.no_grad()
def rediagonalize(adapted: AdaptedModel, optimizer: torch.optim.Optimizer | None = None) -> list[str]:
    """Make P and Q of live triplets orthonormal and λ the singular values of ΔW / s, without changing ΔW.

    Triplets with λ = 0, such as those that a budget has pruned, do not change. The live λ of each site are in
    descending order afterwards. If the rank of ΔW is smaller than the number of live triplets, the last of them start
    again with P = 0, λ = 1 and a Q that is orthonormal to the others, so that they can learn. A site with ΔW = 0, as at
    the default start, does not change.

    Args:
        adapted: the model; adapters without λ do not change.
        optimizer: its moments of changed parameters are carried along to the new directions
            (:mod:`adapter_compiler.training.calibration.carried_moments`); states of an optimizer that keeps anything
            else are deleted.

    Returns:
        The sites that were changed.
    """
    assert_matrices(adapted, "rediagonalize")
    changed = []
    parameters = adapted.adapters.keyed_parameters
    for site in adapted.adapters.prunable_sites:
        P, lam, Q = (parameters[site, name] for name in ("P", "lam", "Q"))
        live = (lam != 0).nonzero()[:, 0]
        if not len(live):
            continue
        found = _diagonalize(P[:, live], lam[live], Q[live])
        if found is not None:
            P[:, live], lam[live], Q[live] = (factor.to(P.dtype) for factor in (found.P, found.values, found.Q))
            changed.append(site)
            if optimizer is not None:
                carry_moments(optimizer, P, lam, Q, dataclasses.replace(found.change, live=live))
    return changed


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Diagonal:
    """The new factors, in float64, and what carries moments along."""

    P: torch.Tensor
    values: torch.Tensor
    Q: torch.Tensor
    change: FactorChange


def _diagonalize(P: torch.Tensor, lam: torch.Tensor, Q: torch.Tensor) -> _Diagonal | None:
    """The singular value decomposition of P diag(λ) Q, at a cost of O(r² (d1 + d2)); ``None`` if all values are zero.

    A negligible value is replaced by 1, and its column of P by zeros.
    """
    wide = torch.promote_types(P.dtype, torch.float32 if P.device.type == "mps" else torch.float64)
    left, upper = torch.linalg.qr(P.to(wide))
    right, lower = torch.linalg.qr(Q.to(wide).mT)
    X, values, Y = torch.linalg.svd(upper * lam.to(wide) @ lower.mT)
    smallest = _NEGLIGIBLE * torch.finfo(P.dtype).eps * values[:1]
    # float16 rounds values below 6e-8 to zero, whatever the largest value is.
    is_negligible = (values <= smallest) | (values.to(lam.dtype) == 0)
    if bool(is_negligible.all()):
        return None
    left, values = (left @ X).masked_fill(is_negligible, 0), values.masked_fill(is_negligible, 1)
    change = FactorChange(
        live=torch.arange(len(lam), device=lam.device),
        left=(upper.mT @ X).masked_fill(is_negligible, 0),
        right=(Y @ lower).masked_fill(is_negligible.unsqueeze(1), 0),
        P=left,
        values=values,
        starts=is_negligible,
    )
    return _Diagonal(P=left, values=values, Q=Y @ right.mT, change=change)


def measure_alignment(P: torch.Tensor, Q: torch.Tensor, gradient: torch.Tensor) -> float:
    """The share of the gradient G that the adapter can follow, ‖P PᵀG + G QᵀQ‖_F / ‖G‖_F.

    Directions that both P and Q contain count twice, so the result is between 0 and 2.

    Args:
        P: [out, r], orthonormal columns.
        Q: [r, in], orthonormal rows.
        gradient: G, [out, in].
    """
    norm = torch.linalg.matrix_norm(gradient)
    reached = P @ (P.mT @ gradient) + (gradient @ Q.mT) @ Q
    return float(torch.linalg.matrix_norm(reached) / norm) if norm > 0 else 2.0


class Realigner:
    """Re-diagonalizes every few optimizer steps, and re-aligns unused triplets if batches are given.

    To stop and resume a run, pass it to both ``save_training_state(..., realigner=realigner)`` and
    ``load_training_state``.

    Attributes:
        every: the number of optimizer steps from one re-diagonalization to the next.
        alignment: the last result of :func:`measure_alignment` for each site.
        history: the step and the alignments of every re-alignment, the oldest first, before unused triplets were
            moved; ``RankBudget.report(..., realigner=realigner)`` shows it.
        step: the number of optimizer steps so far.
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
        """Register a hook on the optimizer; a :class:`~adapter_compiler.RankBudget` may be on it too.

        Args:
            adapted: the model.
            optimizer: the optimizer that trains it.
            realign_every: the number of optimizer steps from one re-diagonalization to the next.
            batches: batches for the gradients of the weights; without them, nothing is re-aligned.
            loss: ``loss(model, batch)`` returns the loss of a batch.
            threshold: sites whose alignment is below this are re-aligned, see :func:`measure_alignment`.

        Raises:
            ConfigError: a value cannot work, or no adapter has a λ.
        """
        if type(realign_every) is not int or realign_every < 1:
            raise ConfigError(f"Realigner(realign_every={realign_every!r}): expected an integer of at least 1")
        if (batches is None) != (loss is None):
            raise ConfigError("Realigner got one of batches and loss, expected both or none; give the other too")
        assert_matrices(adapted, "Realigner")
        if not adapted.adapters.prunable_sites:
            raise ConfigError("no adapter has a λ to re-diagonalize; compile with AdapterConfig(kind='svd')")
        self.every = realign_every
        self.threshold = threshold
        self.alignment: Mapping[str, float] = {}
        self.history: list[tuple[int, Mapping[str, float]]] = []
        self.step = 0
        self._adapted = adapted
        self._optimizer = optimizer
        self._batches = None if batches is None else as_batches(batches)
        self._loss = loss
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def detach(self) -> None:
        """Remove the hook from the optimizer."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """The state that, with those of the model and the optimizer, continues a run bit for bit."""
        history = [[step, dict(alignment)] for step, alignment in self.history]
        return {**self._options, "step": self.step, "alignment": dict(self.alignment), "history": history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`. Nothing changes if it does not fit.

        The batches are not part of the state: give the same batches in the same order.

        Raises:
            CheckpointError: the state has another version or other options, or is not a realigner's state.
        """
        for key, mine in self._options.items():
            if state.get(key) != mine:
                raise CheckpointError(
                    f"the Realigner's state has {key}={state.get(key)!r}, this one has {key}={mine!r}; resume with the "
                    "same options, and give a state from Realigner.state_dict()"
                )
        step, alignment = state.get("step"), state.get("alignment")
        sites = set(self._adapted.adapters.prunable_sites)
        if type(step) is not int or step < 0 or not isinstance(alignment, Mapping) or not alignment.keys() <= sites:
            raise CheckpointError(
                f"the Realigner's state has step={step!r} and alignment={alignment!r}, expected a number of steps and "
                "numbers by site of this model; give a state from Realigner.state_dict() for the same model"
            )
        history = state.get("history", [])  # states from before it was kept have none
        if not _is_history(history, sites):
            raise CheckpointError(
                f"the Realigner's state has history={history!r:.200}, expected a list of steps and numbers by site of "
                "this model; give a state from Realigner.state_dict() for the same model"
            )
        self.step, self.alignment = step, dict(alignment)
        self.history = [(step, dict(found)) for step, found in history]

    @property
    def _options(self) -> dict[str, Any]:
        """The options that must be the same when a run is resumed."""
        batches = None if self._batches is None else len(self._batches)
        return {"version": _STATE_VERSION, "every": self.every, "threshold": self.threshold, "batches": batches}

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        if self.step % self.every == 0:
            self.realign()

    def realign(self) -> list[str]:
        """Re-diagonalize and re-align now.

        Returns:
            The sites that were re-aligned with the gradient.
        """
        rediagonalize(self._adapted, self._optimizer)
        if self._batches is None or self._loss is None:
            return []
        realigned, alignment = [], {}
        found = find_weight_gradients(self._adapted, self._batches, self._loss, with_adapters=True)
        parameters = self._adapted.adapters.keyed_parameters
        prunable = set(self._adapted.adapters.prunable_sites)
        for adapter, gradient in found:
            site = adapter.site.name
            if site not in prunable or not adapter.rank:
                continue
            P, lam, Q = (parameters[site, name] for name in ("P", "lam", "Q"))
            used = _find_used(P, lam, Q)
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            basis = P.detach()[:, used].to(wide.dtype), Q.detach()[used].to(wide.dtype)
            alignment[site] = measure_alignment(*basis, wide)
            if alignment[site] < self.threshold and not bool(used.all()):
                _realign_unused((P, lam, Q), ~used, basis, wide)
                restart_moments(self._optimizer, {"P": P, "lam": lam, "Q": Q}, ~used)
                realigned.append(site)
        self.alignment = alignment
        self.history.append((self.step, alignment))
        logger.info("re-aligned %d of %d sites at step %d", len(realigned), len(alignment), self.step)
        return realigned


def _is_history(history: object, sites: set[str]) -> bool:
    if not isinstance(history, list) or not all(isinstance(one, (list, tuple)) and len(one) == 2 for one in history):
        return False
    return all(
        type(step) is int and step >= 0 and isinstance(found, Mapping) and found.keys() <= sites
        for step, found in history
    ) and all(is_finite(value) for _, found in history for value in found.values())


def _find_used(P: torch.Tensor, lam: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """Which triplets contribute to ΔW, [r] of bool."""
    found: torch.Tensor = (lam.detach() != 0) & (P.detach() != 0).any(0) & (Q.detach() != 0).any(1)
    return found


@torch.no_grad()
def _realign_unused(
    factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    unused: torch.Tensor,
    basis: tuple[torch.Tensor, torch.Tensor],
    gradient: torch.Tensor,
) -> None:
    """Give unused triplets the largest singular vectors of the part of the gradient outside of the used ones.

    ΔW does not change. Where λ = 0, P and Q become singular vectors, and the gradient of λ is s σ. Where λ ≠ 0, Q
    becomes a singular vector and P stays 0, and the gradient of P is along the other singular vector.

    Args:
        factors: P [out, r], λ [r] and Q [r, in]; changed in place.
        unused: the unused triplets, [r] of bool.
        basis: P and Q of the used triplets.
        gradient: G, [out, in].
    """
    (P, lam, Q), (left, right) = factors, basis
    outside = gradient - left @ (left.mT @ gradient)
    outside = outside - (outside @ right.mT) @ right
    count = int(unused.sum())
    U, _, V = torch.linalg.svd(outside, full_matrices=False)
    indices = unused.nonzero()[:, 0]
    P[:, indices] = U[:, :count].masked_fill(lam[indices] != 0, 0).to(P.dtype)
    Q[indices] = V[:count].to(Q.dtype)
