"""EVA: start along the directions in which a layer's inputs vary most (Paischer et al. 2024, arXiv 2410.07170).

The right factor is the first r right singular vectors of the layer's inputs X [rows, in]. They are computed batch by
batch: each step decomposes the components kept so far, multiplied by their singular values, stacked on the next batch.
Rows are not centered, as in the paper; PEFT's incremental PCA centers them.
"""

from __future__ import annotations

import torch


class IncrementalSvd:
    """The right singular vectors of a matrix whose rows come batch by batch (Ross et al. 2008, without a mean).

    Attributes:
        components: [k, in], orthonormal rows, largest singular value first.
        values: [k], the singular values.
        total: the sum of the squares of all elements so far.
    """

    def __init__(self, count: int, *, centered: bool = False) -> None:
        """Keep at most ``count`` components; with ``centered``, of rows minus their mean (principal components)."""
        self.count = count
        self.centered = centered
        self.components = torch.empty(0, 0)
        self.values = torch.empty(0)
        self.total = 0.0
        self._mean = torch.empty(0)
        self._seen = 0

    @torch.no_grad()
    def add(self, rows: torch.Tensor) -> None:
        """Add a batch of rows, [n, in]."""
        rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
        if not len(rows):
            return
        stacked = [rows]
        if self.centered:
            stacked = self._center(rows)
        self.total += sum(float(part.square().sum()) for part in stacked)
        if self.values.numel():
            stacked.insert(0, self.values.unsqueeze(1) * self.components)
        _, values, right = torch.linalg.svd(torch.cat(stacked), full_matrices=False)
        self.components, self.values = right[: self.count], values[: self.count]

    @property
    def explained(self) -> torch.Tensor:
        """Each component's share of :attr:`total`, [k]."""
        return self.values.square() / max(self.total, torch.finfo(torch.float32).tiny)

    def _center(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """The rows minus their own mean, and one row for the shift of the mean, so that the sum of squares is exact."""
        mean = rows.mean(0)
        parts = [rows - mean]
        if self._seen:
            weight = (self._seen * len(rows) / (self._seen + len(rows))) ** 0.5
            parts.append(weight * (self._mean - mean).unsqueeze(0))
            mean = (self._seen * self._mean + len(rows) * mean) / (self._seen + len(rows))
        self._mean = mean
        self._seen += len(rows)
        return parts
