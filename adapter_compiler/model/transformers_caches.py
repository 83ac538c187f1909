"""Let key-value caches of transformers be taken apart, so that a model that returns one can be a single graph.

A model that is *given* a cache writes into it, which a graph would not do: such calls run as Python around
smaller graphs, see :func:`passes.capture.self_check.observe_eager`.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from torch.utils import _pytree as pytree

logger = logging.getLogger(__name__)


def register_caches() -> None:
    """Register transformers' cache classes with ``torch.utils._pytree``; nothing if transformers is not in use.

    A version that lacks them, or the function for it, is left alone: models that return caches then run in parts.
    """
    if "transformers" not in sys.modules:
        return
    try:
        from transformers import EncoderDecoderCache
        from transformers.integrations.executorch import register_dynamic_cache_export_support
    except ImportError as error:
        logger.info("this transformers does not say how to take its caches apart: %s", error)
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


def _flatten_pair(cache: Any) -> tuple[list[Any], None]:
    return [cache.self_attention_cache, cache.cross_attention_cache], None


def _flatten_pair_with_keys(cache: Any) -> tuple[list[tuple[pytree.KeyEntry, Any]], None]:
    names = ("self_attention_cache", "cross_attention_cache")
    return [(pytree.GetAttrKey(name), getattr(cache, name)) for name in names], None


def _unflatten_pair(parts: Any, _: None) -> Any:
    from transformers import EncoderDecoderCache

    return EncoderDecoderCache(*parts)
