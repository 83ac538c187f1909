"""Metrics: the scores by which a budget chooses triplets.

A metric keeps statistics of every element of P, λ and Q in triplet buffers, updates them at each optimizer step, and
sums them to one score for each triplet, S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij) (arXiv 2303.10512, eq. 8).
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence

import torch

from adapter_compiler.adapters.parameters.flat_buffers import Key
from adapter_compiler.adapters.parameters.sharded import gather_full
from adapter_compiler.training.scoring.triplet_buffers import TripletBuffers
from passes.compat import foreach_abs_, foreach_div_, foreach_lerp_, foreach_mul, foreach_sub_

#: Elements of a block of :func:`split_blocks`: four buffers of float32 take 1 MB.
_BLOCK = 65536


class Metric(abc.ABC):
    """Scores triplets.

    Attributes:
        buffers: the statistics by name, each as triplet buffers; they are saved and compacted with the budget.
    """

    name: str
    buffers: dict[str, list[torch.Tensor]]

    @abc.abstractmethod
    def update(self, triplets: TripletBuffers, gradients: Sequence[torch.Tensor], grad_scale: float = 1.0) -> None:
        """Update the statistics at one optimizer step.

        Args:
            triplets: the parameters.
            gradients: their gradients, as triplet buffers.
            grad_scale: the factor by which a GradScaler has multiplied the gradients.
        """

    @abc.abstractmethod
    def scores(self, triplets: TripletBuffers) -> torch.Tensor:
        """The score of every triplet, [n], in the order of ``triplets``."""

    def rebind(self, old: TripletBuffers, new: TripletBuffers, kept: Mapping[str, torch.Tensor] | None = None) -> None:
        """Move the statistics to the layout of other triplet buffers.

        Args:
            old: the present layout.
            new: the new layout.
            kept: by site, the indices of the triplets that stay; by default all.
        """
        self.buffers = {name: move_buffers(buffers, old, new, kept) for name, buffers in self.buffers.items()}


class SensitivityMetric(Metric):
    """AdaLoRA's metric: the smoothed sensitivity times its uncertainty, s = Ī·Ū (eq. 9 to 11)."""

    name = "sensitivity"

    def __init__(self, triplets: TripletBuffers, beta1: float, beta2: float) -> None:
        """Start with Ī = Ū = 0."""
        self.beta1 = beta1
        self.beta2 = beta2
        self.buffers = {"mean": triplets.allocate(), "uncertainty": triplets.allocate()}

    @torch.no_grad()
    def update(self, triplets: TripletBuffers, gradients: Sequence[torch.Tensor], grad_scale: float = 1.0) -> None:
        """I = |w · ∂L/∂w|, Ī ← β1 Ī + (1 - β1) I, then Ū ← β2 Ū + (1 - β2)|I - Ī| with the new Ī."""
        mean, uncertainty = self.buffers["mean"], self.buffers["uncertainty"]
        for values, given, i, u in split_blocks(triplets.values, gradients, mean, uncertainty):
            sensitivity = _measure_importance(values, given, grad_scale)
            foreach_lerp_(i, sensitivity, 1 - self.beta1)
            foreach_sub_(sensitivity, i)
            foreach_abs_(sensitivity)
            foreach_lerp_(u, sensitivity, 1 - self.beta2)

    def scores(self, triplets: TripletBuffers) -> torch.Tensor:
        """The score S_i of s = Ī·Ū."""
        return triplets.sum_triplets(foreach_mul(self.buffers["mean"], self.buffers["uncertainty"]))


class ImportanceMetric(Metric):
    """The sensitivity I = |w · ∂L/∂w| of the last step alone (the paper's ablation, section 4.4)."""

    name = "importance"

    def __init__(self, triplets: TripletBuffers) -> None:
        """Start with I = 0."""
        self.buffers = {"importance": triplets.allocate()}

    @torch.no_grad()
    def update(self, triplets: TripletBuffers, gradients: Sequence[torch.Tensor], grad_scale: float = 1.0) -> None:
        """Replace I by that of this step."""
        self.buffers["importance"] = _measure_importance(triplets.values, gradients, grad_scale)

    def scores(self, triplets: TripletBuffers) -> torch.Tensor:
        """The score S_i of s = I."""
        return triplets.sum_triplets(self.buffers["importance"])


