"""Folding files equals folding in PyTorch, bit for bit, for every kind of base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError, ConfigError, ExportError
from adapter_compiler.saving.exchange.convert import convert_adapters
from adapter_compiler.saving.folding.fold_files import fold_files


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.up = nn.Linear(8, 12)
        self.norm = nn.BatchNorm1d(12)
        self.down = nn.Linear(12, 8)
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.out = nn.Linear(8, 9, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Linear(9, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.down(self.norm(self.up(self.embed(ids).mean(1))).tanh()) @ self.mix
        y: Tensor = self.head(self.out(x))
        return y


@pytest.fixture
def case(tmp_path: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model, ids = Net().eval(), torch.randint(0, 9, (4, 5))
    config = ac.AdapterConfig(rank=3, alpha=5, sites=("*",), exclude=("head.weight",), trainable=("head.*",))
    adapted = ac.compile_with_adapters(model, (ids,), config=config)
    with torch.no_grad():
        for parameter in adapted.trainable_parameters():
            parameter.normal_(0, 0.4)
    adapted.train()(ids)
    adapted.eval().save(tmp_path / "adapters")
    return {"model": model, "ids": ids, "adapted": adapted, "folder": tmp_path, "adapters": tmp_path / "adapters"}


def save_checkpoint(model: nn.Module, path: Path, *, leave_out: str = "", dtype: torch.dtype | None = None) -> None:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "out.weight"}
    state = {name: tensor for name, tensor in state.items() if not leave_out or not name.startswith(leave_out)}
    save_file(state, path, metadata={"format": "pt"})


def assert_equals_fold(found: dict[str, Tensor], adapted: ac.AdaptedModel) -> None:
    expected = adapted.fold().state_dict()
    assert {name for name in expected if name not in found} <= {"out.weight"}
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == expected[name].dtype


def test_one_safetensors_file(case: dict[str, Any]) -> None:
    base, out = case["folder"] / "base.safetensors", case["folder"] / "out.safetensors"
    save_checkpoint(case["model"], base)
    seen: list[tuple[str, int, int]] = []
    done = fold_files(base, case["adapters"], out, progress=lambda *step: seen.append(step))
    assert_equals_fold(load_file(out), case["adapted"])
    assert {"up.weight", "down.weight", "mix", "embed.weight", "head.weight", "norm.running_mean"} <= set(done)
    assert len(seen) == len(done) == seen[-1][1] == seen[-1][2]


def test_a_head_that_the_base_lacks_is_added(case: dict[str, Any]) -> None:
    base, out = case["folder"] / "base.safetensors", case["folder"] / "out.safetensors"
    save_checkpoint(case["model"], base, leave_out="head.")
    fold_files(base, case["adapters"], out)
    found = load_file(out)
    assert {"head.weight", "head.bias"} <= found.keys()
    assert_equals_fold(found, case["adapted"])


def test_a_sharded_folder(case: dict[str, Any]) -> None:
    base, out = case["folder"] / "base", case["folder"] / "out"
    base.mkdir()
    state = {n: t.contiguous() for n, t in case["model"].state_dict().items() if n not in ("out.weight", "head.bias")}
    names = sorted(state)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, chosen in shards.items():
        save_file({name: state[name] for name in chosen}, base / file, metadata={"format": "pt"})
    weight_map = {name: file for file, chosen in shards.items() for name in chosen}
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text("{}")
    fold_files(base, case["adapters"], out)
    written = json.loads((out / "model.safetensors.index.json").read_text())
    found = {name: load_file(out / file)[name] for name, file in written["weight_map"].items()}
    assert_equals_fold(found, case["adapted"])
    assert "head.bias" in found
    assert written["metadata"]["total_size"] == size + 12
    assert (out / "config.json").read_text() == "{}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = nn.Linear(6, 4).to(dtype), torch.randn(2, 6, dtype=dtype)
    adapted = ac.compile_with_adapters(model, (x,), config=ac.AdapterConfig(rank=2, alpha=3))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.4)
    adapted.save(tmp_path / "adapters")
    save_file(dict(model.state_dict()), tmp_path / "base.safetensors")
    fold_files(tmp_path / "base.safetensors", tmp_path / "adapters", tmp_path / "out.safetensors")
    assert_equals_fold(load_file(tmp_path / "out.safetensors"), adapted)


def export_base(case: dict[str, Any], path: Path) -> None:
    report = ac.export_onnx(case["model"], path, (case["ids"],))
    assert report.adapters == "none"


def read_initializers(path: Path) -> dict[str, Any]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_an_onnx_file(case: dict[str, Any]) -> None:
    base, out = case["folder"] / "base.onnx", case["folder"] / "out.onnx"
    export_base(case, base)
    fold_files(base, case["adapters"], out)
    assert_onnx_equals_fold(out, case)
    with pytest.raises(ExportError, match="already has adapters merged"):
        fold_files(out, case["adapters"], case["folder"] / "twice.onnx")


def test_an_onnx_file_with_external_data(case: dict[str, Any]) -> None:
    plain, base, out = (case["folder"] / name for name in ("plain.onnx", "base.onnx", "out.onnx"))
    export_base(case, plain)
    before = read_initializers(plain)
    onnx.save(onnx.load(plain), base, save_as_external_data=True, location="base.onnx.data", size_threshold=100)
    fold_files(base, case["adapters"], out)
    assert (case["folder"] / "out.onnx.data").exists()
    assert_onnx_equals_fold(out, case)
    after = read_initializers(base)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def assert_onnx_equals_fold(out: Path, case: dict[str, Any]) -> None:
    stored, expected = read_initializers(out), case["adapted"].fold().eval()
    for name, tensor in expected.state_dict().items():
        if name in stored:
            assert np.array_equal(stored[name], tensor.numpy()), name
    assert {"up.weight", "down.weight", "mix", "head.weight"} <= stored.keys()
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    found = session.run(None, {"ids": case["ids"].numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected(case["ids"]).detach(), rtol=1e-4, atol=1e-5)


def rename_a_weight(path: Path) -> None:
    state = load_file(path)
    state["encoder.up.weight"] = state.pop("up.weight")
    save_file(state, path)


def grow_a_weight(path: Path) -> None:
    state = load_file(path)
    state["down.weight"] = torch.zeros(8, 13)
    save_file(state, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def garble(path: Path) -> None:
    path.write_bytes(b"\x10" + b"\x00" * 7 + b"this is no json!")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename_a_weight, "no weight up.weight"),
        (grow_a_weight, r"down.weight has shape \[8, 13\]"),
        (cut, "its header describes"),
        (garble, "cannot be read as a safetensors file"),
        (Path.unlink, "does not exist"),
    ],
)
def test_a_wrong_base_is_refused_and_nothing_is_written(damage: Any, message: str, case: dict[str, Any]) -> None:
    base, out = case["folder"] / "base.safetensors", case["folder"] / "new" / "out.safetensors"
    save_checkpoint(case["model"], base)
    damage(base)
    with pytest.raises(CheckpointError, match=message):
        fold_files(base, case["adapters"], out)
    assert not out.exists()
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


@pytest.mark.parametrize("length", [0, 10, 300, -7])
def test_cut_adapters_are_refused_and_nothing_is_written(length: int, case: dict[str, Any]) -> None:
    base, file = case["folder"] / "base.safetensors", case["adapters"] / "adapters.safetensors"
    save_checkpoint(case["model"], base)
    file.write_bytes(file.read_bytes()[:length])
    message = r"adapters.safetensors cannot be read as a safetensors file: .*, expected .*; fetch or save it again"
    with pytest.raises(CheckpointError, match=message):
        fold_files(base, case["adapters"], case["folder"] / "new" / "out.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert_adapters(case["adapters"], case["folder"] / "new", to="peft-lora")
    assert not (case["folder"] / "new").exists()


def test_a_wrong_onnx_base_is_refused_and_nothing_is_written(case: dict[str, Any]) -> None:
    base, out = case["folder"] / "base.onnx", case["folder"] / "new" / "out.onnx"
    export_base(case, base)
    whole = base.read_bytes()
    for length in (0, 10, 300, -7):
        base.write_bytes(whole[:length])
        with pytest.raises(ExportError, match=r"base.onnx cannot be read as an ONNX model: .*; expected a whole file"):
            fold_files(base, case["adapters"], out)
    ac.export_onnx(nn.Linear(8, 12).eval(), base, (torch.randn(2, 8),))
    with pytest.raises(CheckpointError, match=r"base.onnx: weight mix, which .*belong to another model"):
        fold_files(base, case["adapters"], out)
    case["model"].down = nn.Linear(12, 8, bias=False)
    case["model"].up = nn.Linear(8, 12)
    case["model"].head = nn.Linear(9, 4)
    export_base(case, base)
    with pytest.raises(CheckpointError, match=r"head.bias has shape \[4\] .*the saved one \[3\]"):
        fold_files(base, case["adapters"], out)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_wrong_places_are_refused(case: dict[str, Any], tmp_path: Path) -> None:
    base = case["folder"] / "base.safetensors"
    save_checkpoint(case["model"], base)
    before = base.read_bytes()
    with pytest.raises(ConfigError, match="is the base itself"):
        fold_files(base, case["adapters"], base)
    with pytest.raises(CheckpointError, match="holds no adapters"):
        fold_files(base, tmp_path, case["folder"] / "out.safetensors")
    assert base.read_bytes() == before
    plain = case["folder"] / "plain.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), plain)
    with pytest.raises(ExportError, match="was not exported by adapter-compiler"):
        fold_files(plain, case["adapters"], case["folder"] / "out.onnx")


def test_a_full_disk_leaves_nothing(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = case["folder"] / "base.safetensors", case["folder"] / "new" / "out.safetensors"
    save_checkpoint(case["model"], base)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adapter_compiler.saving.folding.fold_safetensors._overwrite", fail)
    with pytest.raises(OSError, match="No space left"):
        fold_files(base, case["adapters"], out)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_weight_is_folded_by_rows(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(190, 1003, bias=False).to(dtype), torch.randn(2, 190, dtype=dtype)
    adapted = ac.compile_with_adapters(model, (x,), config=ac.AdapterConfig(rank=7, alpha=3))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.4)
    adapted.save(tmp_path / "adapters")
    save_file(dict(model.state_dict()), tmp_path / "base.safetensors")
    monkeypatch.setattr("adapter_compiler.saving.folders.merge_blocks._VALUES_AT_A_TIME", 190 * 64)
    fold_files(tmp_path / "base.safetensors", tmp_path / "adapters", tmp_path / "out.safetensors")
    assert_equals_fold(load_file(tmp_path / "out.safetensors"), adapted)
