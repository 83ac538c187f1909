"""EVA: start along the directions in which a layer's inputs vary most (Paischer et al. 2024, arXiv 2410.07170).

The right factor is made of the first r right singular vectors of the inputs X [rows, in], found batch by batch: the
decomposition of what was kept, weighted by its singular values, above the next batch. Rows are not centered, as in the
paper; PEFT's incremental PCA centers them.
"""

from __future__ import annotations

import torch


class IncrementalSvd:
    """The right singular vectors of rows that come batch by batch (Ross et al. 2008, without a mean).

    Attributes:
        components: [k, in], orthonormal rows, largest singular value first.
        values: [k], the singular values.
        total: Σ of the squares of everything seen.
    """

    def __init__(self, count: int, *, centered: bool = False) -> None:
        """Keep ``count`` components; ``centered`` follows the rows' mean and gives principal components."""
        self.count = count
        self.centered = centered
        self.components = torch.empty(0, 0)
        self.values = torch.empty(0)
        self.total = 0.0
        self._mean = torch.empty(0)
        self._seen = 0

    @torch.no_grad()
    def add(self, rows: torch.Tensor) -> None:
        """Follow a batch, [n, in]."""
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
        """The share of the variance along each component, [k]."""
        return self.values.square() / max(self.total, torch.finfo(torch.float32).tiny)

    def _center(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """The rows around their own mean, and what the shift of the mean adds, so that the sum of squares is exact."""
        mean = rows.mean(0)
        parts = [rows - mean]
        if self._seen:
            weight = (self._seen * len(rows) / (self._seen + len(rows))) ** 0.5
            parts.append(weight * (self._mean - mean).unsqueeze(0))
            mean = (self._seen * self._mean + len(rows) * mean) / (self._seen + len(rows))
        self._mean = mean
        self._seen += len(rows)
        return parts