class MagnitudeMetric(Metric):
    """The size of the update, S_i = |λ_i| ‖p_i‖ ‖q_i‖.

    The paper's ablation (section 4.4) uses |λ_i|, which is the same if the factors are orthonormal.
    """

    name = "magnitude"

    def __init__(self) -> None:
        """Keep no statistics."""
        self.buffers = {}

    def update(self, triplets: TripletBuffers, gradients: Sequence[torch.Tensor], grad_scale: float = 1.0) -> None:
        """Do nothing, because the scores depend only on the present values."""

    @torch.no_grad()
    def scores(self, triplets: TripletBuffers) -> torch.Tensor:
        """The score |λ_i| ‖p_i‖ ‖q_i‖."""
        return triplets.measure_triplets()


class SpectralMetric(Metric):
    """The exact singular values of ΔW / s: the i-th largest triplet of a weight scores its i-th singular value.

    Triplets that are not orthogonal to each other share directions, and |λ_i| ‖p_i‖ ‖q_i‖ then counts a direction
    twice. With P = U_P R_P and Qᵀ = U_Q R_Q, the singular values are those of the r × r matrix R_P diag(λ) R_Qᵀ. Which
    triplet of a weight is the i-th follows from :class:`MagnitudeMetric`; :class:`~adapter_compiler.Realigner` makes
    triplets and singular vectors the same.
    """

    name = "spectral"

    def __init__(self) -> None:
        """Keep no statistics."""
        self.buffers = {}

    def update(self, triplets: TripletBuffers, gradients: Sequence[torch.Tensor], grad_scale: float = 1.0) -> None:
        """Do nothing, because the scores depend only on the present values."""

    @torch.no_grad()
    def scores(self, triplets: TripletBuffers) -> torch.Tensor:
        """The singular values, in the order of the magnitudes."""
        sizes = triplets.measure_triplets()
        parts = zip(triplets.sites, sizes.split(triplets.sizes), strict=True)
        return torch.cat([_spread_values(triplets, site, part) for site, part in parts])


def _spread_values(triplets: TripletBuffers, site: str, sizes: torch.Tensor) -> torch.Tensor:
    """The singular values of one site, or of each matrix in its stack, for each of its triplets."""
    P, lam, Q = (gather_full(triplets.parameters[site, name].detach()).to(sizes.dtype) for name in ("P", "lam", "Q"))
    if not lam.numel():
        return sizes
    upper, lower = torch.linalg.qr(P).R, torch.linalg.qr(Q.mT).R
    values = torch.linalg.svdvals((upper * lam.unsqueeze(-2)) @ lower.mT)
    scores = sizes.new_zeros(lam.shape)
    order = sizes.view(lam.shape).argsort(dim=-1, descending=True, stable=True)
    scores.scatter_(-1, order[..., : values.shape[-1]], values)
    return scores.reshape(-1)


#: The values of ``Allocation(metric=...)``.
METRICS = (SensitivityMetric.name, ImportanceMetric.name, MagnitudeMetric.name, SpectralMetric.name)


def make_metric(name: str, triplets: TripletBuffers, beta1: float, beta2: float) -> Metric:
    """Make a metric by its name, one of :data:`METRICS`."""
    if name == SensitivityMetric.name:
        return SensitivityMetric(triplets, beta1, beta2)
    if name == ImportanceMetric.name:
        return ImportanceMetric(triplets)
    return SpectralMetric() if name == SpectralMetric.name else MagnitudeMetric()


