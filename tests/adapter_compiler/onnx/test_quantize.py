"""Int8 copies: what they cost is measured on random or on given inputs, and too much is refused with advice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import adapter_compiler as ac
from adapter_compiler.cli.main import app
from adapter_compiler.errors import ConfigError, ExportError, VerificationError
from adapter_compiler.onnx import verify_onnx
from adapter_compiler.onnx.quantization.formats import _without_prints
from adapter_compiler.onnx.quantize import quantize_onnx
from adapter_compiler.saving.folding.fold_files import fold_files
from adapter_compiler.saving.onnx_files.metadata import read_metadata, set_metadata


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    ac.export_onnx(model, tmp_path / "model.onnx", (torch.randn(5, 6),))
    return tmp_path / "model.onnx"


def test_the_loss_is_measured_on_random_values(source: Path, tmp_path: Path) -> None:
    report = quantize_onnx(source, tmp_path / "int8.onnx", draws=5)
    assert "MatMulInteger" in {node.op_type for node in onnx.load(report.path).graph.node}
    assert {error.case for error in report.errors} == {f"random values {i}" for i in range(1, 6)}
    assert 0 < report.median_rel_error <= report.max_rel_error < 0.1
    assert report.bytes_after == report.path.stat().st_size


def test_every_output_feature_has_a_scale_of_its_own(tmp_path: Path) -> None:
    """With one scale for all, small rows would be rounded to nothing."""
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(4, 6) * torch.tensor([[1.0], [1e-2], [1e-3], [1e-4]]))  # type: ignore[operator]
        model[0].bias.zero_()  # type: ignore[operator]
    ac.export_onnx(model, tmp_path / "model.onnx", (torch.randn(5, 6),))
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    tensors = onnx.load(tmp_path / "int8.onnx").graph.initializer
    assert [list(tensor.dims) for tensor in tensors if tensor.name.endswith("_scale")] == [[4]]


def test_given_inputs_are_used_instead(source: Path, tmp_path: Path) -> None:
    name = onnx.load(source).graph.input[0].name
    samples: list[Any] = [{name: torch.randn(5, 6)}, {name: np.ones((5, 6), np.float32)}, (torch.ones(3, 6), "label")]
    report = quantize_onnx(source, tmp_path / "int8.onnx", samples=samples)
    assert [error.case for error in report.errors] == [f"batch {i} of the samples" for i in (1, 2, 3)]
    assert (report.samples[0].rows, report.samples[0].reference) == (13, "model.onnx")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"nothing": torch.ones(5, 6)}], "first of the samples has no .*, it has nothing; expected a value for each"),
        ([], "is empty, expected at least one batch"),
    ],
)
def test_wrong_inputs_are_refused(samples: list[Mapping[str, Any]], message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize_onnx(source, tmp_path / "int8.onnx", samples=samples)
    assert not (tmp_path / "int8.onnx").exists()


def test_too_large_a_loss_is_refused_with_advice(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        VerificationError, match=r"in int8, output output differs on random values \d by \d\.\d%"
    ) as refused:
        quantize_onnx(source, tmp_path / "int8.onnx", largest_rel_error=1e-4)
    text = str(refused.value)
    assert "the median over random values in the example's ranges is" in text
    assert "no file was written; compare on real inputs (quantize_onnx(..., samples=...))" in text
    with pytest.raises(VerificationError, match="no file was written; raise largest_rel_error, or keep"):
        quantize_onnx(source, tmp_path / "x.onnx", samples=[torch.ones(5, 6)], largest_rel_error=1e-9)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


KINDS = ("int8", "int8-static", "int4", "float16")


class Net(nn.Module):
    """A convolution, a norm whose statistics move, products of two and of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.mix, self.head = nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.conv(x)).relu().flatten(2)
        logits: torch.Tensor = self.head(self.mix(hidden).tanh().mean(1))
        return logits


X = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def make_adapted(seed: int = 0) -> ac.AdaptedModel:
    torch.manual_seed(0)
    config = ac.AdapterConfig(rank=2, sites="auto")
    adapted = ac.compile_with_adapters(Net().eval(), (X[:4],), config=config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


def run_file(path: Path, feeds: Mapping[str, Any]) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, dict(feeds))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_computes_in_few_bits_and_is_close_to_pytorch(kind: str, tmp_path: Path) -> None:
    adapted = make_adapted()
    ac.export_onnx(adapted, tmp_path / "m.onnx", (X[:4],))
    report = quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", kind=kind, samples=[X])
    operators = {node.op_type for node in onnx.load(report.path).graph.node}
    expected = {"int8": "MatMulInteger", "int8-static": "DequantizeLinear", "int4": "MatMulNBits", "float16": "Cast"}
    assert expected[kind] in operators
    exact = adapted.fold().eval()(X).detach()
    found = run_file(report.path, {"x": X.numpy()})
    largest = float((found - exact).abs().max() / exact.abs().max())
    assert 0 < largest < {"float16": 0.005}.get(kind, 0.2)
    assert report.max_rel_error == pytest.approx(largest, rel=1e-3)
    assert (report.kind, report.samples[0].rows) == (kind, 20)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_stay_inputs_and_can_be_switched(kind: str, tmp_path: Path) -> None:
    """The copy takes the adapters of two runs, and is as close to each of them as to the base model."""
    adapted, other = make_adapted(), make_adapted(seed=5)
    ac.export_onnx(adapted, tmp_path / "m.onnx", (X[:4],), adapters="runtime")
    files = {"one": adapted, "two": other}
    for name, model in files.items():
        ac.save_onnx_adapter(model, tmp_path / f"{name}.onnx_adapter")
    paths = [tmp_path / f"{name}.onnx_adapter" for name in files]
    report = quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", kind=kind, samples=[X], adapters=paths)
    assert [one.subject for one in report.samples] == ["base model", *(f"adapter {path.name}" for path in paths)]
    assert report.bytes_after < report.bytes_before
    served = ac.OnnxAdapters(report.path)
    bound = 0.01 if kind == "float16" else 0.25
    with adapted.disable_adapters():
        exact = adapted(X).detach()
    assert (
        float((torch.from_numpy(served.run({"x": X.numpy()})["output"]) - exact).abs().max())
        < bound * exact.abs().max()
    )
    for (name, model), path in zip(files.items(), paths, strict=True):
        served.load(name, path)
        exact = model.fold().eval()(X).detach()
        found = torch.from_numpy(served.run({"x": X.numpy()}, adapter=name)["output"])
        assert float((found - exact).abs().max()) < bound * float(exact.abs().max())


def test_a_quantized_file_is_verified_within_what_was_accepted(tmp_path: Path) -> None:
    adapted = make_adapted()
    ac.export_onnx(adapted, tmp_path / "m.onnx", (X[:4],), adapters="runtime")
    quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", kind="int4", samples=[X])
    checked = verify_onnx(tmp_path / "q.onnx", adapted, (X[:4],), samples=[X])
    assert [one.subject for one in checked.samples] == ["base model", "adapter active"]
    merged = adapted.fold()
    with torch.no_grad():
        merged.get_parameter("head.bias").add_(9.0)
    with pytest.raises(VerificationError, match=r"the int4 file differs by .*, accepted when .* was 50.0%"):
        verify_onnx(tmp_path / "q.onnx", merged, (X[:4],))


