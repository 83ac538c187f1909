"""The file that onnxruntime-genai needs beside a decoder: names of inputs and outputs, sizes, special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.primitives.files import written_beside

#: What genai takes for the context of models that have no limit.
_LONG = 4096
#: Genai runs every decoder of this layout by one class; "gpt2" means another layout there, and many types are unknown.
_TYPE = "llama"


def write_genai_config(model: nn.Module, path: str | Path) -> Path:
    """Write ``genai_config.json`` beside a decoder's file, so that onnxruntime-genai loads their folder.

    The library also needs the files of the tokenizer there (``tokenizer.save_pretrained(folder)``), unless it is given
    token ids. Its adapters are the files of ``save_onnx_adapter``, for a file exported with ``adapters="runtime"``.

    Args:
        model: what was exported, adapted or not; its ``config`` has the sizes and special tokens.
        path: the decoder's file.

    Returns:
        The file that was written.

    Raises:
        ConfigError: the file is no decoder's, or its layers have caches of different sizes, which genai cannot say.
    """
    path = Path(path)
    graph = onnx.load(path, load_external_data=False).graph
    inputs = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input}
    caches = {name: sizes for name, sizes in inputs.items() if name.startswith("past_key_values.")}
    shapes = {(sizes[1], sizes[3]) for sizes in caches.values()}
    if len(shapes) != 1:
        found = "no cache" if not shapes else f"heads and head sizes {sorted(shapes)}"
        raise ConfigError(
            f"{path.name} has {found}, expected keys and values of one size in all layers, which is all that "
            "onnxruntime-genai can describe; export a model of that kind with export_decoder"
        )
    target = path.with_name("genai_config.json")
    description = _describe(model, path.name, inputs, len(caches) // 2, shapes.pop())
    with written_beside(target) as draft:
        draft.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return target


def _describe(
    model: Any, name: str, inputs: dict[str, list[int]], layers: int, sizes: tuple[int, int]
) -> dict[str, Any]:
    config = model.config.get_text_config()
    plain: list[str] = [one for one in ("input_ids", "attention_mask", "position_ids") if one in inputs]
    decoder: dict[str, Any] = {
        "session_options": {"provider_options": []},
        "filename": name,
        "head_size": sizes[1],
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": sizes[0],
        "num_hidden_layers": layers,
        "inputs": {
            **dict(zip(plain, plain, strict=True)),
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    context = getattr(config, "max_position_embeddings", None) or _LONG
    ends = config.eos_token_id if config.eos_token_id is not None else 0
    first_end = ends[0] if isinstance(ends, (list, tuple)) else ends
    return {
        "model": {
            "type": _TYPE,
            "bos_token_id": config.bos_token_id if config.bos_token_id is not None else first_end,
            "eos_token_id": ends,
            "pad_token_id": first_end if getattr(config, "pad_token_id", None) is None else config.pad_token_id,
            "vocab_size": config.vocab_size,
            "context_length": context,
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": False},
    }
