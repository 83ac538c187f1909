"""Decoders of transformers in a file: the same tokens as ``generate()``, whatever the past, batch and padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError, ExportError
from adapter_compiler.onnx import write_genai_config

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None}
SIZES |= {"bos_token_id": 1, "pad_token_id": 0}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "eos_token_id": None,
}


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT, bos_token_id=1)).eval()
    if kind == "window":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=5)).eval()
    name = {"llama": "Llama", "qwen2": "Qwen2"}[kind]
    config = getattr(transformers, f"{name}Config")(**SIZES)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def adapt(model: Any) -> Any:
    tokens = torch.randint(0, VOCABULARY, (2, 5))
    adapted = ac.compile_with_adapters(model, example_kwargs={"input_ids": tokens}, config=ac.AdapterConfig(rank=4))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.3)
    return adapted.eval()


def generate(model: Any, tokens: Tensor, mask: Tensor, count: int = 32) -> list[list[int]]:
    made = model.generate(tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    found: list[list[int]] = made.tolist()
    return found


def make_prompts() -> list[tuple[Tensor, Tensor]]:
    """One prompt, and two of which the first is padded on the left."""
    tokens = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5))
    padded = torch.ones_like(tokens)
    padded[0, :3] = 0
    return [(tokens[:1], torch.ones_like(tokens[:1])), (tokens * padded, padded)]


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_mixture_decodes_with_its_routers(kind: str, tmp_path: Path) -> None:
    model, tokens = make_model(kind), torch.randint(0, VOCABULARY, (2, 5))
    mixture = ac.Mixture(experts=3, top_k=2, router="block")
    config = ac.AdapterConfig(rank=6, mixture=mixture)
    adapted = ac.compile_with_adapters(model, example_kwargs={"input_ids": tokens}, config=config).eval()
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.3)
    ac.export_decoder(adapted, tmp_path / "mixture.onnx")
    decoder = ac.OnnxDecoder(tmp_path / "mixture.onnx")
    for tokens, mask in make_prompts():
        made = decoder.generate(tokens.numpy(), attention_mask=mask.numpy(), max_new_tokens=32).tolist()
        assert made == generate(adapted, tokens, mask)
        assert made != generate(model, tokens, mask)


@pytest.mark.parametrize("kind", ["gpt2", "llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_one_file_decodes_as_generate_with_and_without_an_adapter(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    adapted = adapt(model)
    report = ac.export_decoder(adapted, tmp_path / "served.onnx", adapters="runtime")
    ac.save_onnx_adapter(adapted, tmp_path / "task.onnx_adapter")
    served = ac.OnnxAdapters(tmp_path / "served.onnx")
    served.load("task", tmp_path / "task.onnx_adapter")
    decoder, merged = ac.OnnxDecoder(served), adapted.fold().eval()
    for tokens, mask in make_prompts():
        options: dict[str, Any] = {"attention_mask": mask.numpy(), "max_new_tokens": 32}
        base = decoder.generate(tokens.numpy(), **options).tolist()
        task = decoder.generate(tokens.numpy(), **options, adapter="task").tolist()
        assert base == generate(model, tokens, mask)
        assert task == generate(merged, tokens, mask)
        assert base != task
    assert {"greedy decoding of one prompt, 32 tokens", "batch 1, 1 tokens after 0"} <= set(report.cases)
    assert report.max_abs_error < 1e-4 and not report.not_verified


@pytest.mark.parametrize("kind", ["window", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_merged_file_has_the_names_of_other_run_times(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    report = ac.export_decoder(model, tmp_path / "merged.onnx", prompts=torch.tensor([[5, 6, 7]]))
    heads = 4 if kind == "gpt2" else 2
    assert report.inputs[:4] == ("input_ids", "attention_mask", "position_ids", "past_key_values.0.key")
    assert report.outputs[:3] == ("logits", "present.0.key", "present.0.value")
    assert report.sizes["attention_mask"] == ("batch_size", "total_sequence_length")
    assert report.sizes["past_key_values.1.value"] == ("batch_size", heads, "past_sequence_length", 8)
    session = onnxruntime.InferenceSession(str(tmp_path / "merged.onnx"))
    present = next(one for one in session.get_outputs() if one.name == "present.1.key")
    assert present.shape == ["batch_size", heads, "total_sequence_length", 8]
    decoder = ac.OnnxDecoder(session)
    for tokens, mask in make_prompts():
        made = decoder.generate(tokens.numpy(), mask.numpy(), max_new_tokens=32)
        assert made.tolist() == generate(model, tokens, mask)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, path = make_model("llama"), tmp_path_factory.mktemp("decoder") / "model.onnx"
    ac.export_decoder(model, path, steps=2)
    return model, path


def test_rows_that_have_ended_get_padding(exported: tuple[Any, Path]) -> None:
    model, path = exported
    tokens, mask = make_prompts()[1]
    every = ac.OnnxDecoder(path).generate(tokens.numpy(), mask.numpy(), max_new_tokens=12)
    end = int(every[0, 9])
    options: dict[str, Any] = {"eos_token_id": end, "pad_token_id": 0}
    expected = model.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)
    found = ac.OnnxDecoder(path).generate(tokens.numpy(), mask.numpy(), max_new_tokens=12, **options)
    assert found.tolist() == expected.tolist()


def test_several_tokens_at_once_and_one_by_one_give_the_same_logits(exported: tuple[Any, Path]) -> None:
    model, path = exported
    tokens = make_prompts()[0][0]
    decoding = ac.OnnxDecoder(path).start()
    parts = [decoding.feed(part.numpy()) for part in (tokens[:, :1], tokens[:, 1:4], tokens[:, 4:5], tokens[:, 5:])]
    expected = model(tokens).logits.detach().numpy()
    numpy.testing.assert_allclose(numpy.concatenate(parts, 1), expected, rtol=1e-4, atol=1e-5)


def test_a_choice_may_be_drawn(exported: tuple[Any, Path]) -> None:
    tokens = make_prompts()[0][0].numpy()
    made = ac.OnnxDecoder(exported[1]).generate(
        tokens, max_new_tokens=3, choose=lambda logits: numpy.full(len(logits), 11)
    )
    assert made[0, -3:].tolist() == [11, 11, 11]


def test_wrong_tokens_are_refused(exported: tuple[Any, Path]) -> None:
    decoder = ac.OnnxDecoder(exported[1])
    with pytest.raises(ConfigError, match=r"expected \[batch, tokens\]"):
        decoder.start().feed(numpy.array([1, 2]))
    with pytest.raises(ConfigError, match="has shape \\[1, 3\\], expected that of the tokens"):
        decoder.start().feed(numpy.array([[1, 2]]), numpy.ones((1, 3)))
    decoding = decoder.start()
    decoding.feed(numpy.array([[1, 2]]))
    with pytest.raises(ConfigError, match="2 rows, expected 1"):
        decoding.feed(numpy.array([[1], [2]]))
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        decoder.generate(numpy.array([[1, 2]]), max_new_tokens=0)
    with pytest.raises(ConfigError, match="has no adapters"):
        decoder.start("task")


def test_a_file_without_a_cache_is_refused(tmp_path: Path) -> None:
    ac.export_onnx(nn.Linear(3, 2), tmp_path / "linear.onnx", (torch.randn(2, 3),))
    with pytest.raises(ConfigError, match=r"inputs are input, expected input_ids and past_key_values\.0\.key"):
        ac.OnnxDecoder(tmp_path / "linear.onnx")
    with pytest.raises(ConfigError, match="no cache"):
        write_genai_config(make_model("llama"), tmp_path / "linear.onnx")


def test_models_with_another_cache_are_refused(tmp_path: Path) -> None:
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=2)
    )
    with pytest.raises(ExportError, match="export it without a cache"):
        ac.export_decoder(mamba, tmp_path / "a.onnx")
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ExportError, match="an encoder and a decoder"):
        ac.export_decoder(t5, tmp_path / "a.onnx")
    with pytest.raises(ExportError, match="expected a causal language model of transformers"):
        ac.export_decoder(nn.Linear(3, 2), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_options_that_cannot_work_are_refused(tmp_path: Path) -> None:
    model, path = make_model("llama"), tmp_path / "a.onnx"
    with pytest.raises(ConfigError, match=r"expected token ids \[batch, length\]"):
        ac.export_decoder(model, path, prompts=torch.randn(2, 3))
    with pytest.raises(ConfigError, match="fewer than the 64 positions"):
        ac.export_decoder(model, path, prompts=torch.ones(1, 64, dtype=torch.long))
    with pytest.raises(ConfigError, match="expected zero or more tokens"):
        ac.export_decoder(model, path, steps=-1)
    with pytest.raises(ConfigError, match="bfloat16"):
        ac.export_decoder(make_model("llama").bfloat16(), path)
    with pytest.raises(ConfigError, match="expected an AdaptedModel"):
        ac.export_decoder(model, path, adapters="runtime")


def test_a_folder_for_genai(exported: tuple[Any, Path]) -> None:
    model, path = exported
    described = json.loads(write_genai_config(model, path).read_text())["model"]
    names = {value.name for value in onnxruntime.InferenceSession(str(path)).get_inputs()}
    decoder = described["decoder"]
    assert {decoder["inputs"][kind] % 1 for kind in ("past_key_names", "past_value_names")} < names
    assert {decoder["inputs"][kind] for kind in ("input_ids", "attention_mask", "position_ids")} < names
    assert (decoder["filename"], decoder["head_size"], decoder["num_key_value_heads"]) == ("model.onnx", 8, 2)
    assert (described["context_length"], described["vocab_size"]) == (64, VOCABULARY)


class OwnDecoder(nn.Module):
    """Takes and returns its cache as a tuple of pairs of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def forward(self, ids: Tensor, past: tuple[tuple[Tensor, Tensor], ...]) -> Any:
        x, present = self.embed(ids), []
        for layer, (old_k, old_v) in zip(self.layers, past, strict=True):
            q, new_k, new_v = layer(x).chunk(3, -1)
            k, v = torch.cat([old_k, new_k], 1), torch.cat([old_v, new_v], 1)
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            present.append((k, v))
        return self.head(x), tuple(present)


def test_a_cache_of_ones_own_is_exported_by_export_onnx(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OwnDecoder().eval()
    past = tuple((torch.randn(2, 4, 16), torch.randn(2, 4, 16)) for _ in range(2))
    ac.export_onnx(model, tmp_path / "own.onnx", (torch.randint(0, 50, (2, 3)), past))
    session = onnxruntime.InferenceSession(str(tmp_path / "own.onnx"))
    names = [value.name for value in session.get_inputs()][1:]
    tokens, cache = torch.randint(0, 50, (1, 7)), [numpy.zeros((1, 0, 16), numpy.float32)] * 4
    for step in range(7):
        feeds = {"ids": tokens[:, step : step + 1].numpy(), **dict(zip(names, cache, strict=True))}
        logits, *cache = session.run(None, feeds)
    empty = tuple((torch.zeros(1, 0, 16), torch.zeros(1, 0, 16)) for _ in range(2))
    expected = model(tokens, empty)[0].detach()
    torch.testing.assert_close(torch.from_numpy(logits[:, -1]), expected[:, -1], rtol=1e-4, atol=1e-5)
