"""Adapter files that are damaged, changed, or of another base are refused when they are loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.onnx_files.adapter_manifest import append_manifest
from adapter_compiler.saving.onnx_files.adapter_tensors import read_adapter_file, to_ort_value
from adapter_compiler.saving.onnx_files.metadata import METADATA_KEY
from tests.serving.models import Classifier, Served, adapt, call, draw_inputs, expect


def refuse(served: Served, path: Path, match: str) -> None:
    session = served.open()
    session.load("kept", served.file("one"))
    before = session.adapters["kept"]
    with pytest.raises(CheckpointError, match=match):
        session.load("kept", path)
    assert session.adapters == {"kept": before}


@pytest.fixture
def flips(served: Served) -> list[int]:
    size = 8 * served.file("one").stat().st_size
    generator = np.random.default_rng(0)
    return sorted({*generator.integers(size, size=300).tolist(), *range(size - 56 * 8, size, 7), *range(0, 512, 5)})


def test_every_single_flipped_bit_is_refused(served: Served, flips: list[int], tmp_path: Path) -> None:
    """All over the file, and close together where onnxruntime's header and the manifest's end are."""
    data = bytearray(served.file("one").read_bytes())
    assert len(flips) > 400
    for bit in flips:
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "flipped.onnx_adapter").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"flipped\.onnx_adapter"):
            read_adapter_file(tmp_path / "flipped.onnx_adapter")
        data[bit // 8] ^= 1 << bit % 8
    (tmp_path / "flipped.onnx_adapter").write_bytes(data)
    assert read_adapter_file(tmp_path / "flipped.onnx_adapter").tensors.keys()


def test_cut_and_extended_files_are_refused(served: Served, tmp_path: Path) -> None:
    data, path = served.file("one").read_bytes(), tmp_path / "other.onnx_adapter"
    for content in (b"", data[:10], data[: len(data) // 2], data[:-1], data + b"\0", data + data):
        path.write_bytes(content)
        refuse(served, path, r"other\.onnx_adapter: (this file does not end as|its checksum is another one)")
    refuse(served, tmp_path / "none.onnx_adapter", "does not exist")
    refuse(served, tmp_path, "regular file")


def test_a_file_of_onnxruntime_alone_is_refused(served: Served, tmp_path: Path) -> None:
    adapter = onnxruntime.AdapterFormat.read_adapter(str(served.file("one")))
    adapter.export_adapter(str(tmp_path / "plain.onnx_adapter"))
    refuse(served, tmp_path / "plain.onnx_adapter", "does not end as save_onnx_adapter writes it")


def test_onnxruntime_itself_loads_the_files(served: Served) -> None:
    adapter, options, x = onnxruntime.LoraAdapter(), onnxruntime.RunOptions(), draw_inputs()
    adapter.Load(str(served.file("two")))
    options.add_active_adapter(adapter)
    session = onnxruntime.InferenceSession(str(served.base))
    found = session.run(["logits"], {"x": x.numpy()}, options)[0]
    torch.testing.assert_close(torch.from_numpy(found), expect(served.adapted["two"], x), rtol=1e-4, atol=1e-5)


def rewrite(served: Served, path: Path, changed: Mapping[str, torch.Tensor | None]) -> Path:
    """The first adapter with other tensors, or without some, and a right checksum."""
    file = read_adapter_file(served.file("one"))
    tensors = {name: tensor for name, tensor in {**file.tensors, **changed}.items() if tensor is not None}
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: to_ort_value(tensor) for name, tensor in tensors.items()})
    adapter.export_adapter(str(path))
    append_manifest(path, file.base)
    return path


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"up.weight.adapter_A": torch.zeros(6, 2).double()}, r"adapter_A is a tensor\(double\), base.onnx expects a"),
        (
            {"head.bias": torch.zeros(3).half()},
            r"head.bias is a tensor\(float16\), base.onnx expects a tensor\(float\)",
        ),
        ({"up.weight.adapter_A": torch.zeros(5, 2)}, r"has shape \[5, 2\], base.onnx expects \[6, 'up.weight.rank'\]"),
        ({"up.weight.adapter_A": torch.zeros(6, 3)}, "adapter_A has rank 3 but up.weight.adapter_B has 2"),
        ({"up.weight.adapter_A": torch.zeros(12)}, r"has shape \[12\], base.onnx expects"),
        ({"norm.running_mean": torch.zeros(8, 1)}, r"norm.running_mean has shape \[8, 1\]"),
        ({"norm.running_mean": None}, "1 inputs differ .* norm.running_mean is in base.onnx only"),
        ({"more": torch.zeros(1)}, "1 inputs differ .* more is in the adapter only"),
    ],
)
def test_dtypes_shapes_and_names_are_compared(
    changed: Mapping[str, torch.Tensor | None], match: str, served: Served, tmp_path: Path
) -> None:
    refuse(served, rewrite(served, tmp_path / "other.onnx_adapter", changed), match)


def test_an_adapter_of_another_base_is_refused_unless_asked_for(served: Served, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = adapt(Classifier(), seed=3)
    path = ac.save_onnx_adapter(other, tmp_path / "other.onnx_adapter")
    refuse(served, path, r"belongs to another base model than base\.onnx: down\.bias has other values in the model")
    session = served.open()
    session.load("other", path, check_base=False)
    assert np.isfinite(call(session, draw_inputs(), "other")).all()


@pytest.mark.parametrize("name", ["up.bias", "table"])
def test_one_other_value_of_the_base_is_found(name: str, served: Served, tmp_path: Path) -> None:
    """Also in a buffer that is not saved with the model."""
    model = Classifier().eval()
    model.load_state_dict(served.model.state_dict())
    model.table.copy_(served.model.get_buffer("table"))
    path = ac.save_onnx_adapter(adapt(model, seed=1), tmp_path / "same.onnx_adapter")
    served.open().load("same", path)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        tensors[name].view(-1)[1] += 1e-3
    path = ac.save_onnx_adapter(adapt(model, seed=1), tmp_path / "other.onnx_adapter")
    refuse(served, path, f"{name} has other values")


def test_a_base_file_that_does_not_say_what_it_holds_is_refused_unless_asked_for(
    served: Served, tmp_path: Path
) -> None:
    model = onnx.load(served.base)
    (entry,) = (entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    description = json.loads(entry.value)
    assert description.pop("base")
    entry.value = json.dumps(description)
    onnx.save(model, tmp_path / "old.onnx")
    session = ac.OnnxAdapters(tmp_path / "old.onnx")
    with pytest.raises(CheckpointError, match=r"old\.onnx does not say which base weights it holds"):
        session.load("one", served.file("one"))
    session.load("one", served.file("one"), check_base=False)


def test_a_loaded_adapter_does_not_depend_on_its_file(served: Served, tmp_path: Path) -> None:
    path, x = tmp_path / "copy.onnx_adapter", draw_inputs()
    shutil.copy(served.file("one"), path)
    session = served.open()
    session.load("one", path)
    path.write_bytes(b"")
    path.unlink()
    torch.testing.assert_close(
        torch.from_numpy(call(session, x, "one")), expect(served.adapted["one"], x), rtol=1e-4, atol=1e-5
    )


def test_a_merged_file_is_no_base(served: Served, tmp_path: Path) -> None:
    from adapter_compiler.saving.folding.fold_files import fold_files

    served.adapted["one"].save(tmp_path / "adapters")
    fold_files(served.base, tmp_path / "adapters", tmp_path / "merged.onnx")
    with pytest.raises(CheckpointError, match=r"merged\.onnx does not say which base weights it holds"):
        ac.OnnxAdapters(tmp_path / "merged.onnx").load("two", served.file("two"))
    session = onnxruntime.InferenceSession(str(tmp_path / "merged.onnx"))
    x = draw_inputs()
    found = torch.from_numpy(session.run(["logits"], {"x": x.numpy()})[0])
    torch.testing.assert_close(found, expect(served.adapted["one"], x), rtol=1e-4, atol=1e-5)


def test_bfloat16(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).eval().bfloat16()
    x = torch.randn(4, 6).bfloat16()
    adapted = ac.compile_with_adapters(model, (x,), config=ac.AdapterConfig(rank=2))
    report = ac.export_onnx(adapted, tmp_path / "base.onnx", (x,), adapters="runtime")
    session = ac.OnnxAdapters(report.path)
    session.load("a", ac.save_onnx_adapter(adapted, tmp_path / "a.onnx_adapter"))
    assert {value.data_type() for value in session.adapters["a"].values.values()} == {"tensor(bfloat16)"}