class Steep(nn.Module):
    """Values beyond float16's range between two weights, as in some transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        large = self.first(x) * 2e6
        result: torch.Tensor = self.second(large / (1e6 + large.abs()))
        return result


def test_what_float16_cannot_hold_stays_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    ac.export_onnx(Steep(), tmp_path / "m.onnx", (x,))
    report = quantize_onnx(tmp_path / "m.onnx", tmp_path / "h.onnx", kind="float16", samples=[x])
    assert report.kept and "all MatMul" not in report.kept
    assert report.max_rel_error < 0.01
    types = [tensor.data_type for tensor in onnx.load(report.path).graph.initializer if len(tensor.dims) == 2]
    assert onnx.TensorProto.FLOAT16 in types
    assert "in float32, because float16 is not exact enough" in list(report.describe())[-1]


def make_merged(path: Path, size: float) -> ac.AdaptedModel:
    """A merged file whose updates have about ``size`` of the weights' norms, and that of the head all of it."""
    torch.manual_seed(0)
    adapted = ac.compile_with_adapters(Net().eval(), (X[:4],), config=ac.AdapterConfig(rank=2))
    with torch.no_grad():
        for name, parameter in adapted.adapters.named_parameters():
            if "lam" not in name:
                parameter.normal_(0, 0.3)
    parameters = adapted.adapters
    with torch.no_grad():
        for adapter in adapted.plan:
            factors = parameters.parameters_of(adapter)
            factors["lam"].fill_(1.0)
            delta = adapter.scale * factors["P"] @ factors["Q"]
            wanted = 1.0 if adapter.site.weight == "head.weight" else size
            factors["lam"].mul_(wanted * adapted.base_weight(adapter.site.weight).norm() / delta.norm())
    ac.export_onnx(adapted, path, (X[:4],))
    return adapted


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_measured_against_the_update(kind: str, tmp_path: Path) -> None:
    """The error of each weight is that of reading the file by ONNX's own reference, and ΔW that of the model."""
    adapted = make_merged(tmp_path / "m.onnx", 1.0)
    report = quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", kind=kind, samples=[X])
    assert {one.weight for one in report.rounding} == {"mix.weight", "head.weight"}
    merged = dict(adapted.fold().named_parameters())
    bits = {"int8": 7, "int8-static": 7, "int4": 4, "float16": 11}[kind]
    for one in report.rounding:
        weight, base = (w.detach().double() for w in (merged[one.weight], adapted.base_weight(one.weight)))
        assert one.update == pytest.approx(float((weight - base).norm()), rel=1e-6)
        # An error of step / √12 for each value, where step ≤ range / (2^bits - 2).
        largest = float(weight.abs().max()) * 2 / (2**bits - 2) / 12**0.5 * weight.numel() ** 0.5
        assert 0 < one.error < 1.2 * largest
        assert one.error > 0.02 * largest


def test_the_error_of_a_weight_is_that_of_its_products(tmp_path: Path) -> None:
    """A linear model gives W back for the identity: what onnxruntime computes with is what was measured."""
    torch.manual_seed(0)
    eye = torch.eye(64)
    adapted = ac.compile_with_adapters(nn.Sequential(nn.Linear(64, 48, bias=False)), (eye,))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.5)
    ac.export_onnx(adapted, tmp_path / "m.onnx", (eye,))
    report = quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", kind="int4", samples=[eye])
    found = run_file(report.path, {"input": eye.numpy()})
    weight = next(adapted.fold().parameters()).detach()
    assert report.rounding[0].error == pytest.approx(float((found.t() - weight).norm()), rel=1e-4)


def test_an_update_that_rounding_swallows_is_refused_or_kept_beside(tmp_path: Path) -> None:
    adapted = make_merged(tmp_path / "m.onnx", 0.01)
    message = (
        r"int4 would swallow the updates of 1 of 2 weights: .* is above 1 for mix.weight \(\d+.*no file was written"
    )
    with pytest.raises(VerificationError, match=message):
        quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", kind="int4", samples=[X])
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    accepted = quantize_onnx(tmp_path / "m.onnx", tmp_path / "a.onnx", kind="int4", samples=[X], largest_ratio=100)
    assert not any(one.is_residual for one in accepted.rounding)
    report = quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", kind="int4", samples=[X], residual=adapted)
    assert {one.weight: one.is_residual for one in report.rounding} == {"mix.weight": True, "head.weight": False}
    assert [value.name for value in onnx.load(report.path).graph.input] == ["x"]
    assert "updates kept in float beside 1 weights: mix.weight" in list(report.describe())


def test_a_residual_update_is_exact(tmp_path: Path) -> None:
    """A linear model: the file's W is the rounded base weight, plus ΔW in float."""
    torch.manual_seed(0)
    eye = torch.eye(64)
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    adapted = ac.compile_with_adapters(model, (eye,), config=ac.AdapterConfig(rank=2))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.02)
    ac.export_onnx(model, tmp_path / "base.onnx", (eye,))
    ac.export_onnx(adapted, tmp_path / "m.onnx", (eye,))
    quantize_onnx(tmp_path / "base.onnx", tmp_path / "b.onnx", kind="int4", samples=[eye])
    quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", kind="int4", samples=[eye], residual=adapted)
    base, found = (run_file(tmp_path / name, {"input": eye.numpy()}) for name in ("b.onnx", "q.onnx"))
    update = next(adapted.fold().parameters()).detach() - next(model.parameters()).detach()
    torch.testing.assert_close(found - base, update.t(), rtol=0, atol=1e-6)


