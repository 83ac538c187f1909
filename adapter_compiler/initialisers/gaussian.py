"""AdaLoRA's own start: P and Q normal, λ zero (arXiv 2303.10512, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def initialise_gaussian(parameters: Mapping[str, nn.Parameter], std: float) -> None:
    """P, Q ~ N(0, std²) from torch's global generator, λ = 0, so that ΔW = 0."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name == "lam":
                parameter.zero_()
            else:
                parameter.normal_(0.0, std)
