"""Adapters that were trained over quantized weights: the files say so, and folding offers both sums."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError, ConfigError
from adapter_compiler.saving.exchange.convert import convert_adapters
from adapter_compiler.saving.folders.read_folder import read_saved_adapters
from adapter_compiler.saving.folders.write_peft import save_peft_adapters
from adapter_compiler.saving.folding.fold_files import fold_files

bnb: Any = pytest.importorskip("bitsandbytes")


def make_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 96)).to(dtype).eval()


def adapt(folder: Path, kind: str = "nf4", dtype: torch.dtype = torch.float32) -> tuple[ac.AdaptedModel, Tensor]:
    """A model with random adapters over a quantized base, saved in ``folder``, with the full-precision base beside."""
    net, x = make_net(dtype), torch.randn(3, 64, dtype=dtype)
    save_file(net.state_dict(), folder / "base.safetensors")
    adapted = ac.compile_with_adapters(net, (x,), config=ac.AdapterConfig(rank=2, quantize=kind))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save(folder / "adapters")
    return adapted, x


def fold(folder: Path, adapters: str = "adapters", **options: Any) -> dict[str, Tensor]:
    out = folder / f"out {adapters} {options}.safetensors"
    fold_files(folder / "base.safetensors", folder / adapters, out, **options)
    return load_file(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_files_fold_to_the_model_that_was_trained(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapted, x = adapt(tmp_path, kind, dtype)
    expected = adapted.fold()
    found = fold(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())
    net = make_net(dtype)
    net.load_state_dict(found)
    torch.testing.assert_close(net(x), adapted(x), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_the_updates_can_be_added_to_the_given_weights(tmp_path: Path) -> None:
    adapted, _ = adapt(tmp_path)
    net = make_net()
    found = fold(tmp_path, base_weights="given")
    for adapter in adapted.plan:
        name = adapter.site.name
        update = adapter.delta(adapted.adapters.parameters_of(adapter)).detach()
        torch.testing.assert_close(found[name], net.get_parameter(name) + update, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["0.weight"], fold(tmp_path)["0.weight"])
    with pytest.raises(ConfigError, match="base_weights='full': expected one of 'trained', 'given'"):
        fold(tmp_path, base_weights="full")


@pytest.mark.parametrize("start", ["saved", "converted"])
def test_folders_of_peft_say_so_in_their_metadata(start: str, tmp_path: Path) -> None:
    adapted, _ = adapt(tmp_path)
    if start == "saved":
        save_peft_adapters(adapted, tmp_path / "peft")
    else:
        convert_adapters(tmp_path / "adapters", tmp_path / "peft", to="peft-lora")
    convert_adapters(tmp_path / "peft", tmp_path / "native", to="native")
    expected = adapted.fold().state_dict()
    for folder in ("peft", "native"):
        found = fold(tmp_path, folder)
        assert read_saved_adapters(tmp_path / folder).quantized.keys() == {"0.weight", "2.weight"}
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    with safe_open(tmp_path / "peft" / "adapter_model.safetensors", framework="pt") as file:
        notes = json.loads(file.metadata()["adapter_compiler_notes"])
    assert notes["quantized"]["0.weight"] == {"format": "nf4", "dtype": "float32"}
    assert notes["transposed"] == {"0": False, "2": False}


def test_weights_without_adapters_are_quantized_as_they_were(tmp_path: Path) -> None:
    """A model that bitsandbytes quantized itself: every layer of it, in its own format."""
    net, x = make_net(), torch.randn(3, 64)
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    quantized = nn.Sequential(
        bnb.nn.Linear4bit(64, 64, quant_type="fp4", compress_statistics=False),
        nn.Tanh(),
        bnb.nn.Linear4bit(64, 96, quant_type="nf4", compress_statistics=True),
    )
    quantized.load_state_dict(net.state_dict())
    quantized = quantized.to("cpu")
    config = ac.AdapterConfig(rank=2, sites=("0.weight",))
    adapted = ac.compile_with_adapters(quantized, (x,), config=config)
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save(tmp_path / "adapters")
    formats = read_saved_adapters(tmp_path / "adapters").quantized
    assert {name: one.name for name, one in formats.items()} == {
        "0.weight": "fp4 without double quantization",
        "2.weight": "nf4",
    }
    found = fold(tmp_path)
    for name, tensor in adapted.fold().state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_format_that_cannot_be_made_again_is_named(tmp_path: Path) -> None:
    adapt(tmp_path)
    saved = read_saved_adapters(tmp_path / "adapters")
    odd = dataclasses.replace(saved.quantized["0.weight"], name="gptq")
    changed = dataclasses.replace(saved, quantized={"0.weight": odd})
    with pytest.raises(CheckpointError, match=r"quantized to 'gptq' again, .* base_weights='given'"):
        changed.merge("0.weight", make_net().get_parameter("0.weight").detach())


def test_loading_over_other_weights_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapted, x = adapt(tmp_path)
    with caplog.at_level(logging.WARNING):
        adapted.load_adapter("same", tmp_path / "adapters")
    assert not caplog.records
    full = ac.compile_with_adapters(make_net(), (x,), config=ac.AdapterConfig(rank=2))
    with caplog.at_level(logging.WARNING):
        full.load_adapter("other", tmp_path / "adapters")
    assert "trained over 2 quantized weights (0.weight: nf4), which this model has in another format" in caplog.text
