"""Random draws that the ONNX exporter has no translation for, made from uniform ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def permute_at_random(
    n: int,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> Tensor:
    """``torch.randperm``: a random order of 0 … n-1, from sorting n random numbers."""
    return torch.rand(n, dtype=torch.float32, device=device).argsort().to(dtype or torch.int64)


def draw_samples(p: Tensor, num_samples: int, replacement: bool = False, generator: Any = None) -> Tensor:
    """``torch.multinomial``: indices [..., n] drawn with weights p [..., K], by the Gumbel-max trick.

    Without replacement, these are the n largest perturbed weights (Kool et al. 2019, arXiv 1903.06059).
    """
    if not replacement:
        return (p.log() - torch.log(-torch.log(torch.rand_like(p)))).topk(num_samples, dim=-1).indices
    drawn = torch.rand((*p.shape[:-1], num_samples, p.shape[-1]), dtype=p.dtype, device=p.device)
    return (p.log().unsqueeze(-2) - torch.log(-torch.log(drawn))).argmax(-1)


RULES: Mapping[str, Callable[..., Tensor]] = {
    "aten::multinomial": draw_samples,
    "aten::randperm": permute_at_random,
}
