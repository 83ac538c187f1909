"""The other run times themselves, where they can be installed: peft, mlx-lm, diffusers, onnxruntime."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.exchange.convert import convert_adapters
from adapter_compiler.saving.folders.write_peft import save_peft_adapters
from tests.adapter_compiler.saving.exchange.models import KINDS, Case, perturb

Cases = Callable[..., Case]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["peft", "lora", "vllm"])
def test_peft(to: str, kind: str, tmp_path: Path, cases: Cases) -> None:
    case = cases(kind)
    if (kind == "dora" and to != "peft") or (kind == "trained head" and to == "vllm"):
        with pytest.raises(ConfigError, match=r"has no DoRA|was trained fully"):
            convert_adapters(case.folder, tmp_path / "out", to=to)
        return
    convert_adapters(case.folder, tmp_path / "out", to=to)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(case.base), tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(case.tokens).logits, case.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "mixed ranks", "dora"])
def test_mlx_lm(kind: str, tmp_path: Path, cases: Cases) -> None:
    case = cases(kind)
    loaded = load_in_mlx(case, convert_adapters(case.folder, tmp_path / "out", to="mlx", base=case.base_folder))
    torch.testing.assert_close(run_in_mlx(loaded, case.tokens), case.expected(), rtol=1e-5, atol=1e-5)


def test_mlx_lm_with_embeddings_and_a_head(tmp_path: Path, cases: Cases) -> None:
    case = cases("mixed ranks", exclude=(), sites=("*",))
    loaded = load_in_mlx(case, convert_adapters(case.folder, tmp_path / "out", to="mlx", base=case.base_folder))
    torch.testing.assert_close(run_in_mlx(loaded, case.tokens), case.expected(), rtol=1e-5, atol=1e-5)


def load_in_mlx(case: Case, folder: Path) -> Any:
    """The base in mlx-lm, with adapters that its own loader reads."""
    core = pytest.importorskip("mlx.core", reason="mlx is not installed")
    utils = pytest.importorskip("mlx_lm.tuner.utils", reason="mlx-lm is not installed")
    llama = pytest.importorskip("mlx_lm.models.llama", reason="mlx-lm is not installed")
    core.set_default_device(core.cpu)
    config = case.base.config.to_dict()
    model = llama.Model(llama.ModelArgs.from_dict({**config, "rope_theta": config["rope_parameters"]["rope_theta"]}))
    model.load_weights([(name, core.array(value.numpy())) for name, value in case.base.state_dict().items()])
    loaded = utils.load_adapters(model, str(folder))
    loaded.eval()
    return loaded


def run_in_mlx(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    core = pytest.importorskip("mlx.core", reason="mlx is not installed")
    return torch.tensor(model(core.array(tokens.numpy())).tolist())


class Served:
    """A base file with inputs for adapters, and an adapter of the same model in a folder."""

    def __init__(self, folder: Path, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 5)).eval()
        self.x = torch.randn(7, 6)
        self.adapted = ac.compile_with_adapters(self.net, (self.x,), config=ac.AdapterConfig(rank=4, **options))
        self.base = folder / "served.onnx"
        ac.export_onnx(self.adapted, self.base, (self.x,), adapters="runtime")
        perturb(self.adapted, prune=not options)
        self.adapted.train()(torch.randn(16, 6))  # moves the statistics
        self.adapted.eval().save(folder / "adapters")
        self.folder = folder / "adapters"

    def run(self, path: Path) -> torch.Tensor:
        served = ac.OnnxAdapters(self.base)
        served.load("one", path)
        (output,) = served.run({served.session.get_inputs()[0].name: self.x.numpy()}, adapter="one").values()
        return torch.from_numpy(output)


@pytest.mark.parametrize("trainable", [(), ("3.bias",)])
def test_onnxruntime(trainable: tuple[str, ...], tmp_path: Path) -> None:
    served = Served(tmp_path, **({"trainable": trainable} if trainable else {}))
    path = convert_adapters(served.folder, tmp_path / "task.onnx_adapter", to="ort", base=served.base)
    with torch.no_grad():
        torch.testing.assert_close(served.run(path), served.adapted(served.x), rtol=1e-5, atol=1e-5)


def test_onnxruntime_gets_statistics_by_way_of_a_peft_folder(tmp_path: Path) -> None:
    served = Served(tmp_path)
    save_peft_adapters(served.adapted, tmp_path / "peft")
    path = convert_adapters(tmp_path / "peft", tmp_path / "task.onnx_adapter", to="ort", base=served.base)
    loaded = peft.PeftModel.from_pretrained(served.net, tmp_path / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(served.run(path), loaded(served.x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(served.run(path), served.adapted(served.x), rtol=1e-5, atol=1e-5)


def test_onnxruntime_refuses_what_the_base_has_no_input_for(tmp_path: Path, cases: Cases) -> None:
    served, case = Served(tmp_path), cases("svd")
    with pytest.raises(ConfigError, match=r"served.onnx has no inputs for an adapter of model\.layers\.0"):
        convert_adapters(case.folder, tmp_path / "x.onnx_adapter", to="ort", base=served.base)
    ac.export_onnx(served.net, tmp_path / "plain.onnx", (served.x,))
    with pytest.raises(ConfigError, match=r"plain.onnx has no inputs for adapters"):
        convert_adapters(served.folder, tmp_path / "x.onnx_adapter", to="ort", base=tmp_path / "plain.onnx")


@pytest.mark.parametrize("kind", ["mixed", "dora"])
def test_diffusers(kind: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    size = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8,), cross_attention_dim=8, attention_head_dim=4, **size, **blocks
    ).eval()
    inputs = (torch.randn(1, 3, 8, 8), torch.tensor(3), torch.randn(1, 4, 8))
    config = ac.AdapterConfig(rank=4, kind="svd" if kind == "mixed" else "dora", exclude=("conv_in", "conv_out"))
    adapted = ac.compile_with_adapters(unet, inputs, config=config)
    perturb(adapted, prune=kind == "mixed")
    adapted.eval().save(tmp_path / "adapters")
    convert_adapters(tmp_path / "adapters", tmp_path / "out", to="diffusers", component="unet")
    loaded = copy.deepcopy(unet)
    loaded.load_lora_adapter(str(tmp_path / "out"), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        expected, base = adapted(*inputs).sample, unet(*inputs).sample
        found = loaded(*inputs).sample
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