class GrowthTracker:
    """The smoothed |∂L/∂λ| of every triplet, which is the growth score of pruned triplets.

    A pruned triplet has λ = 0, so its sensitivity and the gradients of its P and Q are 0. Only the gradient of λ shows
    how useful it would be.

    Attributes:
        growth: [n], in the order of the triplet buffers.
    """

    def __init__(self, triplets: TripletBuffers, beta: float) -> None:
        """Start with zeros."""
        self.beta = beta
        self.growth = triplets.join_lam(triplets.lam(triplets.allocate()))

    @torch.no_grad()
    def update(self, triplets: TripletBuffers, gradients: Sequence[torch.Tensor], grad_scale: float = 1.0) -> None:
        """Update the scores at one optimizer step; the arguments are those of :meth:`Metric.update`."""
        now = triplets.join_lam(triplets.lam(gradients)).abs().to(self.growth.dtype)
        self.growth.lerp_(now / grad_scale, 1 - self.beta)

    def rebind(self, old: TripletBuffers, new: TripletBuffers, kept: Mapping[str, torch.Tensor] | None = None) -> None:
        """Move the scores to the layout of other triplet buffers; the arguments are those of :meth:`Metric.rebind`."""
        if kept is not None:
            self.growth = take_triplets(self.growth, old, kept)
        self.growth = self.growth.to(new.device)


def split_blocks(*lists: Sequence[torch.Tensor]) -> Iterator[tuple[Sequence[torch.Tensor], ...]]:
    """Parts of several lists of buffers in which a chain of elementwise kernels may run one after the other.

    On a CPU these are blocks that its cache holds, one buffer at a time. Elsewhere all is one part, because there a
    kernel costs more to start than to run.
    """
    if all(tensor.device.type == "cpu" and type(tensor) is torch.Tensor and tensor.dim() == 1 for tensor in lists[0]):
        for tensors in zip(*lists, strict=True):
            yield from (
                tuple([part] for part in parts) for parts in zip(*(t.split(_BLOCK) for t in tensors), strict=True)
            )
    else:
        yield lists


def _measure_importance(
    buffers: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], grad_scale: float
) -> list[torch.Tensor]:
    """I = |w · ∂L/∂w| as new tensors, in at least float32."""
    wide = [torch.promote_types(v.dtype, torch.float32) for v in buffers]
    values = [v.to(dtype) for v, dtype in zip(buffers, wide, strict=True)]
    found = list(foreach_mul(values, [g.to(dtype) for g, dtype in zip(gradients, wide, strict=True)]))
    if grad_scale != 1.0:
        foreach_div_(found, grad_scale)
    foreach_abs_(found)
    return found


@torch.no_grad()
def move_buffers(
    buffers: Sequence[torch.Tensor],
    old: TripletBuffers,
    new: TripletBuffers,
    kept: Mapping[str, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Copy buffers to the layout of other triplet buffers.

    Args:
        buffers: the buffers, in the layout of ``old``.
        old: the present layout.
        new: the new layout; its shapes are those of the ``kept`` triplets.
        kept: by site, the indices of the triplets that stay; by default all.
    """
    moved = new.allocate()
    sources, targets = old.views(buffers), new.views(moved)
    for key, target in targets.items():
        target.copy_(select_triplets(key, sources[key], kept))
    return moved


def take_triplets(vector: torch.Tensor, triplets: TripletBuffers, kept: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The entries of the kept triplets in a vector [n] over all triplets."""
    parts = zip(triplets.sites, vector.split(triplets.sizes), strict=True)
    return torch.cat(
        [
            part.view(triplets.shapes[site]).index_select(-1, kept[site].to(part.device)).reshape(-1)
            for site, part in parts
        ]
    )


def select_triplets(key: Key, tensor: torch.Tensor, kept: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    """The part of the kept triplets in a tensor with the shape of P [..., d1, r], λ [..., r] or Q [..., r, d2]."""
    if kept is None or key[0] not in kept:
        return tensor
    return tensor.index_select(-2 if key[1] == "Q" else -1, kept[key[0]].to(tensor.device))
