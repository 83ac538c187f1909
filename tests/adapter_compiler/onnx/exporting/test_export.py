"""Exports are compared here with onnxruntime once more, independently of the library's own check."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError, ExportError, VerificationError
from adapter_compiler.onnx.translation.fallbacks import find_strategies
from adapter_compiler.onnx.verify_model import verify_onnx
from adapter_compiler.saving.folding.fold_files import fold_files


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def adapt(model: nn.Module, *args: Any, **kwargs: Any) -> ac.AdaptedModel:
    adapted = ac.compile_with_adapters(model, args, kwargs, config=ac.AdapterConfig(rank=2, alpha=2))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.5)
    return adapted


def run_onnx(path: Path, **feeds: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    return dict(zip([value.name for value in session.get_outputs()], found, strict=True))


def assert_close(found: np.ndarray[Any, Any], expected: Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(found), expected.detach(), rtol=1e-4, atol=1e-5)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(8, 3)

    def forward(self, features: Tensor, *, shift: Tensor | None = None) -> Tensor:
        y: Tensor = self.down(self.drop(self.norm(self.up(features))).relu())
        return y if shift is None else y + shift


def test_an_adapted_model_is_folded_exported_and_right_at_other_sizes(tmp_path: Path) -> None:
    x = torch.randn(5, 4)
    adapted = adapt(Mlp(), x)
    adapted(x)
    report = ac.export_onnx(adapted, tmp_path / "model.onnx", (x,))
    merged = adapted.fold().eval()
    assert adapted.training
    for batch in (5, 1, 2, 9):
        other = torch.randn(batch, 4)
        assert_close(run_onnx(report.path, features=other)["output"], merged(other))
    assert report.path == tmp_path / "model.onnx"
    assert (report.inputs, report.outputs, report.dynamic) == (("features",), ("output",), "all")
    assert report.dynamic_axes == {"features": (0,)}
    assert report.cases == ("example", "batch 6", "random values 1", "random values 2", "random values 3")
    assert len(report.errors) == 5
    assert report.strategy == "torch.export, all dimensions open"
    assert 0 <= report.max_abs_error < 1e-4
    assert report.fold is not None
    assert report.fold.rounding_error.keys() == {"up.weight", "down.weight"}
    onnx.checker.check_model(str(report.path))
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_a_plain_module_exports_without_being_changed(tmp_path: Path) -> None:
    model, x = Mlp(), torch.randn(5, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = ac.export_onnx(model, tmp_path / "model.onnx", (x,))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert report.fold is None
    assert_close(run_onnx(report.path, features=x)["output"], model.eval()(x))


def test_positional_and_keyword_inputs_keep_their_names(tmp_path: Path) -> None:
    model, x, shift = Mlp().eval(), torch.randn(5, 4), torch.randn(5, 3)
    report = ac.export_onnx(model, tmp_path / "model.onnx", (x,), {"shift": shift})
    assert report.inputs == ("features", "shift")
    assert_close(run_onnx(report.path, features=x, shift=shift)["output"], model(x, shift=shift))


def test_an_example_of_one_row_stays_open(tmp_path: Path) -> None:
    model, x = Mlp().eval(), torch.randn(1, 4)
    report = ac.export_onnx(model, tmp_path / "model.onnx", (x,))
    assert report.dynamic_axes == {"features": (0,)}
    for batch in (1, 2, 7):
        other = torch.randn(batch, 4)
        assert_close(run_onnx(report.path, features=other)["output"], model(other))


class Reader(nn.Module):
    """Embedding, attention over a padded sequence, and mean pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor | None]:
        q, k, v = self.qkv(self.embed(input_ids)).chunk(3, -1)
        mask = attention_mask[:, None, :].bool()
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        weights = attention_mask.unsqueeze(-1).to(x.dtype)
        logits = self.out((x * weights).sum(1) / weights.sum(1))
        return {"logits": logits, "loss": None, "label": logits.argmax(-1)}


