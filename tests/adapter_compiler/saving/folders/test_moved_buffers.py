"""Buffers that move in training outside of trained modules, such as running statistics, go along with adapters."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.exchange.convert import convert_adapters
from adapter_compiler.saving.folders.read_folder import read_saved_adapters
from adapter_compiler.saving.folders.write_peft import convert_to_peft, save_peft_adapters


class Codebook(nn.Module):
    """Counts its calls in training, and shifts by the count."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return x + 0.1 * self.count


class Constant(nn.Module):
    """Has a buffer that never moves, beside an adapted weight."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([2.0]))
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mix(x * self.scale)
        return y


LAYERS: dict[str, nn.Module] = {
    "batch norm": nn.BatchNorm1d(8),
    "batch norm without weight": nn.BatchNorm1d(8, affine=False),
    "count": Codebook(),
    "spectral norm": nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8, bias=False)),
}


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = Constant(), copy.deepcopy(layer), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x)).tanh())
        return y


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def train(net: nn.Module, mode: bool = True) -> ac.AdaptedModel:
    """Adapters with other values, and buffers that calls in training mode have moved."""
    is_computed = isinstance(net, Net) and hasattr(net.norm, "parametrizations")
    config = ac.AdapterConfig(rank=3, alpha=5, exclude=("norm*",) if is_computed else ())
    adapted = ac.compile_with_adapters(net, (X,), config=config)
    with torch.no_grad():
        for parameter in adapted.trainable_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        adapted.train(mode)
        for _ in range(5):
            adapted(3 * X + 1)
    return adapted.eval()


def assert_peft_gives_the_same(net: nn.Module, folder: Path, adapted: ac.AdaptedModel, **options: Any) -> None:
    loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(net), folder, **options).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), adapted(X), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loaded.merge_and_unload()(X), adapted(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize("layer", LAYERS)
def test_they_are_in_the_folder_that_peft_reads(layer: str, kind: str, tmp_path: Path) -> None:
    net = Net(LAYERS[layer]).eval()
    adapted = train(net)
    still = copy.deepcopy(adapted)
    still.module.load_state_dict({**still.module.state_dict(), **dict(net.named_buffers())})
    assert (adapted(X) - still(X)).abs().max() > 1e-3 or layer == "spectral norm"
    save_peft_adapters(adapted, tmp_path, kind=kind)
    assert_peft_gives_the_same(net, tmp_path, adapted)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert saved == ["norm.parametrizations.weight.0" if layer == "spectral norm" else "norm"]


@pytest.mark.parametrize("to", ["peft", "peft-adalora", "lora"])
@pytest.mark.parametrize("layer", ["batch norm", "batch norm without weight", "count"])
def test_they_are_converted_without_the_model(layer: str, to: str, tmp_path: Path) -> None:
    net = Net(LAYERS[layer]).eval()
    adapted = train(net)
    adapted.save(tmp_path / "native")
    if layer == "batch norm":
        with pytest.raises(ConfigError, match=r"does not hold norm\.weight, .* moved \(norm\) .* save_peft_adapters"):
            convert_adapters(tmp_path / "native", tmp_path / "peft", to=to)
        save_peft_adapters(adapted, tmp_path / "peft")
    else:
        convert_adapters(tmp_path / "native", tmp_path / "peft", to=to)
    for low in (False, True):
        assert_peft_gives_the_same(net, tmp_path / "peft", adapted, low_cpu_mem_usage=low)
    convert_adapters(tmp_path / "peft", tmp_path / "back", to="native")
    convert_adapters(tmp_path / "back", tmp_path / "again", to=to)
    assert_peft_gives_the_same(net, tmp_path / "again", adapted)


def test_a_file_that_does_not_say_what_moved_is_refused(tmp_path: Path) -> None:
    train(Net(nn.BatchNorm1d(8)).eval()).save(tmp_path)
    saved = read_saved_adapters(tmp_path)
    assert saved.trained is not None
    old = dataclasses.replace(saved, trained=dataclasses.replace(saved.trained, moved=None, unsaved=()))
    for one in (old, dataclasses.replace(saved, trained=None)):
        with pytest.raises(ConfigError, match=r"does not say whether (norm\.num_\w+ moved|first\.scale is)"):
            convert_to_peft(one, tmp_path / "out")


class Inner(nn.Module):
    """PEFT calls the layer that it wraps ``base_layer``, which ends with ``layer``."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.layer = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.mix(x))
        return y


def test_a_name_that_peft_would_find_in_its_own_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"module layer is to be saved whole, but PEFT takes all modules .* in mix"):
        save_peft_adapters(train(Inner().eval()), tmp_path)


