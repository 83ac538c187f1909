"""What training changes besides adapters goes with them: a base file and an adapter give what ``fold()`` gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError, ConfigError, ExportError
from adapter_compiler.onnx.exporting.unused_tensors import find_unused_tensors
from adapter_compiler.onnx.translation.exportable import prepare_call
from tests.serving.models import Array, Served, adapt, call, draw_inputs, expect


def assert_same(found: Array, expected: Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["one", "two"])
def test_moved_statistics_and_heads_are_served(name: str, served: Served) -> None:
    session, x = served.open(), draw_inputs(7)
    session.load(name, served.file(name))
    assert_same(call(session, x, name), expect(served.adapted[name], x))
    with torch.no_grad():
        assert_same(call(session, x), served.model(x)["logits"])
    statistics = served.adapted["one"].module.get_buffer("norm.running_mean")
    assert not torch.equal(statistics, served.model.get_buffer("norm.running_mean"))


def test_inactive_adapters_have_values_of_their_own(served: Served, tmp_path: Path) -> None:
    adapted, x = adapt(served.model, seed=1, train=True), draw_inputs()
    expected = {"default": expect(adapted, x)}
    adapted.add_adapter("other")
    adapted.use("other")
    adapted.train()
    adapted(5 * draw_inputs(16) - 2)
    adapted.eval()
    expected["other"] = expect(adapted, x)
    session = served.open()
    for name, wanted in expected.items():
        session.load(name, ac.save_onnx_adapter(adapted, tmp_path / f"{name}.onnx_adapter", name=name))
        assert_same(call(session, x, name), wanted)


class Counted(nn.Module):
    """Its counter of calls in training scales what it returns; nothing reads the other buffers."""

    steps: Tensor
    unread: Tensor
    unread_counter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("steps", torch.tensor(1))
        self.register_buffer("unread", torch.ones(3))
        self.register_buffer("unread_counter", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            self.unread_counter += 1
            self.unread += 1
        y: Tensor = self.inner(x) * self.steps
        return y


def adapt_counted() -> ac.AdaptedModel:
    torch.manual_seed(0)
    config = ac.AdapterConfig(rank=2, trainable=("other.*",), sites=("inner",))
    return ac.compile_with_adapters(Counted().eval(), (torch.ones(3, 4),), config=config)


def test_what_cannot_be_an_input_belongs_to_the_base(tmp_path: Path) -> None:
    """Integers are no inputs with defaults that train; an adapter with another value of one does not fit."""
    report = ac.export_onnx(adapt_counted(), tmp_path / "base.onnx", (torch.ones(3, 4),), adapters="runtime")
    session, trained = ac.OnnxAdapters(report.path), adapt_counted()
    session.load("a", ac.save_onnx_adapter(trained, tmp_path / "a.onnx_adapter"))
    trained.module.get_buffer("unread").fill_(7)
    trained.module.get_buffer("unread_counter").fill_(7)
    with torch.no_grad():
        trained.module.get_parameter("other.weight").fill_(7)
    session.load("a", ac.save_onnx_adapter(trained, tmp_path / "a.onnx_adapter"))
    trained.train()(torch.ones(3, 4))
    trained.eval()
    with pytest.raises(CheckpointError, match=r"another base model than base\.onnx: steps has other values"):
        session.load("a", ac.save_onnx_adapter(trained, tmp_path / "a.onnx_adapter"))


def test_tensors_that_no_output_depends_on() -> None:
    exporter, call = prepare_call(Counted().eval(), (torch.ones(3, 4),), None, merged=False)
    tensors = [*dict(exporter.module.named_parameters()), *dict(exporter.module.named_buffers())]
    unread = {"other.weight", "other.bias", "unread", "unread_counter"}
    assert find_unused_tensors(exporter, call, tensors) == unread
    assert find_unused_tensors(exporter, call, unread) == unread


class Scaled(nn.Module):
    """With a scalar buffer, as quantizers have, and a scalar parameter, as CLIP has."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.logit_scale = nn.Linear(4, 4), nn.Parameter(torch.tensor(2.0))
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) * self.scale * self.logit_scale.exp()
        return y


def adapt_scaled(*trainable: str) -> ac.AdaptedModel:
    torch.manual_seed(0)
    config = ac.AdapterConfig(rank=2, sites=("inner",), trainable=trainable)
    return ac.compile_with_adapters(Scaled().eval(), (torch.ones(3, 4),), config=config)


def test_scalars_belong_to_the_base(tmp_path: Path) -> None:
    report = ac.export_onnx(adapt_scaled(), tmp_path / "base.onnx", (torch.ones(3, 4),), adapters="runtime")
    session, trained = ac.OnnxAdapters(report.path), adapt_scaled()
    with torch.no_grad():
        for parameter in trained.trainable_parameters():
            parameter.normal_(0, 0.3)
    session.load("a", ac.save_onnx_adapter(trained, tmp_path / "a.onnx_adapter"))
    x = draw_inputs()[:, :4]
    assert_same(session.run({"x": x.numpy()}, adapter="a")["output"], trained(x).detach())
    trained.module.get_buffer("scale").fill_(7)
    with pytest.raises(CheckpointError, match=r"another base model than base\.onnx: scale has other values"):
        session.load("a", ac.save_onnx_adapter(trained, tmp_path / "a.onnx_adapter"))


def test_a_scalar_that_trains_is_refused_by_name(tmp_path: Path) -> None:
    adapted = adapt_scaled("logit_scale")
    with pytest.raises(ConfigError, match="logit_scale is a scalar that trains fully"):
        ac.export_onnx(adapted, tmp_path / "base.onnx", (torch.ones(3, 4),), adapters="runtime")
    with pytest.raises(ConfigError, match="logit_scale is a scalar that trains fully"):
        ac.save_onnx_adapter(adapted, tmp_path / "a.onnx_adapter")
    assert list(tmp_path.iterdir()) == []


class Homonym(nn.Module):
    """An input is called like a parameter that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.x = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) * self.x
        return y


def test_what_the_file_cannot_take_is_refused_by_name(tmp_path: Path) -> None:
    x, config = torch.ones(3, 4), ac.AdapterConfig(rank=2, sites=("inner",), trainable=("x",))
    adapted = ac.compile_with_adapters(Homonym().eval(), (x,), config=config)
    with pytest.raises(ExportError, match="x changes in training, but the exported file cannot take it as an input"):
        ac.export_onnx(adapted, tmp_path / "base.onnx", (x,), adapters="runtime")
    assert list(tmp_path.iterdir()) == []
