"""The user's own data: what counts as a batch, what is measured on it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import adapter_compiler as ac
from adapter_compiler.cli.main import app
from adapter_compiler.errors import ConfigError, ExportError, VerificationError
from adapter_compiler.onnx import verify_onnx
from adapter_compiler.onnx.verification.compare_files import compare_on_samples

X, Y = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 4


def accuracy(outputs: Mapping[str, Tensor], batch: Any) -> Any:
    return (outputs["output"].argmax(-1) == batch[1]).float().mean()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor, flag: bool = True) -> dict[str, Tensor]:
        hidden = self.embed(ids) * mask.unsqueeze(-1)
        return {"logits": self.head(hidden.sum(1)), "hidden": hidden if flag else -hidden}


IDS, MASK = torch.arange(15).reshape(3, 5) % 9, torch.ones(3, 5)


def test_errors_and_a_metric_are_those_of_the_two_sides(model: nn.Module, tmp_path: Path) -> None:
    """The last batch is smaller, so that a mean over batches would be another number than one over rows."""
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    report = ac.export_onnx(model, tmp_path / "m.onnx", (X[:4],), samples=loader, metric=accuracy)
    (found,) = report.samples
    assert (found.batches, found.rows, found.not_given) == (3, 10, ("part 2",))
    session = onnxruntime.InferenceSession(str(report.path))
    (output,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    exact = model(X).detach()
    difference = np.abs(output - exact.numpy())
    (error,) = found.errors
    assert error.max_abs == pytest.approx(float(difference.max()), abs=3e-7)
    assert error.mean_abs == pytest.approx(float(difference.mean()), abs=1e-7)
    assert error.argmax_agreement == 1.0
    expected = float((exact.argmax(-1) == Y).double().mean())
    (one,) = found.metrics
    assert one.name == "accuracy"
    assert [one.reference, one.found] == pytest.approx([expected, expected])
    assert "on 10 samples in 3 batches, beside PyTorch:" in str(report)
    assert report.to_dict()["samples"][0]["rows"] == 10


@pytest.mark.parametrize(
    ("make", "batches"),
    [
        (lambda: [X[:3], X[3:]], 2),
        (lambda: (part for part in (X[:3], X[3:])), 2),
        (lambda: [(X, Y)], 1),
        (lambda: [([X], Y)], 1),
        (lambda: [{"input": X.numpy(), "text": "not for the model"}], 1),
        (lambda: [{"input": X.tolist()}], 1),
        (lambda: TensorDataset(X, Y), 3),
        (lambda: list(X), 3),
        (lambda: [{"input": row.tolist(), "label": 1} for row in X], 3),
    ],
)
def test_what_a_batch_may_be(make: Callable[[], Any], batches: int, model: nn.Module, tmp_path: Path) -> None:
    (found,) = ac.export_onnx(model, tmp_path / "m.onnx", (X[:4],), samples=make()).samples
    assert (found.batches, found.rows) == (batches, 10)


@pytest.mark.parametrize(
    "batch", [(IDS, MASK), [IDS, MASK, torch.zeros(3)], ((IDS, MASK), Y), ({"mask": MASK, "ids": IDS}, Y)]
)
def test_several_arguments(batch: Any, tmp_path: Path) -> None:
    example = {"mask": MASK, "ids": IDS, "flag": False}
    (found,) = ac.export_onnx(Two(), tmp_path / "m.onnx", example_kwargs=example, samples=[batch]).samples
    assert [error.output for error in found.errors] == ["logits", "hidden"]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "samples= is empty, expected at least one batch"),
        (X, r"samples= is a Tensor, expected batches: .*give a single batch as \[batch\]"),
        ([(Y, X)], r"gives input as torch.int64 of shape \[10\], the example has torch.float32 of shape \[4, 6\]"),
        ([X.double()], "gives input as torch.float64"),
        ([X, X[0]], r"batch 2 of the samples gives input as torch.float32 of shape \[6\]"),
        ([{"x": X}], "has no input, it has x; expected a value for each argument of the example"),
        ([()], r"has 0 parts, the example 1 arguments \(input\)"),
        ([X[:, :5]], r"the model itself refuses a batch of samples= with input \[10, 5\]: RuntimeError"),
        ([torch.zeros(3), torch.zeros(6)], "default_collate cannot put 2 of them together"),
    ],
)
def test_what_does_not_fit_is_refused(samples: Any, message: str, model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ac.export_onnx(model, tmp_path / "m.onnx", (X[:4],), samples=samples)
    assert list(tmp_path.iterdir()) == []


def test_metrics_that_fail_are_refused(model: nn.Module, tmp_path: Path) -> None:
    def reads_another_output(outputs: Mapping[str, Tensor], batch: Any) -> float:
        return float(outputs["logits"].mean())

    def gives_a_tensor(outputs: Mapping[str, Tensor], batch: Any) -> Tensor:
        return outputs["output"]

    def refuse(metric: Any, message: str, samples: Any = (X,)) -> None:
        with pytest.raises(ConfigError, match=message):
            ac.export_onnx(model, tmp_path / "m.onnx", (X[:4],), samples=samples, metric=metric)

    refuse(reads_another_output, "KeyError: 'logits'; .* with the keys output")
    refuse(gives_a_tensor, "gives a Tensor for gives_a_tensor on batch 1 of the samples, expected a number")
    refuse(accuracy, "metric= is given without samples=", samples=None)


def test_a_branch_that_only_real_data_takes_is_found(tmp_path: Path) -> None:
    """The example's ranges do not reach the branch, so only the samples show that it was frozen."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.mix(x)
            return mixed if float(x.abs().max()) < 1e4 else -mixed

    ac.export_onnx(Branch(), tmp_path / "m.onnx", (X,))
    with pytest.raises(ExportError, match="on batch 2 of the samples: onnxruntime differs from PyTorch"):
        ac.export_onnx(Branch(), tmp_path / "n.onnx", (X,), samples=[X, X * 1e5])
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_runtime_adapters_are_measured_alone_and_with_the_adapter(model: nn.Module, tmp_path: Path) -> None:
    adapted = ac.compile_with_adapters(model, (X,), config=ac.AdapterConfig(rank=2))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.9)
    samples = [(X, Y)]
    options: Any = {"adapters": "runtime", "metric": accuracy}
    report = ac.export_onnx(adapted, tmp_path / "m.onnx", (X[:4],), samples=samples, **options)
    base, active = report.samples
    assert (base.subject, active.subject) == ("base model", "adapter active")
    for found, module in ((base, model), (active, adapted.fold())):
        share = float((module(X).argmax(-1) == Y).float().mean())
        assert (found.metrics[0].reference, found.metrics[0].found) == pytest.approx((share, share))
    checked = verify_onnx(report.path, adapted, (X[:4],), samples=samples, metric=accuracy)
    assert [one.subject for one in checked.samples] == ["base model", "adapter active"]


