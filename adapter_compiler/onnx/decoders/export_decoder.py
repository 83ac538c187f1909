"""Export a causal language model with its key-value cache as inputs and outputs, for decoding token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapter_compiler.config.progress import progress
from adapter_compiler.errors import ConfigError
from adapter_compiler.onnx.decoders.cached_outputs import CachedOutputs, CacheLayout, find_cache_layout
from adapter_compiler.onnx.decoders.cases import LONGEST, find_decoder_cases
from adapter_compiler.onnx.decoders.greedy import GreedyCheck
from adapter_compiler.onnx.exporting.export import export_task
from adapter_compiler.onnx.exporting.task import FileContract, assert_adapters, make_task
from adapter_compiler.onnx.translation.exportable import prepare_base, prepare_merged
from adapter_compiler.onnx.translation.fallbacks import Strategy
from adapter_compiler.onnx.translation.opsets import check_opset
from adapter_compiler.onnx.verification.report import ExportReport
from passes.capture.module_state import canonical_kernels

#: A decoder needs all of its dimensions open, and no trace that makes its branches constant.
_STRATEGIES = tuple(Strategy(exporter=exporter, dynamic="all") for exporter in ("torch.export", "recorded call"))
#: Prompts for the greedy check, if the user gives none: rows and tokens.
_PROMPTS = (2, 6)
_BATCH, _TOKENS, _PAST, _TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


def export_decoder(
    adapted_or_model: nn.Module,
    path: str | Path,
    *,
    prompts: torch.Tensor | None = None,
    steps: int = 32,
    opset: int | None = None,
    adapters: str = "merged",
) -> ExportReport:
    """Export a causal language model of transformers with its cache, and verify the file.

    Inputs are ``input_ids`` [batch_size, sequence_length], ``attention_mask`` [batch_size, total_sequence_length],
    ``position_ids``, if the model takes them, and ``past_key_values.0.key``, ``past_key_values.0.value`` and so on
    [batch_size, heads, past_sequence_length, head size]; outputs are ``logits`` and ``present.0.key`` and so on, which
    are the inputs of the next call. These are the names and shapes of optimum and onnxruntime-genai. All sizes except
    heads and head size are open; the past may be empty.
    :class:`~adapter_compiler.onnx.serving.decoding.OnnxDecoder` decodes with the file.

    The file is compared with PyTorch on prompts without a past, on tokens after one, and with padding on the left, and
    then step by step with the model's own ``generate()``, each with the cache that it has made itself.

    Args:
        adapted_or_model: an adapted model, or a model of transformers; it is not changed.
        path: the file to write.
        prompts: token ids [batch, length] to decode from in the comparison with ``generate()``; by default random ones.
        steps: tokens to decode in that comparison, fewer if the model has no positions for them.
        opset: the ONNX operator set, from 7 to 25; by default the exporter's.
        adapters: ``"merged"`` or ``"runtime"``, as in :func:`~adapter_compiler.onnx.exporting.export.export_onnx`.

    Returns:
        A report with ``path``, ``max_abs_error`` and the error of each output on each input.

    Raises:
        ConfigError: an option has a value that cannot work, adapters are not low-rank additions, or transformers is
            missing.
        ExportError: the model is no decoder with keys and values for every token, or does not export; no file is left.
        VerificationError: the file does not load or differs from PyTorch; no file is left.
    """
    check_opset(opset)
    assert_adapters(adapted_or_model, adapters)
    if steps < 0:
        raise ConfigError(f"export_decoder(steps={steps}): expected zero or more tokens")
    with progress(f"export {Path(path).name}"), canonical_kernels(), torch.no_grad():
        module = prepare_merged(adapted_or_model) if adapters == "merged" else prepare_base(adapted_or_model)
        _assert_prompts(prompts)
        exporter = CachedOutputs(module, find_cache_layout(module, torch.zeros(_PROMPTS, dtype=torch.long)))
        vocabulary, positions = _read_sizes(module)
        _assert_exportable(exporter.layout, positions)
        prompts = _draw_prompts(vocabulary) if prompts is None else prompts.detach().cpu()
        if positions is not None:
            _assert_short(prompts, positions)
            steps = min(steps, positions - prompts.shape[1])
        cases = find_decoder_cases(exporter, vocabulary)
        contract = FileContract(
            cases=cases,
            dimensions=_name_dimensions(exporter.layout),
            check=GreedyCheck(prompts=prompts, steps=steps),
        )
        task = make_task(adapted_or_model, exporter, cases[0].call, opset=opset, adapters=adapters, contract=contract)
        return export_task(task, Path(path), _STRATEGIES)


def _assert_prompts(prompts: object) -> None:
    if prompts is None:
        return
    if (
        not isinstance(prompts, torch.Tensor)
        or prompts.dim() != 2
        or prompts.is_floating_point()
        or not prompts.numel()
    ):
        found = f"shape {list(prompts.shape)}, {prompts.dtype}" if isinstance(prompts, torch.Tensor) else repr(prompts)
        raise ConfigError(f"export_decoder(prompts=...) got {found}, expected token ids [batch, length] as integers")


def _assert_short(prompts: torch.Tensor, positions: int) -> None:
    if prompts.shape[1] >= positions:
        raise ConfigError(
            f"export_decoder(prompts=...) has {prompts.shape[1]} tokens a row, expected fewer than the {positions} "
            "positions of the model, so that there is room for new tokens; give shorter prompts"
        )


def _assert_exportable(layout: CacheLayout, positions: int | None) -> None:
    if layout.dtype is torch.bfloat16:
        raise ConfigError(
            "export_decoder got a model in bfloat16, whose cache numpy cannot hold; expected float32 or float16; "
            "export model.float() or model.half()"
        )
    if positions is not None and positions < LONGEST:
        raise ConfigError(
            f"the model has {positions} positions, expected {LONGEST} or more for the inputs that a file is verified on"
        )


def _read_sizes(module: Any) -> tuple[int, int | None]:
    """The numbers of tokens that there are, and of positions."""
    config = module.config.get_text_config()
    return int(config.vocab_size), getattr(config, "max_position_embeddings", None)


def _draw_prompts(vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, _PROMPTS, generator=torch.Generator().manual_seed(1))


def _name_dimensions(layout: CacheLayout) -> dict[str, tuple[str | None, ...]]:
    names: dict[str, tuple[str | None, ...]] = {
        "input_ids": (_BATCH, _TOKENS),
        "attention_mask": (_BATCH, _TOTAL),
        "position_ids": (_BATCH, _TOKENS),
        "logits": (_BATCH, _TOKENS, None),
    }
    for number in range(len(layout.layers)):
        for kind in ("key", "value"):
            names[f"past_key_values.{number}.{kind}"] = (_BATCH, None, _PAST, None)
            names[f"present.{number}.{kind}"] = (_BATCH, None, _TOTAL, None)
    return names