def test_ranges_are_those_of_all_batches(tmp_path: Path) -> None:
    """The last one has another size and the largest values."""
    ac.export_onnx(make_adapted(), tmp_path / "m.onnx", (X[:4],))
    batches = [X[:4], 4 * X[8:]]
    report = quantize_onnx(
        tmp_path / "m.onnx", tmp_path / "q.onnx", kind="int8-static", samples=batches, largest_rel_error=9.0
    )
    assert report.ranges == "MinMax"
    scales = [onnx.numpy_helper.to_array(t) for t in onnx.load(report.path).graph.initializer if t.name == "x_scale"]
    assert 256 * float(scales[0]) >= float(batches[1].max() - batches[1].min())


def test_percentiles_are_of_equal_batches(tmp_path: Path) -> None:
    """One value a thousand times as large as the others: the range without it is the better one for the rest."""
    x = X.repeat(150, 1, 1, 1)
    x[0, 0, 0, 0] = 1000.0
    ac.export_onnx(make_adapted(), tmp_path / "m.onnx", (X[:4],))
    batches = [x[600:1200], x[1200:1300], x[1200:1800], x[1800:2400], x[:600]]
    report = quantize_onnx(
        tmp_path / "m.onnx", tmp_path / "q.onnx", kind="int8-static", samples=batches, largest_rel_error=9.0
    )
    assert report.ranges == "Percentile of 4 of 5 batches"


def test_only_the_calibration_does_not_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from onnxruntime.quantization import calibrate

    ac.export_onnx(make_adapted(), tmp_path / "m.onnx", (X[:4],))
    capsys.readouterr()
    quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", kind="int8-static", samples=[X])
    assert capsys.readouterr().out == ""
    with _without_prints():
        print("of another thread")  # noqa: T201
        calibrate.print("of the calibration")
    assert capsys.readouterr().out == "of another thread\n"
    assert "print" not in vars(calibrate)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_too_large_for_a_file_are_beside_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ac.export_onnx(make_adapted(), tmp_path / "m.onnx", (X[:4],))
    one = quantize_onnx(tmp_path / "m.onnx", tmp_path / "one.onnx", kind=kind, samples=[X])
    monkeypatch.setattr("adapter_compiler.saving.onnx_files.large_weights.LARGEST", 2000)
    ac.export_onnx(make_adapted(), tmp_path / "large.onnx", (X[:4],))
    two = quantize_onnx(tmp_path / "large.onnx", tmp_path / "two" / "q.onnx", kind=kind, samples=[X])
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["q.onnx", "q.onnx.data"]
    assert two.bytes_after == sum(path.stat().st_size for path in (tmp_path / "two").iterdir())
    assert torch.equal(run_file(one.path, {"x": X.numpy()}), run_file(two.path, {"x": X.numpy()}))
    assert [found.error for found in one.rounding] == [found.error for found in two.rounding]


def test_updates_that_were_folded_into_a_file_are_measured_too(tmp_path: Path) -> None:
    adapted = make_merged(tmp_path / "m.onnx", 1.0)
    adapted.save(tmp_path / "adapters")
    torch.manual_seed(0)
    ac.export_onnx(Net().eval(), tmp_path / "base.onnx", (X[:4],))
    fold_files(tmp_path / "base.onnx", tmp_path / "adapters", tmp_path / "folded.onnx")
    reports = [
        quantize_onnx(tmp_path / f"{name}.onnx", tmp_path / f"{name}_q.onnx", samples=[X]) for name in ("m", "folded")
    ]
    exported, folded = ({one.weight: one for one in report.rounding} for report in reports)
    assert exported.keys() == folded.keys() == {"mix.weight", "head.weight"}
    for name, one in exported.items():
        assert folded[name].update == pytest.approx(one.update, rel=1e-5)
        assert folded[name].error == pytest.approx(one.error, rel=1e-2)


