"""Folders that peft wrote for models of transformers, folded into the model's folder and loaded again.

The names and sizes of these models raise questions that single layers do not: heads tied to embeddings, embeddings that
peft saves besides, Conv1D beside Linear, stacks of experts, layers by number.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.folding.fold_files import fold_files
from tests.interop.peft_cells import randomize

SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_llama(*, tied: bool) -> Any:
    config = transformers.LlamaConfig(**SMALL, num_hidden_layers=2, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def make_gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def make_gpt_oss() -> Any:
    sizes = {**SMALL, "intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, num_hidden_layers=1))


def make_mixtral() -> Any:
    sizes = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 3}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_hidden_layers=1))


def make_t5() -> Any:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def make_bert() -> Any:
    config = transformers.BertConfig(**SMALL, num_hidden_layers=1)
    return transformers.BertForSequenceClassification(config)


MODELS: dict[str, Callable[[], Any]] = {
    "untied": lambda: make_llama(tied=False),
    "tied": lambda: make_llama(tied=True),
    "gpt2": make_gpt2,
    "gpt-oss": make_gpt_oss,
    "mixtral": make_mixtral,
    "t5": make_t5,
    "bert": make_bert,
}


def run(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    logits: Tensor = model(IDS, **more).logits.detach()
    return logits


def write_with_peft(name: str, options: dict[str, Any], folder: Path, **saving: Any) -> Tensor:
    """Save a base model and adapters of it; the outputs of the adapted model."""
    model = MODELS[name]().eval()
    model.save_pretrained(folder / "base")
    base = type(model).from_pretrained(folder / "base").eval()
    save_file({key: value.clone() for key, value in base.state_dict().items()}, folder / "base.safetensors")
    kind = peft.AdaLoraConfig if "init_r" in options else peft.LoraConfig
    rank = {} if "init_r" in options else {"r": 2}
    wrapped: Any = peft.get_peft_model(base, kind(**{**rank, "lora_alpha": 3, **options})).eval()
    randomize(wrapped)
    outputs = run(wrapped)
    wrapped.save_pretrained(folder / "adapters", **saving)
    return outputs


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


ATTENTION: dict[str, Any] = {"target_modules": ["q_proj", "o_proj"]}
#: By model: options, and whether the result is tied (for models that are tied).
FOLDED: dict[str, tuple[str, dict[str, Any], bool | None]] = {
    "attention": ("untied", ATTENTION, None),
    "one layer": ("untied", {**ATTENTION, "layers_to_transform": [1]}, None),
    "patterns": ("untied", {**ATTENTION, "rank_pattern": {"layers.0.self_attn.q_proj": 1}}, None),
    "all-linear": ("untied", {"target_modules": "all-linear"}, None),
    "embedding": ("untied", {"target_modules": ["embed_tokens"]}, None),
    "embedding by dora": ("untied", {"target_modules": ["embed_tokens"], "use_dora": True}, None),
    "head": ("untied", {"target_modules": ["lm_head"]}, None),
    "rows": ("untied", {**ATTENTION, "trainable_token_indices": [1, 3]}, None),
    "rows of both": ("untied", {**ATTENTION, "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, None),
    "tied attention": ("tied", ATTENTION, True),
    "tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}, False),
    "tied head, trained": ("tied", {**ATTENTION, "modules_to_save": ["lm_head"]}, False),
    "tied pair": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}, False),
    "tied pair, kept": ("tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "tied pair, trained": ("tied", {**ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "tied pair, trained and kept": (
        "tied", {**ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True
    ),
    "tied rows": ("tied", {**ATTENTION, "trainable_token_indices": [1, 3]}, True),
    "tied rows by two names": (
        "tied", {**ATTENTION, "trainable_token_indices": {"embed_tokens": [1], "lm_head": [1]}}, True
    ),
    "tied, other rows of the head": (
        "tied", {**ATTENTION, "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, False
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}, True),
    "gpt2, square only": ("gpt2", {"target_modules": ["attn.c_proj"]}, True),
    "gpt2 and its head": ("gpt2", {"target_modules": ["c_attn", "c_proj", "lm_head"]}, False),
    "gpt2 by adalora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "init_r": 2, "total_step": 9}, True),
    "experts [in, out]": (
        "gpt-oss", {**ATTENTION, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}, None
    ),
    "square experts": ("gpt-oss", {**ATTENTION, "target_parameters": ["experts.down_proj"]}, None),
    "t5": ("t5", {"target_modules": ["q", "v"]}, True),
    "bert": ("bert", {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}, True),
    "bert's embedding": ("bert", {"target_modules": ["word_embeddings"]}, True),
    "bert's biases": ("bert", {"target_modules": ["query"], "bias": "all"}, True),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDED)
def test_a_folded_folder_computes_as_peft_does(case: str, tmp_path: Path) -> None:
    name, options, tied = FOLDED[case]
    expected = write_with_peft(name, options, tmp_path)
    fold_files(tmp_path / "base", tmp_path / "adapters", tmp_path / "out")
    if tied is not None:
        assert read_config(tmp_path / "out")["tie_word_embeddings"] is tied
    folded = type(MODELS[name]()).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(run(folded), expected, rtol=1e-5, atol=1e-5)


def test_embeddings_that_peft_saves_besides(tmp_path: Path) -> None:
    expected = write_with_peft("tied", ATTENTION, tmp_path, save_embedding_layers=True)
    fold_files(tmp_path / "base", tmp_path / "adapters", tmp_path / "out")
    folded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(run(folded), expected, rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "embedding": ("tied", {"target_modules": ["embed_tokens"]}, "embed_tokens.weight is tied to the head of the model"),
    "trained embedding": ("tied", {**ATTENTION, "modules_to_save": ["embed_tokens"]}, "is tied to the head"),
    "gpt2's embedding": ("gpt2", {"target_modules": ["wte"]}, "wte.weight is tied to the head of the model"),
    "t5's head": ("t5", {"target_modules": ["lm_head"]}, "this kind of model computes something else"),
    "repeated layers": ("untied", {**ATTENTION, "layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
    "experts one by one": (
        "mixtral", {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}, "target_parameters names"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_result_could_not_say_is_refused(case: str, tmp_path: Path) -> None:
    name, options, message = REFUSED[case]
    write_with_peft(name, options, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        fold_files(tmp_path / "base", tmp_path / "adapters", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["attn.c_attn", "lm_head"]], ids=str)
def test_one_file_cannot_say_that_its_weights_are_not_tied(modules: list[str], tmp_path: Path) -> None:
    write_with_peft("gpt2" if len(modules) > 1 else "tied", {"target_modules": modules}, tmp_path)
    with pytest.raises(CheckpointError, match=r"the head and the embedding are tied, .* no config\.json is written"):
        fold_files(tmp_path / "base.safetensors", tmp_path / "adapters", tmp_path / "out.safetensors")


def test_tied_rows_change_both_tensors_of_a_file(tmp_path: Path) -> None:
    options = {**ATTENTION, "trainable_token_indices": [1, 3]}
    expected = write_with_peft("tied", options, tmp_path)
    changed = fold_files(tmp_path / "base.safetensors", tmp_path / "adapters", tmp_path / "out.safetensors")
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(changed)
    folded = make_llama(tied=True).eval()
    folded.load_state_dict(load_file(tmp_path / "out.safetensors"))
    torch.testing.assert_close(run(folded), expected, rtol=1e-5, atol=1e-5)


def test_stacks_of_experts_in_the_names_of_the_model(tmp_path: Path) -> None:
    options = {**ATTENTION, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    expected = write_with_peft("mixtral", options, tmp_path)
    fold_files(tmp_path / "base.safetensors", tmp_path / "adapters", tmp_path / "out.safetensors")
    folded = make_mixtral().eval()
    folded.load_state_dict(load_file(tmp_path / "out.safetensors"))
    torch.testing.assert_close(run(folded), expected, rtol=1e-5, atol=1e-5)


def test_a_start_that_changed_the_base_is_read_when_peft_has_converted_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_llama(tied=False).eval()
    save_file({key: value.clone() for key, value in model.state_dict().items()}, tmp_path / "base.safetensors")
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights="pissa", **ATTENTION)).eval()
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    expected = run(wrapped)
    wrapped.save_pretrained(tmp_path / "plain")
    wrapped.save_pretrained(tmp_path / "adapters", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    fold_files(tmp_path / "base.safetensors", tmp_path / "adapters", tmp_path / "out.safetensors")
    folded = make_llama(tied=False).eval()
    folded.load_state_dict(load_file(tmp_path / "out.safetensors"))
    torch.testing.assert_close(run(folded), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="init_lora_weights='pissa': this start changed the base weights"):
        fold_files(tmp_path / "base.safetensors", tmp_path / "plain", tmp_path / "other.safetensors")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_head_that_was_untied_here(tied: bool, tmp_path: Path) -> None:
    """Our own adapters of a tied model, with one for both names or one for each."""
    model = make_llama(tied=True).eval()
    model.save_pretrained(tmp_path / "base")
    options = ac.AdapterConfig(rank=2, sites=("*q_proj*", "*embed*"), untie=() if tied else ("lm_head.weight",))
    if not tied:
        options = dataclasses.replace(options, sites=("*q_proj*", "lm_head.weight"))
    adapted = ac.compile_with_adapters(model, (IDS,), config=options)
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    adapted.save(tmp_path / "adapters")
    fold_files(tmp_path / "base", tmp_path / "adapters", tmp_path / "out")
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is tied
    folded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(run(folded), run(adapted), rtol=1e-4, atol=1e-4)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.mix(self.embed(ids)).tanh())
        return y


def test_an_onnx_file_takes_rows_and_biases_too(tmp_path: Path) -> None:
    ids = torch.arange(6)[None]
    ac.export_onnx(Small().eval(), tmp_path / "base.onnx", (ids,))
    options: dict[str, Any] = {"trainable_token_indices": {"embed": [1, 3]}, "lora_bias": True}
    options["modules_to_save"] = ["head"]
    wrapped: Any = peft.get_peft_model(Small(), peft.LoraConfig(r=2, target_modules=["mix"], **options)).eval()
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path / "adapters")
    fold_files(tmp_path / "base.onnx", tmp_path / "adapters", tmp_path / "out.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wrapped(ids).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_base_of_half_precision_takes_what_was_trained_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    options: dict[str, Any] = {"modules_to_save": ["head"], "lora_bias": True}
    wrapped: Any = peft.get_peft_model(Small(), peft.LoraConfig(r=2, target_modules=["mix"], **options)).eval()
    randomize(wrapped)
    wrapped.save_pretrained(tmp_path / "adapters")
    base = Small().to(dtype)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    fold_files(tmp_path / "base.safetensors", tmp_path / "adapters", tmp_path / "out.safetensors")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").merge_and_unload().state_dict()
    found = load_file(tmp_path / "out.safetensors")
    for name, tensor in merged.items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=2e-2, atol=2e-2)
    weights = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    weights["base_model.model.head.weight"][0, 0] = 1e6
    save_file(weights, tmp_path / "adapters" / "adapter_model.safetensors")
    if dtype == torch.float16:
        with pytest.raises(CheckpointError, match=r"head\.weight has values that exceed the F16 of the base"):
            fold_files(tmp_path / "base.safetensors", tmp_path / "adapters", tmp_path / "other.safetensors")