def test_tokens_with_open_batch_and_length(tmp_path: Path) -> None:
    ids = torch.randint(0, 13, (3, 6))
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    adapted = adapt(Reader().eval(), input_ids=ids, attention_mask=mask)
    report = ac.export_onnx(adapted, tmp_path / "model.onnx", example_kwargs={"attention_mask": mask, "input_ids": ids})
    assert set(report.inputs) == {"input_ids", "attention_mask"}
    assert report.dynamic_axes == {"input_ids": (0, 1), "attention_mask": (0, 1)}
    assert report.outputs == ("logits", "label")
    assert report.cases[:3] == ("example", "batch 4", "dimension 1 of size 7")
    merged = adapted.fold().eval()
    for batch, length in [(3, 6), (5, 6), (2, 11), (4, 3)]:
        ids = torch.randint(0, 13, (batch, length))
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[0, 2:] = 0
        found, expected = run_onnx(report.path, input_ids=ids, attention_mask=mask), merged(ids, mask)
        assert_close(found["logits"], expected["logits"])
        assert found["label"].dtype == np.int64
        assert np.array_equal(found["label"], expected["label"].numpy())


@dataclasses.dataclass
class Result:
    scores: Tensor
    hidden: tuple[Tensor, Tensor]
    loss: Tensor | None = None


torch.export.register_dataclass(Result, serialized_type_name="adapter_compiler_tests.Result")


@dataclasses.dataclass
class Unregistered:
    """torch does not know it as a container."""

    scores: Tensor
    inner: Result
    label: str = "a"


class Structured(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        if self.kind == "tuple":
            return y, y * 2
        if self.kind == "twice":
            return {"a": y, "b": y}
        result = Result(scores=y, hidden=(y * 2, y * 3))
        return result if self.kind == "dataclass" else Unregistered(scores=y * 4, inner=result)


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [
        ("tuple", {"output.0": 1, "output.1": 2}),
        ("twice", {"a": 1}),
        ("dataclass", {"scores": 1, "hidden.0": 2, "hidden.1": 3}),
        ("unregistered", {"scores": 4, "inner.scores": 1, "inner.hidden.0": 2, "inner.hidden.1": 3}),
    ],
)
def test_outputs_are_named_after_what_the_model_returns(kind: str, outputs: dict[str, int], tmp_path: Path) -> None:
    model, x = Structured(kind).eval(), torch.randn(3, 4)
    report = ac.export_onnx(model, tmp_path / "model.onnx", (x,))
    assert report.outputs == tuple(outputs)
    found = run_onnx(report.path, x=x)
    assert found.keys() == outputs.keys()
    for name, factor in outputs.items():
        assert_close(found[name], model.inner(x) * factor)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, batch: dict[str, Any], scale: float = 1.0) -> Tensor:
        y: Tensor = self.inner(batch["x"]) * scale + batch["more"][0]
        return y


def test_nested_inputs_are_flattened_and_constants_baked_in(tmp_path: Path) -> None:
    model, x, more = Nested().eval(), torch.randn(3, 4), torch.randn(3, 4)
    batch: dict[str, Any] = {"x": x, "more": [more]}
    report = ac.export_onnx(model, tmp_path / "model.onnx", (batch, 2.0))
    assert set(report.inputs) == {"batch.x", "batch.more.0"}
    found = run_onnx(report.path, **{"batch.x": x, "batch.more.0": more})
    assert_close(found["output"], model(batch, 2.0))


def test_initializers_are_named_as_in_the_state_dict(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(13, 8)
            self.inner = nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.inner(self.embed(ids))
            return y

    model = Named().eval()
    report = ac.export_onnx(model, tmp_path / "model.onnx", (torch.randint(0, 13, (3, 6)),))
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(report.path).graph.initializer}
    state = model.state_dict()
    assert {"embed.weight", "inner.bias"} <= stored.keys()
    kept = stored.keys() & state.keys()
    assert all(np.array_equal(stored[name], state[name].numpy()) for name in kept)
    assert not [name for name in stored if name.startswith("module.")]


