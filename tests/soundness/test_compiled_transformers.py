"""Models of transformers, compiled by blocks and whole, without graph breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import adapter_compiler as ac
from tests.soundness.common import randomize, seed
from tests.soundness.oracle import assert_close

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def make_bert() -> tuple[Any, dict[str, Any]]:
    config = transformers.BertConfig(
        **SIZES, vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3
    )
    tokens = torch.randint(0, 50, (2, 9))
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([0, 2])}
    return transformers.BertForSequenceClassification(config), batch


def make_llama() -> tuple[Any, dict[str, Any]]:
    config = transformers.LlamaConfig(**SIZES, vocab_size=50, use_cache=False)
    tokens = torch.randint(0, 50, (2, 9))
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


def make_gpt2() -> tuple[Any, dict[str, Any]]:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=2, vocab_size=50, n_positions=32, use_cache=False, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    tokens = torch.randint(0, 50, (2, 9))
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # without a type it logs a warning, which breaks the graph
    return model, {"input_ids": tokens, "labels": tokens}


def make_vit() -> tuple[Any, dict[str, Any]]:
    config = transformers.ViTConfig(
        **SIZES, image_size=16, patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3
    )
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 2])}
    return transformers.ViTForImageClassification(config), batch


MODELS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "bert": make_bert,
    "llama": make_llama,
    "gpt2": make_gpt2,
    "vit": make_vit,
}


def run(call: Any, adapted: ac.AdaptedModel, batch: dict[str, Any]) -> tuple[Any, list[Any]]:
    adapted.zero_grad()
    found = call(**batch)
    found.loss.backward()
    return (found.loss.detach(), found.logits.detach()), [p.grad for p in adapted.trainable_parameters()]


@pytest.mark.parametrize("way", ["blocks", pytest.param("whole", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_in_one_piece(name: str, way: str) -> None:
    seed(1)
    model, batch = MODELS[name]()
    adapted = ac.compile_with_adapters(model.train(), (), batch, config=ac.AdapterConfig(rank=3, alpha=3.0))
    randomize(adapted, 0.1)
    expected = run(adapted, adapted, batch)
    call: Any = adapted
    if way == "blocks":
        adapted.compile(backend="aot_eager", fullgraph=True)
    else:
        call = torch.compile(adapted, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_close(run(call, adapted, batch), expected)
    # The first block is another variant than the others: its input requires no grad.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (2 if way == "blocks" else 1)
