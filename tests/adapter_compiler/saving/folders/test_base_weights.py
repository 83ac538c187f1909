"""What the configuration of a model says of the layouts of its weights."""

from __future__ import annotations

from typing import Any

import pytest

from adapter_compiler.saving.folders.base_weights import BaseWeights


@pytest.mark.parametrize(
    ("config", "lacks"),
    [
        (None, False),
        ({}, False),
        ({"model_type": 3}, False),
        ({"model_type": "llama"}, True),
        ({"model_type": "gpt2"}, False),
        ({"model_type": "vision-encoder-decoder", "encoder": {"model_type": "vit"}}, True),
        ({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}, False),
        ({"model_type": "llama", "auto_map": {"AutoModel": "modeling_own.Model"}}, False),
    ],
)
def test_a_model_lacks_conv1d_if_none_of_its_parts_has_it(config: dict[str, Any] | None, lacks: bool) -> None:
    assert BaseWeights(name="base", shapes={}, config=config).lacks_conv1d is lacks
