"""A causal language model as a function of tokens and tensors of its key-value cache.

Names and shapes are those of optimum and onnxruntime-genai: ``past_key_values.0.key`` goes in, ``present.0.key`` comes
out, both [batch, heads, tokens, head size]. The model itself gets a ``DynamicCache`` of transformers that keeps every
token, also for layers with a sliding window, whose mask hides the old ones.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adapter_compiler.errors import ExportError
from adapter_compiler.model.capture.transformers_caches import make_cache
from adapter_compiler.onnx.translation.exportable import NamedOutputs

#: What newer and older transformers call the argument.
_CACHE_ARGUMENTS = ("cache", "past_key_values")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """What the cache of a model holds.

    Attributes:
        argument: the argument of ``forward`` that takes it.
        takes_positions: whether ``forward`` takes ``position_ids``.
        layers: for each layer, heads and head size of keys and of values.
        dtype: of both.
    """

    argument: str
    takes_positions: bool
    layers: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    dtype: torch.dtype

    def empty(self, batch: int) -> list[dict[str, torch.Tensor]]:
        """The cache before the first token."""
        return [
            {
                kind: torch.zeros(batch, heads, 0, size, dtype=self.dtype)
                for kind, (heads, size) in zip(("key", "value"), layer, strict=True)
            }
            for layer in self.layers
        ]


class CachedOutputs(NamedOutputs):
    """Returns the logits and the cache for further tokens; ``module`` is the model."""

    def __init__(self, module: nn.Module, layout: CacheLayout, left_out: Collection[str] = ()) -> None:
        """Wrap a model whose cache has this layout."""
        super().__init__(module, left_out)
        self.layout = layout

    def around(self, module: nn.Module, left_out: Collection[str] = ()) -> NamedOutputs:
        """The same for another copy of the model."""
        return CachedOutputs(module, self.layout, left_out)

    def compute(self, *, past_key_values: Sequence[Mapping[str, torch.Tensor]], **inputs: torch.Tensor) -> Any:
        """``logits``, and ``present``, which is ``past_key_values`` with the new tokens."""
        cache = make_cache([(layer["key"], layer["value"]) for layer in past_key_values])
        result = self.module(**inputs, **{self.layout.argument: cache}, use_cache=True)
        return {
            "logits": result.logits,
            "present": [{"key": layer.keys, "value": layer.values} for layer in cache.layers],
        }


@torch.no_grad()
def find_cache_layout(module: nn.Module, tokens: torch.Tensor) -> CacheLayout:
    """Run a model on tokens [batch, length] with an empty cache, and see what it keeps.

    Raises:
        ExportError: the model is no causal language model of transformers with a cache of keys and values by token.
    """
    name = type(module).__name__
    parameters = inspect.signature(module.forward).parameters
    argument = next((one for one in _CACHE_ARGUMENTS if one in parameters), None)
    if argument is None or "input_ids" not in parameters or not hasattr(module, "generate"):
        raise ExportError(
            f"export_decoder got a {name}, expected a causal language model of transformers, whose forward takes "
            f"input_ids and past_key_values and which has generate(); export other models with export_onnx, and give "
            "their caches as arguments"
        )
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise ExportError(
            f"{name} has an encoder and a decoder, expected a decoder only; export the two with export_onnx"
        )
    cache = make_cache([])
    try:
        result = module(input_ids=tokens, **{argument: cache}, use_cache=True)
    except Exception as error:  # models whose cache is of another kind raise what they like
        raise ExportError(
            f"{name} does not run with an empty DynamicCache: {type(error).__name__}: {error}; expected a model whose "
            "cache holds keys and values of every token; export it without a cache (export_onnx)"
        ) from error
    layers = [(layer.keys, layer.values) for layer in cache.layers if _has_every_token(layer, tokens)]
    if not layers or len(layers) < len(cache.layers) or not hasattr(result, "logits"):
        found = (
            "no logits" if not hasattr(result, "logits") else f"{len(layers)} of {len(cache.layers)} layers like that"
        )
        raise ExportError(
            f"the cache of {name} cannot be an input of a file: expected logits and, in every layer, keys and values "
            f"of shape [batch, heads, tokens, head size], found {found}; export it without a cache (export_onnx)"
        )
    return CacheLayout(
        argument=argument,
        takes_positions="position_ids" in parameters,
        layers=tuple(((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3])) for k, v in layers),
        dtype=layers[0][0].dtype,
    )


def _has_every_token(layer: Any, tokens: torch.Tensor) -> bool:
    states = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return all(
        isinstance(state, torch.Tensor) and state.dim() == 4 and (state.shape[0], state.shape[2]) == tokens.shape
        for state in states
    )
