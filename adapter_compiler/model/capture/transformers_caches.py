"""Register the key-value caches of transformers as pytrees, so that a model that returns one can be captured.

A model that *gets* a cache writes into it, which a graph would not do; the self-check of a capture refuses such a call
(:func:`passes.capture.self_check.observe_eager`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch

from adapter_compiler.errors import ConfigError
from passes.compat import pytree

logger = logging.getLogger(__name__)


def register_caches() -> None:
    """Register transformers' cache classes with ``torch.utils._pytree``, if transformers is imported.

    If the installed version does not have these classes, or its function that registers them, nothing is registered;
    a model that returns a cache then cannot be captured.
    """
    if "transformers" not in sys.modules:
        return
    try:
        from transformers import EncoderDecoderCache
        from transformers.integrations.executorch import register_dynamic_cache_export_support
    except ImportError as error:
        logger.info("this version of transformers cannot register its caches as pytrees: %s", error)
        return

    register_dynamic_cache_export_support()
    if EncoderDecoderCache not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            EncoderDecoderCache,
            _flatten_pair,
            _unflatten_pair,
            serialized_type_name=f"{EncoderDecoderCache.__module__}.{EncoderDecoderCache.__name__}",
            flatten_with_keys_fn=_flatten_pair_with_keys,
        )


def make_cache(layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """A cache of transformers that holds the keys and values [batch, heads, tokens, head size] of these layers.

    Raises:
        ConfigError: transformers is not installed, or has no ``DynamicCache`` with layers.
    """
    try:
        from transformers import DynamicCache
    except ImportError as error:
        raise ConfigError(
            f"a decoder is exported with the caches of transformers, which cannot be imported: {error}; install "
            "adapter-compiler[hf]"
        ) from error
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def _flatten_pair(cache: Any) -> tuple[list[Any], None]:
    return [cache.self_attention_cache, cache.cross_attention_cache], None


def _flatten_pair_with_keys(cache: Any) -> tuple[list[tuple[pytree.KeyEntry, Any]], None]:
    names = ("self_attention_cache", "cross_attention_cache")
    return [(pytree.GetAttrKey(name), getattr(cache, name)) for name in names], None


def _unflatten_pair(parts: Any, _: None) -> Any:
    from transformers import EncoderDecoderCache

    return EncoderDecoderCache(*parts)