def test_files_are_compared_with_each_other(model: nn.Module, tmp_path: Path) -> None:
    ac.export_onnx(model, tmp_path / "a.onnx", (X[:4],))
    with torch.no_grad():
        next(model.parameters())[0, 0] += 0.5
    ac.export_onnx(model, tmp_path / "b.onnx", (X[:4],))
    assert compare_on_samples(tmp_path / "a.onnx", tmp_path / "a.onnx", [X]).errors[0].max_abs == 0
    with pytest.raises(VerificationError, match="batch 1 of the samples"):
        compare_on_samples(tmp_path / "a.onnx", tmp_path / "b.onnx", [X])


def test_a_size_that_the_file_does_not_leave_open(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.mix(x)
            return mixed if len(x) == 4 else mixed + len(x) // 7 * torch.ones(len(x), 6).cumsum(0)

    def batches() -> Iterator[Tensor]:
        yield from (X[:4], X[4:8])

    report = ac.export_onnx(Fixed(), tmp_path / "m.onnx", (X[:4],), samples=batches())
    assert report.samples[0].batches == 2


CODE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4)).eval(), (torch.randn(5, 6),), {}

def data():
    yield torch.ones(3, 6), torch.zeros(3)

def mean(outputs, batch):
    return outputs["output"].mean() + batch[1].sum()
"""


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_line_takes_data_and_a_metric(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(CODE)
    code, file = tmp_path / "code.py", tmp_path / "m.onnx"
    options = ("--data", f"{code}:data", "--metric", f"{code}:mean")
    assert "on 3 samples in 1 batches, beside PyTorch" in run("export", f"{code}:build", "-o", file, *options)
    assert "  mean: PyTorch " in run("verify", file, "--model", f"{code}:build", *options)
    assert "beside m.onnx" in run("verify", file, "--against", file, *options)
    assert "--data is given alone" in run("verify", file, "--data", f"{code}:data", code=1)
    refused = run("verify", file, "--model", f"{code}:build", "--metric", f"{code}:mean", code=1)
    assert "--metric is given without --data" in refused