class Homonyms(nn.Module):
    """An input, an output and a part of a dictionary are called like weights."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.output = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 2))

    def forward(self, numbers: Tensor) -> Tensor:
        return (numbers.unsqueeze(2) * self.numbers).sum(1) @ self.output


@pytest.mark.parametrize("strategy", ["torch.export", "TorchScript"])
def test_a_weight_called_like_an_input_or_output_is_kept_apart(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, numbers = Homonyms().eval(), torch.randn(5, 3)
    adapted = ac.compile_with_adapters(model, (numbers,), config=ac.AdapterConfig(rank=2, alpha=2))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_()
    monkeypatch.setattr(
        "adapter_compiler.onnx.exporting.export.find_strategies",
        lambda module: [s for s in find_strategies(module) if s.name.startswith(strategy)],
    )
    base = ac.export_onnx(model, tmp_path / "base.onnx", (numbers,))
    assert run_onnx(base.path, numbers=numbers).keys() == {"output"}
    adapted.save(tmp_path / "adapters")
    fold_files(base.path, tmp_path / "adapters", tmp_path / "merged.onnx")
    found = run_onnx(tmp_path / "merged.onnx", numbers=numbers)
    assert_close(found["output"], adapted.eval()(numbers))


class Draws(nn.Module):
    """Every way of drawing that exports, in eval mode; what it draws is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.inner(x)
        return {
            "dropout": F.dropout(y, 0.3, training=True),
            "normal": y + torch.randn_like(y) + torch.randn(x.shape[0], 4),
            "uniform": y * torch.rand(4) + torch.rand_like(x),
            "chosen": torch.bernoulli(y.sigmoid()),
            "order": y[:, torch.randperm(4)],
        }


def test_a_model_that_draws_random_numbers_is_verified_on_draws_that_are_fixed(tmp_path: Path) -> None:
    model, x = Draws().eval(), torch.randn(64, 4)
    report = ac.export_onnx(model, tmp_path / "model.onnx", (x,))
    assert report.drawing >= 7
    assert "draw random numbers" in str(report)
    assert report.max_abs_error < 1e-5
    session = onnxruntime.InferenceSession(report.path)
    names = [output.name for output in session.get_outputs()]
    feeds = {"x": x.repeat(100, 1).numpy()}
    one, other = (dict(zip(names, session.run(names, feeds), strict=True)) for _ in range(2))
    y = model.inner(x).repeat(100, 1)
    assert not np.array_equal(one["normal"], other["normal"])
    assert abs(one["normal"].mean() - float(y.detach().mean())) < 0.1
    assert abs((one["dropout"] == 0).mean() - 0.3) < 0.02
    assert set(np.unique(one["chosen"])) == {0.0, 1.0}
    verify_onnx(report.path, model, (x,))
    with torch.no_grad():
        model.inner.bias.add_(0.1)
    with pytest.raises(VerificationError, match="differs from PyTorch"):
        verify_onnx(report.path, model, (x,))


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A file that must survive whatever fails, alone in its folder."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old one")
    yield path
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_other_numbers_are_refused(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = dict.fromkeys((torch.float32, torch.float64), (0.0, -1.0))
    monkeypatch.setattr("adapter_compiler.onnx.verification.verify.TOLERANCES", none)
    with pytest.raises(VerificationError, match="output output on example: onnxruntime differs from PyTorch by"):
        ac.export_onnx(Mlp().eval(), old, (torch.randn(3, 4),))


def change_weights(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.ndim == 2:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values * 1.001, tensor.name))


def drop_a_node(model: onnx.ModelProto) -> None:
    del model.graph.node[0]


def rename_an_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "NoSuchOperator"


