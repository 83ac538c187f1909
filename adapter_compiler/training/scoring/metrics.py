"""What a triplet is worth: the scores by which a budget is given out.

A metric keeps statistics of every element as buffers of a triplets, follows them at each optimizer step, and
sums them up to one score a triplet, S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij) (arXiv 2303.10512, eq. 8).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

import torch

from adapter_compiler.adapters.parameters.flat_buffers import Key
from adapter_compiler.training.scoring.triplet_buffers import TripletBuffers


class Metric(abc.ABC):
    """Scores triplets.

    Attributes:
        buffers: the statistics by name, each as buffers of the triplets; they are saved and compacted with it.
    """

    name: str
    buffers: dict[str, list[torch.Tensor]]

    @abc.abstractmethod
    def update(self, triplets: TripletBuffers, gradients: Sequence[torch.Tensor], grad_scale: float = 1.0) -> None:
        """Follow one optimizer step; ``grad_scale`` divides gradients that are still scaled."""

    @abc.abstractmethod
    def scores(self, triplets: TripletBuffers) -> torch.Tensor:
        """S of every triplet, [n triplets] in the triplets's order."""

    def rebind(self, old: TripletBuffers, new: TripletBuffers, kept: Mapping[str, torch.Tensor] | None = None) -> None:
        """Move the statistics from the buffers of one triplets to those of another, of the ``kept`` triplets only."""
        self.buffers = {name: move_buffers(buffers, old, new, kept) for name, buffers in self.buffers.items()}


class SensitivityMetric(Metric):
    """AdaLoRA's own: smoothed sensitivity times its uncertainty, s = Ī·U (eqs. 9 to 11)."""

    name = "sensitivity"

    def __init__(self, triplets: TripletBuffers, beta1: float, beta2: float) -> None:
        """Start with Ī = U = 0."""
        self.beta1 = beta1
        self.beta2 = beta2
        self.buffers = {"mean": triplets.allocate(), "uncertainty": triplets.allocate()}

    @torch.no_grad()
    def update(self, triplets: TripletBuffers, gradients: Sequence[torch.Tensor], grad_scale: float = 1.0) -> None:
        """I = |w · ∂L/∂w|, Ī ← β1 Ī + (1 - β1) I, U ← β2 U + (1 - β2)|I - Ī| (with the new Ī)."""
        mean, uncertainty = self.buffers["mean"], self.buffers["uncertainty"]
        sensitivity = _measure_importance(triplets, gradients, grad_scale)
        torch._foreach_lerp_(mean, sensitivity, 1 - self.beta1)
        torch._foreach_sub_(sensitivity, mean)
        torch._foreach_abs_(sensitivity)
        torch._foreach_lerp_(uncertainty, sensitivity, 1 - self.beta2)

    def scores(self, triplets: TripletBuffers) -> torch.Tensor:
        """Sums of Ī·U."""
        return triplets.sum_triplets(torch._foreach_mul(self.buffers["mean"], self.buffers["uncertainty"]))


class ImportanceMetric(Metric):
    """The sensitivity I = |w · ∂L/∂w| of the last step alone (the paper's ablation, section 4.4)."""

    name = "importance"

    def __init__(self, triplets: TripletBuffers) -> None:
        """Start with I = 0."""
        self.buffers = {"importance": triplets.allocate()}

    @torch.no_grad()
    def update(self, triplets: TripletBuffers, gradients: Sequence[torch.Tensor], grad_scale: float = 1.0) -> None:
        """I of this step."""
        self.buffers["importance"] = _measure_importance(triplets, gradients, grad_scale)

    def scores(self, triplets: TripletBuffers) -> torch.Tensor:
        """Sums of I."""
        return triplets.sum_triplets(self.buffers["importance"])


class MagnitudeMetric(Metric):
    """The size of the update, S_i = |λ_i| ‖p_i‖ ‖q_i‖.

    The paper's ablation (section 4.4) takes |λ_i|, which is the same where the factors are orthonormal.
    """

    name = "magnitude"

    def __init__(self) -> None:
        """There is nothing to follow."""
        self.buffers = {}

    def update(self, triplets: TripletBuffers, gradients: Sequence[torch.Tensor], grad_scale: float = 1.0) -> None:
        """Nothing: the values say all."""

    @torch.no_grad()
    def scores(self, triplets: TripletBuffers) -> torch.Tensor:
        """|λ| ‖p‖ ‖q‖."""
        return triplets.measure_triplets()


