"""Gradient checkpointing, by both of torch's ways, gives every adapter the gradient that it has without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adapter_compiler as ac
from tests.integrations.models import draw_values
from tests.integrations.trainer.runs import transformers

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
BOTH = pytest.mark.parametrize("is_reentrant", [False, True], ids=["not reentrant", "reentrant"])


def make_llama() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": TOKENS, "labels": TOKENS}


def make_vit() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return transformers.ViTForImageClassification(config), {"pixel_values": images, "labels": torch.arange(4) % 3}


def adapt(model: Any, batch: dict[str, torch.Tensor]) -> ac.AdaptedModel:
    example = {name: value for name, value in batch.items() if name != "labels"}
    adapted = ac.compile_with_adapters(model, example_kwargs=example, config=ac.AdapterConfig(rank=2))
    torch.manual_seed(1)
    draw_values(adapted)
    return adapted.train()


def find_gradients(adapted: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    adapted(**batch).loss.backward()
    return {name: p.grad for name, p in adapted.adapters.named_parameters()}


@BOTH
@pytest.mark.parametrize("is_early", [True, False], ids=["before compiling", "after"])
@pytest.mark.parametrize("make", [make_llama, make_vit], ids=["llama", "vit"])
def test_gradients_are_the_same(make: Any, is_early: bool, is_reentrant: bool) -> None:
    torch.manual_seed(0)
    model, batch = make()
    model.train()
    expected = find_gradients(adapt(model, batch), batch)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": is_reentrant}}
    if is_early:
        model.gradient_checkpointing_enable(**options)
        model.enable_input_require_grads()  # what transformers asks for where weights are frozen
    adapted: Any = adapt(model, batch)
    if not is_early:
        adapted.gradient_checkpointing_enable(**options)
    assert adapted.is_gradient_checkpointing
    for name, gradient in find_gradients(adapted, batch).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_it_can_be_switched_off() -> None:
    model, batch = make_vit()
    adapted: Any = adapt(model, batch)
    for _ in range(2):
        adapted.gradient_checkpointing_enable()
    adapted.gradient_checkpointing_disable()
    adapted.disable_input_require_grads()
    assert not adapted.is_gradient_checkpointing
    assert not adapted.get_input_embeddings()._forward_hooks