@pytest.mark.parametrize(
    ("corrupt", "error", "message"),
    [
        (change_weights, VerificationError, "differs from PyTorch"),
        (drop_a_node, ExportError, "onnx.checker refuses|does not load"),
        (rename_an_operator, ExportError, "onnx.checker refuses|does not load"),
    ],
)
def test_a_corrupted_draft_is_refused(
    corrupt: Any, error: type[Exception], message: str, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft is damaged after the exporter has saved it and before it is checked."""
    check = onnx.checker.check_model

    def damage_then_check(path: str) -> None:
        model = onnx.load(path)
        corrupt(model)
        onnx.save(model, path)
        check(path)

    monkeypatch.setattr("adapter_compiler.onnx.translation.fallbacks.onnx.checker.check_model", damage_then_check)
    with pytest.raises(error, match=message):
        ac.export_onnx(Mlp().eval(), old, (torch.randn(3, 4),))


def test_a_batch_that_was_frozen_by_mistake_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is right on the example alone counts only as one of fixed shapes."""
    check = onnx.checker.check_model

    def freeze_then_check(path: str) -> None:
        model = onnx.load(path)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
        onnx.save(model, path)
        check(path)

    monkeypatch.setattr("adapter_compiler.onnx.translation.fallbacks.onnx.checker.check_model", freeze_then_check)
    report = ac.export_onnx(Mlp().eval(), tmp_path / "model.onnx", (torch.randn(3, 4),))
    assert "onnxruntime fails on batch 4" in str(report.attempts[0].reason)
    assert [attempt.strategy for attempt in report.attempts] == [
        "torch.export, all dimensions open",
        "torch.export, batch open",
        "torch.export, fixed shapes",
    ]
    assert report.dynamic == "none"
    assert report.dynamic_axes == {"features": ()}


def test_no_file_is_left_where_there_was_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_compiler.onnx.verification.verify.TOLERANCES", {torch.float32: (0.0, -1.0)})
    with pytest.raises(VerificationError):
        ac.export_onnx(Mlp().eval(), tmp_path / "model.onnx", (torch.randn(3, 4),))
    assert list(tmp_path.iterdir()) == []


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        nn.init.ones_(self.inner.weight)  # drawn weights may decide alike for all inputs that are tried
        nn.init.zeros_(self.inner.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y * 2 if y.sum() > 0 else y


class Untranslatable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.special.bessel_j0(x)
        return y


class Silent(nn.Module):
    def forward(self, x: Tensor) -> str:
        return f"{x.dim()} dimensions"


class Undefined(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log() - x.log()


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Decides(), ExportError, "not exported: Decides|not exported: .*does not depend on tensor values"),
        (Untranslatable(), ExportError, "torch.onnx has no translation for this model: .*bessel_j0"),
        (Undefined(), VerificationError, "PyTorch gives inf or nan only"),
        (Silent(), ExportError, "Silent returns no tensor that a file could give; expected a tensor"),
    ],
    ids=["control flow", "operator", "nan", "no tensor"],
)
def test_what_cannot_be_exported_is_refused(model: nn.Module, error: type[Exception], message: str, old: Path) -> None:
    with pytest.raises(error, match=message):
        ac.export_onnx(model, old, (-torch.ones(3, 4),))


def test_an_example_is_needed(old: Path) -> None:
    with pytest.raises(ConfigError, match="give example_args or example_kwargs"):
        ac.export_onnx(Mlp(), old)


@pytest.mark.parametrize("adapters", ["merged", "runtime"])
def test_weights_are_in_the_file_or_beside_it_if_they_are_large(
    adapters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 32)
    adapted = adapt(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval(), x)
    first = ac.export_onnx(adapted, tmp_path / "small.onnx", (x,), adapters=adapters)
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]
    monkeypatch.setattr("adapter_compiler.saving.onnx_files.large_weights.LARGEST", 100)
    second = ac.export_onnx(adapted, tmp_path / "large" / "model.onnx", (x,), adapters=adapters)
    assert sorted(path.name for path in (tmp_path / "large").iterdir()) == ["model.onnx", "model.onnx.data"]
    assert first.errors == second.errors
    small, large = (onnx.load(report.path) for report in (first, second))
    assert [t.SerializeToString() for t in small.graph.initializer] == [
        t.SerializeToString() for t in large.graph.initializer
    ]
    outputs = [run_onnx(report.path, input=x) for report in (first, second)]
    assert all(np.array_equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
