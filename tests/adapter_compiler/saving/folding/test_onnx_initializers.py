"""Weights are found and overwritten in files that are never read wholly."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from adapter_compiler.errors import ExportError
from adapter_compiler.saving.folding.fold_files import fold_files
from adapter_compiler.saving.onnx_files.initializers import InitializerFile
from adapter_compiler.saving.onnx_files.metadata import METADATA_KEY, copy_with_metadata, read_metadata, set_metadata

DESCRIPTION: dict[str, Any] = {"format": 1, "adapters": "none"}
WIDTH = 512


def make_model(layers: int = 3, width: int = 8, dtype: Any = np.float32) -> onnx.ModelProto:
    generator = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(generator.standard_normal((width, width)).astype(dtype), f"{layer}.weight")
        for layer in range(layers)
    ]
    nodes = [helper.make_node("MatMul", [f"x{i}", f"{i}.weight"], [f"x{i + 1}"]) for i in range(layers)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width]) for name in ("x0", f"x{layers}")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializer=tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    model.metadata_props.add(key="other", value="kept")
    weights = {f"{i}.weight": {"initializer": f"{i}.weight", "aliases": []} for i in range(layers)}
    set_metadata(model, {**DESCRIPTION, "weights": weights})
    return model


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int64])
def test_weights_are_what_onnx_reads(dtype: Any, tmp_path: Path) -> None:
    model = make_model(dtype=dtype)
    onnx.save(model, tmp_path / "model.onnx")
    file = InitializerFile(tmp_path / "model.onnx")
    assert list(file) == ["0.weight", "1.weight", "2.weight"]
    for tensor in model.graph.initializer:
        expected = numpy_helper.to_array(tensor)
        found = file.read(tensor.name)
        assert found.numpy().dtype == expected.dtype
        assert np.array_equal(found.numpy(), expected)
        assert file.shape(tensor.name) == expected.shape


def test_one_weight_is_overwritten_and_nothing_else(tmp_path: Path) -> None:
    path, model = tmp_path / "model.onnx", make_model()
    onnx.save(model, path)
    InitializerFile(path).write("1.weight", torch.full((8, 8), 3.0))
    expected = numpy_helper.from_array(np.full((8, 8), 3, np.float32), "1.weight")
    model.graph.initializer[1].CopyFrom(expected)
    assert onnx.load(path) == model


def test_only_the_description_changes_in_a_copy(tmp_path: Path) -> None:
    """Whatever the order of the fields: protobuf allows any."""
    model = make_model()
    graph, rest = onnx.ModelProto(), onnx.ModelProto()
    graph.graph.CopyFrom(model.graph)
    rest.CopyFrom(model)
    rest.ClearField("graph")
    for parts in ((graph, rest), (rest, graph)):
        (tmp_path / "model.onnx").write_bytes(b"".join(part.SerializeToString() for part in parts))
        copy_with_metadata(tmp_path / "model.onnx", tmp_path / "copy.onnx", {**DESCRIPTION, "adapters": "merged"})
        found = onnx.load(tmp_path / "copy.onnx")
        assert read_metadata(found, "copy") == {"format": 1, "adapters": "merged"}
        assert sorted(entry.key for entry in found.metadata_props) == sorted(["other", METADATA_KEY])
        for one in (found, wanted := onnx.load(tmp_path / "model.onnx")):
            del one.metadata_props[:]
        assert found == wanted


def test_values_that_are_no_plain_bytes_are_read_and_not_overwritten(tmp_path: Path) -> None:
    model = make_model(layers=1, width=2)
    model.graph.initializer[0].CopyFrom(helper.make_tensor("0.weight", TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0]))
    onnx.save(model, tmp_path / "model.onnx")
    file = InitializerFile(tmp_path / "model.onnx")
    assert file.read("0.weight").tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ExportError, match=r"the values of 0.weight are not there as plain bytes .*; export it"):
        file.write("0.weight", torch.zeros(2, 2))


@pytest.mark.parametrize("content", [b"", b"\x08", b"\x0f\x00", b"\xff" * 20, b"\x3a\x7f\x00", b"this is no model"])
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"model.onnx cannot be read as an ONNX model: .*; expected a whole file"):
        InitializerFile(tmp_path / "model.onnx")


def test_external_data_that_ends_too_early_is_named(tmp_path: Path) -> None:
    onnx.save(make_model(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    file = InitializerFile(tmp_path / "m.onnx")
    assert file.external_files() == {"m.data"}
    (tmp_path / "m.data").write_bytes((tmp_path / "m.data").read_bytes()[:-9])
    with pytest.raises(ExportError, match=r"m.data, which holds the weight 2.weight, is truncated: the file ends at"):
        file.read("2.weight")


def test_external_data_without_a_length_is_as_long_as_the_shape_says(tmp_path: Path) -> None:
    model = make_model(layers=1)
    expected = numpy_helper.to_array(model.graph.initializer[0])
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    stored = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    entries = stored.graph.initializer[0].external_data
    location = next(entry.value for entry in entries if entry.key == "location")
    del entries[:]
    entries.add(key="location", value=location)
    onnx.save(stored, tmp_path / "m.onnx")
    assert np.array_equal(InitializerFile(tmp_path / "m.onnx").read("0.weight").numpy(), expected)


def test_folding_holds_one_weight_at_a_time(tmp_path: Path) -> None:
    """12 weights of 1 MB, in the file itself; numbers are Python's own count of bytes, not the machine's."""
    onnx.save(make_model(layers=12, width=WIDTH), tmp_path / "base.onnx")
    generator = torch.Generator().manual_seed(0)
    factors = {f"{i}": torch.randn(2, 4, WIDTH, generator=generator) for i in range(12)}
    adapters = {f"base_model.model.{name}.lora_A.weight": value[0].contiguous() for name, value in factors.items()}
    adapters |= {f"base_model.model.{name}.lora_B.weight": value[1].T.contiguous() for name, value in factors.items()}
    (tmp_path / "adapters").mkdir()
    save_file(adapters, tmp_path / "adapters" / "adapter_model.safetensors")
    (tmp_path / "adapters" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ".*", "bias": "none"}'
    )
    tracemalloc.start()
    fold_files(tmp_path / "base.onnx", tmp_path / "adapters", tmp_path / "out.onnx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    weight = WIDTH * WIDTH * 4
    assert peak < 3 * weight < (tmp_path / "base.onnx").stat().st_size / 3
    before, after = (onnx.load(tmp_path / name).graph.initializer for name in ("base.onnx", "out.onnx"))
    for old, new in zip(before, after, strict=True):
        pair = factors[old.name.partition(".")[0]].double()
        exact = torch.from_numpy(numpy_helper.to_array(old).copy()).double() + pair[1].T @ pair[0]
        assert np.array_equal(numpy_helper.to_array(new), exact.float().numpy())
