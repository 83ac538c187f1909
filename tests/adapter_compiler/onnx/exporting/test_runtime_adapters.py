"""One file, several adapters: each equals its merged model; without one the file is the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError, ConfigError


class Net(nn.Module):
    """A plain layer, one of three dimensions, a matmul, a tied head, a chunked weight and a head that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.square = nn.Parameter(torch.randn(12, 12) / 4)
        self.packed = nn.Parameter(torch.randn(24, 12) / 4)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.up(self.embed(ids)).tanh() @ self.square
        gate, value = self.packed.chunk(2, 0)
        x = self.down((x @ gate.t()).sigmoid() * (x @ value.t()))
        return {"logits": self.head(x.mean(1)), "words": x @ self.embed.weight.t()}


def adapt(model: nn.Module, ids: Tensor, *, rank: int, seed: int) -> ac.AdaptedModel:
    names = ("embed", "up", "square", "packed", "down")
    config = ac.AdapterConfig(rank=rank, alpha=rank, sites=names, trainable=("head.*",))
    adapted = ac.compile_with_adapters(model, (ids,), config=config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.trainable_parameters():
            parameter.normal_(0, 0.4)
    return adapted


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runtime")
    model, ids = Net().eval(), torch.randint(0, 11, (3, 5))
    tasks = {"a": adapt(model, ids, rank=2, seed=1), "b": adapt(model, ids, rank=4, seed=2)}
    with torch.no_grad():
        tasks["b"].adapters.get_parameter("up.weight.lam")[1:] = 0
        tasks["b"].adapters.get_parameter("down.weight.lam").zero_()
    base = adapt(model, ids, rank=1, seed=3)
    with torch.no_grad():
        base.module.get_parameter("head.weight").copy_(model.head.weight)
        base.module.get_parameter("head.bias").copy_(model.head.bias)
    report = ac.export_onnx(base, folder / "model.onnx", (ids,), adapters="runtime")
    for name, adapted in tasks.items():
        ac.save_onnx_adapter(adapted, folder / f"{name}.onnx_adapter")
    return {"folder": folder, "model": model, "tasks": tasks, "report": report, "ids": ids}


def assert_same(found: dict[str, Any], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(torch.from_numpy(found[name]), value.detach(), rtol=1e-5, atol=1e-5)


def test_adapters_of_different_ranks_equal_their_merged_models(served: dict[str, Any]) -> None:
    session = ac.OnnxAdapters(served["folder"] / "model.onnx")
    for name in served["tasks"]:
        session.load(name, served["folder"] / f"{name}.onnx_adapter")
    assert list(session) == ["a", "b"]
    ranks = session.adapters["b"].ranks
    assert (ranks["up.weight.adapter_A"], ranks["down.weight.adapter_A"], ranks["square.adapter_A"]) == (1, 0, 4)
    for batch, length in [(3, 5), (1, 5), (4, 7)]:
        ids = torch.randint(0, 11, (batch, length))
        for name, adapted in [*served["tasks"].items(), *served["tasks"].items()]:
            assert_same(session.run({"ids": ids.numpy()}, adapter=name), adapted.fold().eval()(ids))
        assert_same(session.run({"ids": ids.numpy()}), served["model"](ids))


def test_the_report_says_what_was_checked(served: dict[str, Any]) -> None:
    report = served["report"]
    assert report.adapters == "runtime"
    assert report.fold is None
    assert {"example", "example, adapter active"} <= set(report.cases)
    assert report.max_abs_error < 1e-4


def test_products_run_on_activations(served: dict[str, Any]) -> None:
    import onnx

    model = onnx.load(served["folder"] / "model.onnx")
    adapted_weights = {name for node in model.graph.node for name in node.output if name.endswith(".adapted")}
    assert adapted_weights == {"embed.weight.adapted", "packed.adapted"}


def test_an_adapter_of_another_model_is_refused(served: dict[str, Any], tmp_path: Path) -> None:
    session = ac.OnnxAdapters(served["folder"] / "model.onnx")
    other = ac.compile_with_adapters(nn.Linear(4, 4), (torch.randn(2, 4),), config=ac.AdapterConfig(rank=1))
    with pytest.raises(CheckpointError, match="belongs to another model"):
        session.load("x", ac.save_onnx_adapter(other, tmp_path / "x.onnx_adapter"))
    assert len(session) == 0


def test_wrong_calls_are_refused(served: dict[str, Any], tmp_path: Path) -> None:
    session = ac.OnnxAdapters(served["folder"] / "model.onnx")
    with pytest.raises(ConfigError, match="no adapter 'a' is loaded"):
        session.run({"ids": served["ids"].numpy()}, adapter="a")
    with pytest.raises(ConfigError, match="needs the input ids"):
        session.run({})
    with pytest.raises(ac.AdapterCompilerError, match="io-binding"):
        session.run_with_iobinding()
    plain = ac.export_onnx(nn.Linear(4, 4), tmp_path / "plain.onnx", (torch.randn(2, 4),))
    with pytest.raises(ConfigError, match="has no inputs for adapters"):
        ac.OnnxAdapters(plain.path)
    with pytest.raises(ConfigError, match="expected an AdaptedModel"):
        ac.export_onnx(nn.Linear(4, 4), tmp_path / "x.onnx", (torch.randn(2, 4),), adapters="runtime")
