"""Compare a file with ``generate()`` of the model, token by token, each with the cache that it has made itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import onnxruntime
import torch

from adapter_compiler.onnx.serving.decoding import Decoding
from adapter_compiler.onnx.translation.exportable import NamedOutputs
from adapter_compiler.onnx.verification.report import OutputError
from adapter_compiler.onnx.verification.verify import compare_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class GreedyCheck:
    """Greedy decoding of the first prompt alone, and of all of them in a batch with padding on the left.

    The file gets the tokens that ``generate()`` chose, and its logits at each step are compared; where these agree, so
    do the tokens that it would choose, up to ties.

    Attributes:
        prompts: token ids [batch, length].
        steps: tokens to make.
    """

    prompts: torch.Tensor
    steps: int

    def __call__(
        self,
        session: onnxruntime.InferenceSession,
        exporter: NamedOutputs,
        run_options: onnxruntime.RunOptions | None,
    ) -> list[OutputError]:
        """The largest difference of the logits in each of the two.

        Raises:
            VerificationError: the logits differ by more than the tolerance of their dtype.
        """
        active = "" if run_options is None else ", adapter active"
        single = self.prompts[:1]
        several = self.prompts if len(self.prompts) > 1 else single.expand(2, -1).contiguous()
        padded = torch.ones_like(several)
        padded[1:, : several.shape[1] // 2] = 0
        batches = {"one prompt": (single, torch.ones_like(single)), "left-padded prompts": (several, padded)}
        return [
            self._compare(f"greedy decoding of {name}, {self.steps} tokens{active}", session, exporter, run_options, *b)
            for name, b in batches.items()
            if self.steps
        ]

    def _compare(
        self,
        case: str,
        session: onnxruntime.InferenceSession,
        exporter: NamedOutputs,
        run_options: onnxruntime.RunOptions | None,
        prompts: torch.Tensor,
        mask: torch.Tensor,
    ) -> OutputError:
        tokens, expected = generate_greedily(exporter.module, prompts, mask, self.steps)
        names = [value.name for value in session.get_outputs()]
        decoding = Decoding(
            session.get_inputs(),
            lambda feeds: dict(zip(names, session.run(names, dict(feeds), run_options), strict=True)),
        )
        logits = decoding.feed(prompts.numpy(), mask.numpy())
        found = [logits[:, -1]]
        for step in range(expected.shape[1] - 1):
            found.append(decoding.feed(tokens[:, step : step + 1].numpy())[:, -1])
        return compare_values(case, "logits", torch.stack([torch.from_numpy(one) for one in found], 1), expected)


@torch.no_grad()
def generate_greedily(
    module: Any, prompts: torch.Tensor, mask: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new tokens [batch, steps] of transformers' ``generate``, and the logits [batch, steps, vocabulary]."""
    pad = getattr(module.generation_config, "pad_token_id", None)
    options = type(module.generation_config)(
        do_sample=False,
        num_beams=1,
        max_new_tokens=steps,
        pad_token_id=0 if pad is None else pad,
        return_dict_in_generate=True,
        output_logits=True,
    )
    result = module.generate(prompts, attention_mask=mask, generation_config=options)
    return result.sequences[:, prompts.shape[1] :], torch.stack(result.logits, 1)