#: What ``Allocation(metric=...)`` may name.
METRICS = (SensitivityMetric.name, ImportanceMetric.name, MagnitudeMetric.name)


def make_metric(name: str, triplets: TripletBuffers, beta1: float, beta2: float) -> Metric:
    """The metric of that name (one of :data:`METRICS`)."""
    if name == SensitivityMetric.name:
        return SensitivityMetric(triplets, beta1, beta2)
    return ImportanceMetric(triplets) if name == ImportanceMetric.name else MagnitudeMetric()


class GrowthTracker:
    """Smoothed |∂L/∂λ| of every triplet: what a pruned one would be worth.

    A pruned triplet has λ = 0, so that its sensitivity and the gradients of its P and Q vanish whatever it
    could do; only the gradient of λ tells.

    Attributes:
        growth: [n triplets] in the triplets's order.
    """

    def __init__(self, triplets: TripletBuffers, beta: float) -> None:
        """Start with zeros."""
        self.beta = beta
        self.growth = triplets.join_lam(triplets.lam(triplets.allocate()))

    @torch.no_grad()
    def update(self, triplets: TripletBuffers, gradients: Sequence[torch.Tensor], grad_scale: float = 1.0) -> None:
        """Follow one step."""
        now = triplets.join_lam(triplets.lam(gradients)).abs().to(self.growth.dtype)
        self.growth.lerp_(now / grad_scale, 1 - self.beta)

    def rebind(self, old: TripletBuffers, new: TripletBuffers, kept: Mapping[str, torch.Tensor] | None = None) -> None:
        """Keep the scores of the ``kept`` triplets only."""
        if kept is not None:
            self.growth = take_triplets(self.growth, old, kept)
        self.growth = self.growth.to(new.device)


def _measure_importance(
    triplets: TripletBuffers, gradients: Sequence[torch.Tensor], grad_scale: float
) -> list[torch.Tensor]:
    """|w · ∂L/∂w| as new buffers, in float32 or better."""
    wide = [torch.promote_types(v.dtype, torch.float32) for v in triplets.values]
    values = [v.to(dtype) for v, dtype in zip(triplets.values, wide, strict=True)]
    found = list(torch._foreach_mul(values, [g.to(dtype) for g, dtype in zip(gradients, wide, strict=True)]))
    if grad_scale != 1.0:
        torch._foreach_div_(found, grad_scale)
    torch._foreach_abs_(found)
    return found


@torch.no_grad()
def move_buffers(
    buffers: Sequence[torch.Tensor],
    old: TripletBuffers,
    new: TripletBuffers,
    kept: Mapping[str, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """The same numbers arranged as another triplets arranges them.

    Args:
        buffers: of ``old``.
        old: how they are arranged.
        new: how they shall be; its shapes are those of the ``kept`` triplets.
        kept: by site, the indices of the triplets that stay; all by default.
    """
    moved = new.allocate()
    sources, targets = old.views(buffers), new.views(moved)
    for key, target in targets.items():
        target.copy_(select_triplets(key, sources[key], kept))
    return moved


def take_triplets(vector: torch.Tensor, triplets: TripletBuffers, kept: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The kept triplets of a vector over all triplets of ``triplets``."""
    parts = zip(triplets.sites, vector.split(triplets.sizes), strict=True)
    return torch.cat(
        [
            part.view(triplets.shapes[site]).index_select(-1, kept[site].to(part.device)).reshape(-1)
            for site, part in parts
        ]
    )


def select_triplets(key: Key, tensor: torch.Tensor, kept: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    """The kept triplets of a tensor shaped like P [..., d1, r], λ [..., r] or Q [..., r, d2]."""
    if kept is None or key[0] not in kept:
        return tensor
    return tensor.index_select(-2 if key[1] == "Q" else -1, kept[key[0]].to(tensor.device))
