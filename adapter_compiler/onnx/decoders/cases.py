"""The inputs that a decoder's file is verified on: prompts without a past, tokens after one, and left padding.

A past is what the model itself has computed for earlier tokens, so keys and values have the sizes that occur.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from adapter_compiler.onnx.decoders.cached_outputs import CachedOutputs
from adapter_compiler.onnx.verification.cases import VerificationCase
from passes.capture.calls import ModuleCall, split_call


class _Sizes(NamedTuple):
    batch: int
    past: int
    tokens: int
    padding: int = 0


#: The example comes first: exporters take sizes of zero and one for fixed.
_SIZES = (
    _Sizes(2, 4, 3),
    _Sizes(2, 0, 5),
    _Sizes(1, 0, 1),
    _Sizes(1, 6, 1),
    _Sizes(3, 1, 2),
    _Sizes(2, 0, 6, padding=2),
    _Sizes(2, 6, 1, padding=3),
    _Sizes(3, 5, 2, padding=4),
)
#: Tokens of the longest of these inputs.
LONGEST = max(sizes.past + sizes.tokens for sizes in _SIZES)


def find_decoder_cases(exporter: CachedOutputs, vocabulary: int) -> list[VerificationCase]:
    """The inputs, computed by the model from random tokens below ``vocabulary``; the example is first."""
    generator = torch.Generator().manual_seed(0)
    cases: list[VerificationCase] = []
    for sizes in _SIZES:
        tokens = torch.randint(0, vocabulary, (sizes.batch, sizes.past + sizes.tokens), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, : sizes.padding] = 0
        padded = f", {sizes.padding} of the first row padding" if sizes.padding else ""
        name = f"batch {sizes.batch}, {sizes.tokens} tokens after {sizes.past}{padded}" if cases else "example"
        cases.append(VerificationCase(name=name, call=make_decoder_call(exporter, tokens, mask, sizes.past)))
    return cases


@torch.no_grad()
def make_decoder_call(exporter: CachedOutputs, tokens: torch.Tensor, mask: torch.Tensor, past: int) -> ModuleCall:
    """The call for the tokens after the first ``past`` ones, whose keys and values the model computes.

    Args:
        exporter: the model.
        tokens: [batch, length].
        mask: the same shape; 0 for padding on the left.
        past: how many tokens the cache already holds.
    """
    cache = exporter.layout.empty(len(tokens))
    if past:
        cache = exporter.compute(**_inputs(exporter, tokens[:, :past], mask[:, :past]), past_key_values=cache)[
            "present"
        ]
    inputs = _inputs(exporter, tokens[:, past:], mask)
    return split_call((), {**inputs, "past_key_values": cache})


def _inputs(exporter: CachedOutputs, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens with the mask over the past and themselves, and their positions, which padding does not count in."""
    inputs = {"input_ids": tokens.contiguous(), "attention_mask": mask.contiguous()}
    if exporter.layout.takes_positions:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs["position_ids"] = positions[:, -tokens.shape[1] :].contiguous()
    return inputs
