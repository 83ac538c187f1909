"""QLoRA under Trainer: a base in few bits, trained with a budget, resumed, and folded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adapter_compiler as ac
from tests.integrations.trainer.runs import STEPS, assert_same_values, find_budget, make_trainer, transformers

pytest.importorskip("bitsandbytes", reason="the extra 'qlora' is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.randint(3, 32, (32, 6), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def make(folder: Path, how: str) -> ac.AdaptedModel:
    options: dict[str, Any] = {}
    if how == "loaded in 4 bits":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    config = ac.AdapterConfig(rank=4, quantize=None if options else how)
    torch.manual_seed(1)
    return ac.compile_with_adapters(model, example_kwargs={"input_ids": TOKENS[:2]}, config=config)


@pytest.mark.parametrize("how", ["nf4", "int8", "loaded in 4 bits"])
def test_it_trains_resumes_and_folds(folder: Path, how: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train_dataset": ROWS, "eval_dataset": ROWS[:8]}
    runs = [
        make_trainer(tmp_path, make(folder, how), trainer=options, budget={"compact": True}, save_steps=9)
        for _ in range(2)
    ]
    before = runs[0].evaluate()["eval_loss"]
    runs[0].train()
    assert runs[0].evaluate()["eval_loss"] < before
    budget = find_budget(runs[0])
    assert (budget.step, budget.live_triplets) == (STEPS, 2 * len(runs[0].model.plan))
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert_same_values(runs[1].model, runs[0].model)
    adapted: Any = runs[0].model.eval()
    merged: Any = adapted.fold()
    torch.testing.assert_close(merged(TOKENS[:2]).logits, adapted(TOKENS[:2]).logits, rtol=1e-4, atol=1e-4)
    state = load_file(tmp_path / "checkpoint-9" / "model.safetensors")
    name = "module.model.layers.0.mlp.up_proj.weight.codes"
    assert state[name].dtype is (torch.int8 if how == "int8" else torch.uint8)
    assert adapted.generate(TOKENS[:1], max_new_tokens=2, do_sample=False).shape == (1, 8)


def test_another_base_is_loaded_with_its_code(folder: Path) -> None:
    first, second = make(folder, "nf4"), make(folder, "nf4")
    with torch.no_grad():
        state = {key: value.clone() for key, value in first.state_dict().items()}
    name = "module.model.layers.0.mlp.up_proj.weight.codes"
    state[name] = torch.zeros_like(state[name])
    second.load_state_dict(state)
    assert torch.equal(second.state_dict()[name], state[name])
    assert not torch.equal(first.state_dict()[name], state[name])
    state[name] = state[name][:-1]
    with pytest.raises(RuntimeError, match=r"up_proj\.weight is quantized: found .*quantize both models in the same"):
        second.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ac.compile_with_adapters(first.fold(), config=ac.AdapterConfig(rank=4)).load_state_dict(first.state_dict())
