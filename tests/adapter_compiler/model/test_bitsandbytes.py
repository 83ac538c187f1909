"""bitsandbytes' own layers with PEFT's LoRA compute and train the same as our adapters over the same codes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError
from passes.quantize.packed_weights import PackedWeight, find_packed_weights

bnb = pytest.importorskip("bitsandbytes")

X = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(8, (6,), generator=torch.Generator().manual_seed(1))
RANK, ALPHA = 3, 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.down(self.up(x).tanh()))
        return y


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def quantize_by_hand(net: Net, kind: str) -> Net:
    """The model with bitsandbytes' layers in place of ``up`` and ``down``, as transformers would load it."""
    quantized = copy.deepcopy(net)
    for name in ("up", "down"):
        layer = getattr(net, name)
        sizes, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
        if kind == "nf4":
            made = bnb.nn.Linear4bit(*sizes, bias=has_bias, quant_type="nf4", compute_dtype=torch.float32)
            values = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        else:
            made = bnb.nn.Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False, threshold=0.0)
            values = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        made.weight, made.bias = values, copy.deepcopy(layer.bias)
        setattr(quantized, name, made.to("cpu"))
    return quantized.requires_grad_(False)


def values_of(adapted: ac.AdaptedModel, name: str) -> Tensor:
    weight = adapted.base_weight(name)
    assert isinstance(weight, PackedWeight)
    return weight.unpack()


def compile_lora(model: nn.Module, wrapped: Any, **options: Any) -> ac.AdaptedModel:
    """Adapters with λ = 1 and the same A and B as PEFT's, so that P and Q train as LoRA does."""
    config = ac.AdapterConfig(rank=RANK, alpha=ALPHA, sites=("up", "down"), **options)
    adapted = ac.compile_with_adapters(model, (X,), config=config)
    with torch.no_grad():
        for name in ("up", "down"):
            theirs = wrapped.get_submodule(f"base_model.model.{name}")
            mine = adapted.adapters.get_submodule(f"{name}.weight")
            mine.get_parameter("lam").fill_(1)
            mine.get_parameter("P").copy_(theirs.lora_B["default"].weight)
            mine.get_parameter("Q").copy_(theirs.lora_A["default"].weight)
    return adapted


@pytest.fixture
def wrapped(net: Net) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["up", "down"], init_lora_weights=False)
    return peft.get_peft_model(quantize_by_hand(net, "nf4"), config)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_codes_are_those_of_their_layers(net: Net, kind: str) -> None:
    config = ac.AdapterConfig(rank=RANK, sites=("up", "down"), quantize=kind)
    adapted = ac.compile_with_adapters(net, (X,), config=config)
    adopted = ac.compile_with_adapters(quantize_by_hand(net, kind), (X,), config=ac.AdapterConfig(rank=RANK))
    for name in ("up.weight", "down.weight"):
        assert torch.equal(values_of(adapted, name), values_of(adopted, name))
    if kind == "int8":
        weight = adapted.base_weight("up.weight")
        assert isinstance(weight, PackedWeight)
        theirs = bnb.functional.int8_vectorwise_dequant(*weight.packed.tensors().values())
        torch.testing.assert_close(weight.unpack(), theirs)
    else:
        for name in ("up", "down"):
            codes: Any = quantize_by_hand(net, kind).get_parameter(f"{name}.weight")
            theirs = bnb.functional.dequantize_4bit(codes, codes.quant_state)
            assert torch.equal(values_of(adapted, f"{name}.weight"), theirs)


@pytest.mark.parametrize("options", [{}, {"fused": False}], ids=["fused", "unfused"])
@pytest.mark.parametrize("source", ["ours", "theirs"])
def test_training_is_that_of_peft_on_their_layers(net: Net, wrapped: Any, source: str, options: dict[str, Any]) -> None:
    """Once from a plain model that we quantize, and once from a model with quantized layers."""
    if source == "ours":
        adapted = compile_lora(net, wrapped, quantize="nf4", **options)
    else:
        adapted = compile_lora(quantize_by_hand(net, "nf4"), wrapped, **options)
    theirs = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    factors = [p for name, p in adapted.adapters.named_parameters() if not name.endswith("lam")]
    mine = torch.optim.AdamW(factors, lr=1e-2)
    for _ in range(8):
        losses = []
        for model, optimizer in ((wrapped, theirs), (adapted, mine)):
            loss = torch.nn.functional.cross_entropy(model(X), LABELS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] < 1.5
    for name in ("up", "down"):
        layer = wrapped.get_submodule(f"base_model.model.{name}")
        adapter_parameters = adapted.adapters.get_submodule(f"{name}.weight")
        for key, factor in (("P", layer.lora_B), ("Q", layer.lora_A)):
            torch.testing.assert_close(
                adapter_parameters.get_parameter(key), factor["default"].weight, rtol=1e-4, atol=1e-5
            )
    torch.testing.assert_close(adapted(X), wrapped(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapted.fold()(X), wrapped(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("inplace", [False, True])
def test_their_layers_are_adapted_captured_and_folded(net: Net, kind: str, *, inplace: bool) -> None:
    model = quantize_by_hand(net, kind)
    seen: list[str] = []
    model.up.register_forward_hook(lambda *_: seen.append("up"))
    expected = model(X)
    codes = model.get_parameter("up.weight").data_ptr()
    adapted = ac.compile_with_adapters(model, (X,), config=ac.AdapterConfig(rank=RANK, inplace=inplace))
    assert {site.name for site in adapted.sites} == {"up.weight", "down.weight", "head.weight"}
    assert find_packed_weights(adapted.module).keys() == {"up.weight", "down.weight"}
    packed = adapted.base_weight("up.weight")
    assert isinstance(packed, PackedWeight)
    assert packed.packed.tensors()["codes"].data_ptr() == codes
    seen.clear()
    torch.testing.assert_close(adapted(X), expected, rtol=1e-4, atol=1e-4)
    assert seen == ["up"]
    assert isinstance(model.up, bnb.nn.Linear4bit if kind == "nf4" else bnb.nn.Linear8bitLt) != inplace
    adapted(X).square().sum().backward()
    folded = adapted.fold()
    assert type(folded.get_submodule("up")) is nn.Linear
    torch.testing.assert_close(folded(X), adapted(X), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_loads_quantized(tmp_path: Path, bits: int) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=2, use_cache=False, **sizes)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    loading = transformers.BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=loading, device_map="cpu", dtype=torch.float32
    )
    ids = torch.randint(0, 40, (2, 9))
    expected = model(input_ids=ids).logits
    adapted = ac.compile_with_adapters(model, example_kwargs={"input_ids": ids}, config=ac.AdapterConfig(rank=RANK))
    assert len(find_packed_weights(adapted.module)) == 7
    # Their 8-bit layers round activations too, ours do not.
    torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-4, atol={4: 1e-5, 8: 5e-3}[bits])
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.3)
    expected = adapted(input_ids=ids).logits
    folded: Any = adapted.fold()
    folded.save_pretrained(tmp_path / "folded")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "folded")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert model.is_quantized


def test_layers_without_codes_are_refused() -> None:
    model = nn.Sequential(bnb.nn.Linear4bit(8, 8))
    with pytest.raises(ConfigError, match=r"layer 0 is a Linear4bit whose weight is torch\.float32, expected"):
        ac.compile_with_adapters(model, (torch.randn(2, 8),))
    layer = bnb.nn.Linear4bit(8, 8).to("cpu")
    with pytest.raises(ConfigError, match="the model itself is a Linear4bit"):
        ac.compile_with_adapters(layer, (torch.randn(2, 8),))