def test_a_quantized_file_takes_no_adapters_into_its_weights(tmp_path: Path) -> None:
    adapted = make_adapted()
    adapted.save(tmp_path / "adapters")
    ac.export_onnx(adapted, tmp_path / "m.onnx", (X[:4],), adapters="runtime")
    quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", kind="int4", samples=[X])
    with pytest.raises(ExportError, match=r"q.onnx is a quantized copy, .* fold into that one, and quantize"):
        fold_files(tmp_path / "q.onnx", tmp_path / "adapters", tmp_path / "f.onnx")
    assert not (tmp_path / "f.onnx").exists()


def test_weights_that_are_not_whole_in_the_file_are_named(tmp_path: Path) -> None:
    make_merged(tmp_path / "m.onnx", 1.0)
    model = onnx.load(tmp_path / "m.onnx")
    description = read_metadata(model, "m.onnx")
    del description["weights"]["mix.weight"]
    set_metadata(model, description)
    onnx.save(model, tmp_path / "m.onnx")
    report = quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", samples=[X])
    assert report.unknown == ("mix.weight",) and [one.weight for one in report.rounding] == ["head.weight"]
    assert "rounding not measured for 1 weights with an update: mix.weight" in list(report.describe())
    del description["updates"]  # as in files of earlier versions
    set_metadata(model, description)
    onnx.save(model, tmp_path / "old.onnx")
    report = quantize_onnx(tmp_path / "old.onnx", tmp_path / "o.onnx", samples=[X])
    assert report.unknown == ("head.weight", "mix.weight") and not report.rounding


def test_a_metric_has_the_same_names_everywhere(source: Path, tmp_path: Path) -> None:
    for odd in (1, 2, 3):
        numbers = iter(range(1, 9))

        def metric(
            outputs: Mapping[str, torch.Tensor], batch: Any, odd: int = odd, numbers: Iterator[int] = numbers
        ) -> dict[str, float]:
            return {"a": 1.0, **({"b": 2.0} if next(numbers) == odd else {})}

        with pytest.raises(ConfigError, match=r"the metric gives 'b' on batch [12] of .* for one side or batch only"):
            quantize_onnx(source, tmp_path / "q.onnx", samples=[torch.ones(5, 6)] * 2, metric=metric)
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_valid_and_are_not_quantized_again(kind: str, tmp_path: Path) -> None:
    ac.export_onnx(make_adapted(), tmp_path / "m.onnx", (X[:4],))
    report = quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", kind=kind, samples=[X])
    onnx.checker.check_model(str(report.path))
    with pytest.raises(
        ExportError, match=rf"q.onnx is quantized to {kind} already, expected a file in float; give the"
    ):
        quantize_onnx(report.path, tmp_path / "r.onnx", samples=[X])


def test_options_are_checked(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kind='int3'.*: expected one of 'int8', 'int8-static', 'int4', 'float16'"):
        quantize_onnx(source, tmp_path / "q.onnx", kind="int3")
    with pytest.raises(ConfigError, match=r"kind='int8-static'.* has no samples, expected real inputs"):
        quantize_onnx(source, tmp_path / "q.onnx", kind="int8-static")
    adapted = make_adapted()
    ac.export_onnx(adapted, tmp_path / "m.onnx", (X[:4],), adapters="runtime")
    with pytest.raises(ConfigError, match=r"m.onnx takes adapters, and the ranges of activations depend on them"):
        quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", kind="int8-static", samples=[X])
    ac.save_onnx_adapter(adapted, tmp_path / "a.onnx_adapter")
    with pytest.raises(ConfigError, match=r"which is no input of model.onnx; expected an adapter for this file"):
        quantize_onnx(source, tmp_path / "q.onnx", adapters=[tmp_path / "a.onnx_adapter"])


def test_the_command_quantizes(source: Path, tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text("import torch\ndef load():\n    yield torch.ones(3, 6)\n")
    options = ["--kind", "int4", "--data", f"{tmp_path}/data.py:load"]
    result = CliRunner().invoke(app, ["quantize", str(source), "-o", str(tmp_path / "q.onnx"), *options])
    assert result.exit_code == 0, result.output
    assert "int4" in result.output
    assert "on 3 samples in 1 batches, beside model.onnx" in result.output