@pytest.mark.parametrize("to", ["peft", "diffusers"])
def test_buffers_that_have_not_moved_are_in_no_way(to: str, tmp_path: Path) -> None:
    net = Net(nn.BatchNorm1d(8)).eval()
    adapted = train(net, mode=False)
    adapted.save(tmp_path / "native")
    assert read_saved_adapters(tmp_path / "native").replacements.keys() >= {"first.scale", "norm.running_mean"}
    folder = convert_adapters(tmp_path / "native", tmp_path / "out", to=to, component="unet")
    if to == "peft":
        assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] is None
        assert_peft_gives_the_same(net, folder, adapted)


@pytest.mark.parametrize("layer", ["batch norm", "count"])
@pytest.mark.parametrize("to", ["vllm", "diffusers"])
def test_formats_without_a_place_for_them_say_so(to: str, layer: str, tmp_path: Path) -> None:
    train(Net(LAYERS[layer]).eval()).save(tmp_path / "native")
    with pytest.raises(ConfigError, match=r"norm\.\w+ was trained fully or is a statistic that moves in training"):
        convert_adapters(tmp_path / "native", tmp_path / "out", to=to, component="unet")


def test_what_peft_has_no_place_for_is_named(tmp_path: Path) -> None:
    net = Net(nn.BatchNorm1d(8)).eval()
    adapted = train(net)
    adapted.module.get_buffer("first.scale").mul_(2)
    with pytest.raises(ConfigError, match=r"module first has the buffer first\.scale, which has moved .* first\.mix"):
        save_peft_adapters(adapted, tmp_path / "live")
    adapted.save(tmp_path / "native")
    with pytest.raises(ConfigError, match=r"module first has the buffer first\.scale, which has moved"):
        convert_adapters(tmp_path / "native", tmp_path / "out", to="peft")
    net.register_buffer("steps", torch.zeros(3))
    adapted = train(net)
    adapted.module.get_buffer("steps").add_(1)
    with pytest.raises(ConfigError, match="steps is a buffer of the model itself that has moved in training"):
        save_peft_adapters(adapted, tmp_path / "live")


def test_a_module_whose_name_ends_alike_and_has_an_adapter_is_in_the_way(tmp_path: Path) -> None:
    """PEFT takes the linear layer 10 for the batch norm 0."""
    net = nn.Sequential(nn.BatchNorm1d(8), *(nn.Identity() for _ in range(9)), nn.Linear(8, 8)).eval()
    adapted = train(net)
    adapted.save(tmp_path / "native")
    with pytest.raises(ConfigError, match=r"10 has an adapter, PEFT has one or the other"):
        save_peft_adapters(adapted, tmp_path / "live")
    with pytest.raises(ConfigError, match=r"10 has an adapter, PEFT has one or the other"):
        convert_adapters(tmp_path / "native", tmp_path / "out", to="peft")


def test_an_inactive_adapter_has_its_own_statistics(tmp_path: Path) -> None:
    adapted = train(Net(nn.BatchNorm1d(8)).eval(), mode=False)
    adapted.add_adapter("second")
    adapted.use("second")
    adapted.train()(X)
    adapted.save(tmp_path / "first", name="default")
    adapted.save(tmp_path / "second")
    for name, moved in (("first", ()), ("second", ("norm.running_mean",))):
        trained = read_saved_adapters(tmp_path / name).trained
        assert trained is not None and trained.moved is not None
        assert trained.moved[:1] == moved


@pytest.mark.parametrize("layer", ["batch norm", "count"])
def test_onnxruntime_gets_them_or_refuses(layer: str, tmp_path: Path) -> None:
    net = Net(LAYERS[layer]).eval()
    adapted = train(net, mode=False)
    ac.export_onnx(adapted, tmp_path / "base.onnx", (X,), adapters="runtime")
    adapted.train()(X)
    adapted.eval().save(tmp_path / "native")
    out = tmp_path / "one.onnx_adapter"
    if layer == "count":
        with pytest.raises(ConfigError, match=r"norm\.count has moved .* base\.onnx has another value of it"):
            convert_adapters(tmp_path / "native", out, to="ort", base=tmp_path / "base.onnx")
        return
    convert_adapters(tmp_path / "native", out, to="ort", base=tmp_path / "base.onnx")
    served = ac.OnnxAdapters(tmp_path / "base.onnx")
    served.load("one", out)
    (found,) = served.run({"x": X.numpy()}, adapter="one").values()
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), adapted(X), rtol=1e-5, atol=1e-5)
