"""Sharded checkpoints: files stay inside their folder and keep their places, and what cannot be folded is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.folding.fold_files import fold_files

INDEX = "model.safetensors.index.json"


class Case:
    """A model of three layers, its adapters in a folder, and what folding must give."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.base, self.out = folder, folder / "base", folder / "out"
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)).eval()
        config = ac.AdapterConfig(rank=2, sites=("0.weight", "1.weight"), trainable=("2.*",))
        adapted = ac.compile_with_adapters(self.model, (torch.randn(3, 4),), config=config)
        with torch.no_grad():
            for parameter in adapted.trainable_parameters():
                parameter.normal_(0, 0.4)
        adapted.save(folder / "adapters")
        self.expected = adapted.fold().state_dict()

    def write(self, shards: dict[str, list[str]], **index: Any) -> None:
        """Write the base in shards, with the names of the tensors in each; and the index."""
        state = self.model.state_dict()
        for file, names in shards.items():
            (self.base / file).parent.mkdir(parents=True, exist_ok=True)
            save_file({name: state[name] for name in names}, self.base / file)
        weight_map = {name: file for file, names in shards.items() for name in names}
        (self.base / INDEX).write_text(json.dumps({"weight_map": weight_map, **index}))

    def edit_index(self, change: Callable[[dict[str, Any]], object]) -> None:
        index = json.loads((self.base / INDEX).read_text())
        change(index)
        (self.base / INDEX).write_text(json.dumps(index))

    def fold(self) -> dict[str, torch.Tensor]:
        """Fold, and read the result as its index says."""
        fold_files(self.base, self.folder / "adapters", self.out)
        weight_map = json.loads((self.out / INDEX).read_text())["weight_map"]
        return {name: load_file(self.out / file)[name] for name, file in weight_map.items()}

    def assert_refused(self, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            fold_files(self.base, self.folder / "adapters", self.out)
        assert not self.out.exists()
        assert sorted(path.name for path in self.folder.iterdir() if path.name.startswith(".")) == []


FIRST, SECOND = ["0.weight", "0.bias", "2.weight"], ["1.weight", "1.bias", "2.bias"]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.mark.parametrize(
    "files", [("a/model.safetensors", "b/model.safetensors"), ("model.safetensors", "b/c/model.safetensors")]
)
def test_files_of_one_name_in_different_folders_keep_their_places(files: tuple[str, str], case: Case) -> None:
    case.write({files[0]: FIRST, files[1]: SECOND})
    found = case.fold()
    assert found.keys() == case.expected.keys()
    assert all(torch.equal(found[name], case.expected[name]) for name in found)
    written = {path.relative_to(case.out).as_posix() for path in case.out.rglob("*.safetensors")}
    assert written == set(files)


def test_a_file_that_the_index_spells_in_two_ways_is_one(case: Case) -> None:
    case.write({"a.safetensors": FIRST + SECOND})
    case.edit_index(lambda index: index["weight_map"].update({"0.weight": "./a.safetensors"}))
    found = case.fold()
    assert all(torch.equal(found[name], case.expected[name]) for name in found)
    assert [path.name for path in case.out.glob("*.safetensors")] == ["a.safetensors"]


def test_a_tensor_that_the_index_leaves_out_is_replaced_where_it_is(case: Case) -> None:
    case.write({"a.safetensors": FIRST, "b.safetensors": SECOND})
    case.edit_index(lambda index: index["weight_map"].pop("2.weight"))
    found = case.fold()
    assert found.keys() == case.expected.keys()
    assert all(torch.equal(found[name], case.expected[name]) for name in found)


def test_the_index_decides_where_two_shards_hold_a_tensor(case: Case) -> None:
    case.write({"a.safetensors": FIRST, "b.safetensors": [*SECOND, "0.weight"]})
    found = case.fold()
    assert torch.equal(found["0.weight"], case.expected["0.weight"])
    assert json.loads((case.out / INDEX).read_text())["weight_map"]["0.weight"] == "b.safetensors"
    shutil.rmtree(case.out)
    case.edit_index(lambda index: index["weight_map"].pop("0.weight"))
    case.assert_refused("weight_map does not name 0.weight, which a.safetensors and b.safetensors hold, expected it to")


@pytest.mark.parametrize("size", [312, 312.0])
def test_the_size_grows_with_tensors_that_are_added(size: float, case: Case) -> None:
    case.write({"a.safetensors": FIRST, "b.safetensors": SECOND[:2]}, metadata={"total_size": size, "other": "x"})
    case.fold()
    assert json.loads((case.out / INDEX).read_text())["metadata"] == {"total_size": size + 8, "other": "x"}


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "up": (
        lambda i: i["weight_map"].update({"0.bias": "../a.safetensors"}),
        r"weight_map: 0.bias is '../a.safetensors'",
    ),
    "absolute": (
        lambda i: i["weight_map"].update({"0.bias": "/a.safetensors"}),
        "weight_map: 0.bias is .*not absolute",
    ),
    "NUL": (lambda i: i["weight_map"].update({"0.bias": "a\0.safetensors"}), "weight_map: 0.bias is "),
    "number": (lambda i: i["weight_map"].update({"0.bias": 3}), "weight_map is {.*expected the names of files by"),
    "list": (lambda i: i.update(weight_map=[]), r"weight_map is \[\], expected the names of files by those of tensors"),
    "none": (lambda i: i.pop("weight_map"), "the key 'weight_map' is missing"),
    "empty": (lambda i: i.update(weight_map={}), "weight_map names no tensor, expected one at least"),
    "another kind": (lambda i: i["weight_map"].update({"0.bias": INDEX}), "expected the name of a .safetensors file"),
    "no file": (lambda i: i["weight_map"].update({"0.bias": "c.safetensors"}), "c.safetensors .*does not exist"),
    "elsewhere": (
        lambda i: i["weight_map"].update({"0.bias": "b.safetensors"}),
        "weight_map says that 0.bias is in b.safetensors, which does not hold it",
    ),
    "a size that is none": (lambda i: i.update(metadata={"total_size": "1"}), "metadata is .*in which total_size is a"),
    "NaN": (lambda i: i.update(metadata={"total_size": float("nan")}), "metadata is .*in which total_size is a number"),
    "metadata that is none": (lambda i: i.update(metadata=3), "metadata is 3, expected an object in which total_size"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_index_that_cannot_be_is_refused_with_the_field(damage: str, case: Case) -> None:
    change, message = DAMAGES[damage]
    case.write({"a.safetensors": FIRST, "b.safetensors": SECOND})
    shutil.copy(case.base / "a.safetensors", case.folder / "a.safetensors")
    case.edit_index(change)
    case.assert_refused(message)


@pytest.mark.parametrize(
    ("text", "message"), [("", "this is not JSON"), ("[]", "the text is \\[\\]"), ("[" * 9999, "JSON")]
)
def test_an_index_that_is_none_is_refused(text: str, message: str, case: Case) -> None:
    case.write({"a.safetensors": FIRST + SECOND})
    (case.base / INDEX).write_text(text)
    case.assert_refused(f"{INDEX}: .*{message}")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("name", ["a.safetensors", "tokenizer.json"])
def test_links_that_lead_outside_are_refused(name: str, case: Case) -> None:
    case.write({"a.safetensors": FIRST, "b.safetensors": SECOND})
    outside = case.folder / "outside"
    if (case.base / name).exists():
        (case.base / name).rename(outside)
    outside.touch()
    (case.base / name).symlink_to(outside)
    case.assert_refused(f"{name}', a link to .*outside, expected a file that is inside")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_snapshot_in_the_cache_of_hugging_face_is_folded(case: Case) -> None:
    case.write({"a.safetensors": FIRST, "b.safetensors": SECOND})
    (case.base / "config.json").write_text("{}")
    snapshot, blobs = case.folder / "models--x" / "snapshots" / "1234", case.folder / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(case.base.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    case.base = snapshot
    found = case.fold()
    assert all(torch.equal(found[name], case.expected[name]) for name in found)
    assert all(not path.is_symlink() for path in case.out.iterdir())


QUANTIZED = {
    "int8 with SCB": (torch.int8, "0.SCB", "0.weight is I8 with 0.SCB beside it, a quantized weight, to which no"),
    "int8 alone": (torch.int8, "", "0.weight is I8, a quantized weight"),
    "float8 with a scale": (torch.float8_e4m3fn, "0.weight_scale", "0.weight is F8_E4M3 with 0.weight_scale beside it"),
    "packed": (torch.uint8, "0.weight.absmax", "0.weight is U8 with 0.weight.absmax beside it"),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_weight_is_refused(kind: str, case: Case) -> None:
    dtype, scale, message = QUANTIZED[kind]
    state = {**case.model.state_dict(), "0.weight": torch.ones(6, 4).to(dtype)}
    save_file(state | ({scale: torch.ones(6)} if scale else {}), case.folder / "base.safetensors")
    case.base, case.out = case.folder / "base.safetensors", case.folder / "out.safetensors"
    case.assert_refused(message)


def test_a_sum_that_exceeds_the_dtype_is_refused(case: Case) -> None:
    state = {name: value.half() for name, value in case.model.state_dict().items() if not name.startswith("2.")}
    state["0.weight"] = torch.full((6, 4), 65504.0).half()
    path = case.folder / "adapters" / "adapters.safetensors"
    save_file(state, case.folder / "base.safetensors")
    case.base, case.out = case.folder / "base.safetensors", case.folder / "out.safetensors"
    scaled = ac.compile_with_adapters(
        case.model, (torch.randn(3, 4),), config=ac.AdapterConfig(rank=2, alpha=1e4, sites=("0.weight",))
    )
    with torch.no_grad():
        for parameter in scaled.adapters.parameters():
            parameter.fill_(1.0)
    scaled.save(path.parent)
    case.assert_refused(
        r"adapters.safetensors: site 0.weight: 24 of 24 values of W \+ ΔW exceed torch.float16, up to \d+, expected"
    )


def test_adapters_that_hold_no_numbers_are_refused(case: Case) -> None:
    save_file(case.model.state_dict(), case.folder / "base.safetensors")
    case.base, case.out = case.folder / "base.safetensors", case.folder / "out.safetensors"
    config = ac.AdapterConfig(rank=2, sites=("0.weight",))
    broken = ac.compile_with_adapters(case.model, (torch.randn(3, 4),), config=config)
    with torch.no_grad():
        for parameter in broken.adapters.parameters():
            parameter.fill_(float("nan"))
    broken.save(case.folder / "adapters")
    case.assert_refused("the adapter of site 0.weight has inf or nan, or values whose product has, expected finite")
