"""Saved adapters come back bit for bit, or not at all and with the reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError, ConfigError
from adapter_compiler.saving.exchange.convert import convert_adapters
from adapter_compiler.saving.folding.fold_files import fold_files
from adapter_compiler.saving.primitives.adapter_file import FILE_NAME
from tests.adapter_compiler.saving.rewriting import change_tensor, read_header, rewrite

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.raw = nn.Parameter(torch.randn(6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.body(x)).relu() @ self.raw)
        return y


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def compile_net(net: nn.Module, **options: Any) -> ac.AdaptedModel:
    config = ac.AdapterConfig(**{"rank": 2, "alpha": 2, "trainable": "head", **options})
    return ac.compile_with_adapters(net, (X,), config=config)


def train(adapted: ac.AdaptedModel) -> None:
    train_with(adapted, torch.optim.SGD(adapted.trainable_parameters(), lr=0.01))


def train_with(adapted: ac.AdaptedModel, optimizer: torch.optim.Optimizer) -> None:
    adapted.train()
    for _ in range(3):
        adapted(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def trained(net: Net) -> ac.AdaptedModel:
    adapted = compile_net(net)
    train(adapted)
    return adapted


def test_roundtrip_with_head_and_running_statistics(net: Net, trained: ac.AdaptedModel, tmp_path: Path) -> None:
    path = trained.save(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / FILE_NAME
    other = compile_net(net)
    assert not torch.equal(other.eval()(X), trained.eval()(X))
    ac.load_adapters(other, path.parent)
    torch.testing.assert_close(other.state_dict(), trained.state_dict(), rtol=0, atol=0)
    assert torch.equal(other(X), trained(X))
    torch.testing.assert_close(other.fold().state_dict(), trained.fold().state_dict(), rtol=0, atol=0)


def test_the_file_holds_what_trained_and_nothing_frozen(trained: ac.AdaptedModel, tmp_path: Path) -> None:
    with safe_open(trained.save(tmp_path), framework="pt") as file:
        names = set(file.keys())
        header = json.loads(file.metadata()["adapter_compiler"])
    assert names == {
        *(f"adapters.{site}.{p}" for site in ("raw", "body.weight") for p in ("P", "lam", "Q")),
        *("module.head.weight", "module.head.bias"),
        *("module.norm.running_mean", "module.norm.running_var", "module.norm.num_batches_tracked"),
    }
    assert header["sites"]["raw"] == {"form": "svd", "rank": 2, "scale": 1.0, "shape": [6, 6], "transposed": True}


def test_a_failure_while_writing_keeps_the_old_file(
    trained: ac.AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained.save(tmp_path)
    before = path.read_bytes()

    def fail(tensors: dict[str, Tensor], draft: Path, **options: object) -> None:
        Path(draft).write_bytes(b"half of it")
        raise OSError("disk full")

    train(trained)
    monkeypatch.setattr("adapter_compiler.saving.adapters.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        trained.save(tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def strip_header(path: Path) -> None:
    save_file({"w": torch.zeros(1)}, path)


def rewrite_header(text: str) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        save_file(tensors, path, metadata={"adapter_compiler": text})

    return rewrite


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot be read as a safetensors file"),
        (scramble, "cannot be read as a safetensors file"),
        (empty, "cannot be read as a safetensors file"),
        (strip_header, "was not written by adapter-compiler"),
        (rewrite_header('{"version": 99, "sites": {}}'), "header has format version 99, expected 1"),
        (rewrite_header("not json"), "this is not JSON .Expecting value"),
        (rewrite_header('{"version": 1}'), "its header: the key 'sites' is missing"),
        (rewrite_header("[]"), "format version None, expected 1"),
        (Path.unlink, "does not exist; expected a folder that AdaptedModel.save wrote"),
    ],
    ids=["truncated", "scrambled", "empty", "foreign", "version", "no json", "no sites", "no object", "missing"],
)
def test_damaged_files_are_refused_and_change_nothing(
    trained: ac.AdaptedModel, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(trained.save(tmp_path))
    before = copy.deepcopy(trained.state_dict())
    with pytest.raises(CheckpointError, match=message) as caught:
        ac.load_adapters(trained, tmp_path)
    assert FILE_NAME in str(caught.value)
    torch.testing.assert_close(trained.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 1, "alpha": 1}, "was saved with rank=2, this model has rank=1"),
        ({"alpha": 4}, "was saved with scale=1.0, this model has scale=2.0"),
        ({"sites": ("raw",)}, r"1 sites differ, for example body\.weight is in the file only"),
        ({"trainable": ("head.bias",), "exclude": ("head",)}, r"tensor module\.head\.weight is on one side only"),
        ({"trainable": ()}, r"head\.weight is in this model only"),
    ],
    ids=["rank", "alpha", "sites", "trainable", "head"],
)
def test_files_of_another_set_up_are_refused(
    net: Net, trained: ac.AdaptedModel, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    trained.save(tmp_path)
    other = compile_net(net, **options)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=message):
        ac.load_adapters(other, tmp_path)
    torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)


def test_a_model_of_another_width_is_refused(trained: ac.AdaptedModel, tmp_path: Path) -> None:
    class Wider(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)

    trained.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"head\.(weight|bias) has shape .*2.*, this model expects .*3"):
        ac.load_adapters(compile_net(Wider()), tmp_path)


def test_saving_replaces_an_earlier_file(net: Net, trained: ac.AdaptedModel, tmp_path: Path) -> None:
    trained.save(tmp_path)
    train(trained)
    trained.save(tmp_path)
    other = compile_net(net)
    ac.load_adapters(other, tmp_path)
    torch.testing.assert_close(other.state_dict(), trained.state_dict(), rtol=0, atol=0)
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]


def test_compacted_ranks_come_back(net: Net, tmp_path: Path) -> None:
    adapted = compile_net(net)
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.01)
    schedule = ac.BudgetSchedule(
        target_rank=0.5, total_steps=3, warmup_steps=0, final_steps=1, interval=1, compact=True
    )
    budget = ac.RankBudget(adapted, optimizer, schedule)
    train_with(adapted, optimizer)
    assert sorted(budget.ranks().values()) == [0, 1]
    adapted.save(tmp_path)
    other = compile_net(net)
    ac.load_adapters(other, tmp_path)
    assert {adapter.site.name: adapter.rank for adapter in other.plan} == budget.ranks()
    torch.testing.assert_close(other.state_dict(), adapted.state_dict(), rtol=0, atol=0)
    assert torch.equal(other.eval()(X), adapted.eval()(X))
    torch.testing.assert_close(other.fold().state_dict(), adapted.fold().state_dict(), rtol=0, atol=0)
    train(other)


def test_fewer_triplets_than_the_header_says_change_nothing(net: Net, tmp_path: Path) -> None:
    compile_net(net, rank=1, alpha=1).save(tmp_path)
    path = tmp_path / FILE_NAME
    rewrite(path, lambda header, _: [site.update(rank=2) for site in header["sites"].values()])
    other = compile_net(net, rank=3, alpha=3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=r"has shape \(6, 1\), this model expects \(6, 2\)"):
        ac.load_adapters(other, tmp_path)
    torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)


def fold(adapted: ac.AdaptedModel, folder: Path) -> None:
    save_file(
        {key: value.contiguous() for key, value in adapted.copy_base().state_dict().items()},
        folder / "base.safetensors",
    )
    fold_files(folder / "base.safetensors", folder, folder / "out.safetensors")


#: Everything that reads a folder of saved adapters.
READERS: dict[str, Callable[[ac.AdaptedModel, Path], object]] = {
    "load_adapters": ac.load_adapters,
    "load_adapter": lambda adapted, folder: adapted.load_adapter("other", folder),
    "fold_files": fold,
    "convert": lambda _, folder: convert_adapters(folder, folder / "out", to="native"),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "its header has format version 2, expected 1; give a file that AdaptedModel.save of this ver"),
        ({"version": True}, "its header has format version True, expected 1"),
        ({"version": "1"}, "its header has format version '1', expected 1"),
        ({"version": None}, "its header has format version None, expected 1"),
        ({"kind": "training state"}, "holds 'training state' of version 1, expected 'saved adapters' of version 1"),
        ({"sites": 3}, "its header: sites is 3, expected an object of sites"),
        (
            {"sites": {"raw": {"form": "svd"}}},
            "site raw: the key 'rank' is missing, expected a number of triplets there",
        ),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_another_format(
    trained: ac.AdaptedModel, tmp_path: Path, reader: str, changes: dict[str, Any], message: str
) -> None:
    path = trained.save(tmp_path)
    rewrite(path, lambda header, _: header.update(changes))
    before, names = copy.deepcopy(trained.state_dict()), trained.adapter_names
    with pytest.raises(CheckpointError, match=message) as caught:
        READERS[reader](trained, tmp_path)
    assert str(caught.value).startswith(str(path))
    torch.testing.assert_close(trained.state_dict(), before, rtol=0, atol=0)
    assert trained.adapter_names == names
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 9}, "rank 9 does not fit a weight of 6 × 6"),
        ({"rank": 1}, r"site raw has \{.*\}, expected \{'P': \(6, 1\)"),
        ({"form": "lora"}, r"site raw has \{.*'lam'.*\}, expected \{'B': \(6, 2\)"),
        ({"form": "lora-offset" + "9" * 5000}, "adapters of the form 'lora-offset999.* are unknown"),
    ],
)
def test_a_site_that_its_tensors_contradict_is_refused(
    trained: ac.AdaptedModel, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = trained.save(tmp_path)
    rewrite(path, lambda header, _: header["sites"]["raw"].update(changes))
    with pytest.raises(CheckpointError, match=message):
        trained.load_adapter("other", tmp_path)
    with pytest.raises(CheckpointError):
        ac.load_adapters(trained, tmp_path)
    assert trained.adapter_names == ("default",)


HEAD, P = "module.head.bias", "adapters.raw.P"
LARGE = torch.full((2,), 1e300, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            HEAD,
            LARGE,
            r"head\.bias is torch\.float64, this model has torch\.float32, .* 2 of its 2 values \(1e\+300 would b",
        ),
        (
            HEAD,
            torch.tensor([0.5, 0.1], dtype=torch.float64),
            r"does not hold 1 of its 2 values \(0\.1 would become 0\.10",
        ),
        (HEAD, torch.tensor([2**24 + 1, 1]), r"is torch\.int64, .* 1 of its 2 values \(16777217 would become 16777216"),
        (
            P,
            torch.full((6, 2), 0.1).double() + 1e-12,
            r"raw\.P is torch\.float64, .* AdapterConfig\(dtype=torch\.float64\)",
        ),
        ("module.norm.num_batches_tracked", torch.tensor(0.5), r"1 of its 1 values \(0\.5 would become 0\)"),
        ("module.norm.num_batches_tracked", torch.tensor(float("nan")), r"1 of its 1 values \(nan would become"),
    ],
    ids=["inf", "rounded", "integers", "adapters", "a fraction", "nan"],
)
@pytest.mark.parametrize("reader", ["load_adapters", "load_adapter"])
def test_a_cast_that_changes_a_value_is_refused(
    trained: ac.AdaptedModel, tmp_path: Path, reader: str, name: str, value: Tensor, message: str
) -> None:
    path = trained.save(tmp_path)
    change_tensor(path, name, value)
    before, names = copy.deepcopy(trained.state_dict()), trained.adapter_names
    if name == P and reader == "load_adapter":
        trained.load_adapter("wide", tmp_path)  # which has the dtype of the file
        assert {p.dtype for p in trained.parameters_of_adapter("wide").get_submodule("raw").parameters()} == {
            torch.float64
        }
        assert torch.equal(trained.parameters_of_adapter("wide").get_parameter("raw.P"), value)
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        READERS[reader](trained, tmp_path)
    assert str(caught.value).startswith(str(path))
    torch.testing.assert_close(trained.state_dict(), before, rtol=0, atol=0)
    assert trained.adapter_names == names


@pytest.mark.parametrize("reader", ["load_adapters", "load_adapter"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_cast_that_changes_no_value_is_made(
    trained: ac.AdaptedModel, tmp_path: Path, reader: str, dtype: torch.dtype
) -> None:
    path = trained.save(tmp_path)
    change_tensor(path, HEAD, torch.tensor([-0.0, 0.375]).to(dtype))
    READERS[reader](trained, tmp_path)
    if reader == "load_adapter":
        trained.use("other")
    bias = trained.base_weight("head.bias")
    assert bias.dtype == torch.float32
    assert bias.tolist() == [0, 0.375]
    assert bool(torch.signbit(bias.detach())[0])


@pytest.mark.parametrize("kept", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_so(trained: ac.AdaptedModel, tmp_path: Path, kept: float) -> None:
    change_tensor(trained.save(tmp_path), HEAD, torch.tensor([kept, 1.0], dtype=torch.float64))
    ac.load_adapters(trained, tmp_path)
    torch.testing.assert_close(trained.base_weight("head.bias").tolist(), [kept, 1.0], equal_nan=True)


def test_a_model_of_fewer_bits_does_not_take_the_adapters_of_one_of_more(net: Net, tmp_path: Path) -> None:
    wide = compile_net(copy.deepcopy(net))
    train(wide)
    wide.save(tmp_path)
    narrow = compile_net(net).to(torch.bfloat16)
    before = copy.deepcopy(narrow.state_dict())
    with pytest.raises(
        CheckpointError, match=r"is torch\.float32, this model has torch\.bfloat16, which does not hold"
    ):
        ac.load_adapters(narrow, tmp_path)
    torch.testing.assert_close(narrow.state_dict(), before, rtol=0, atol=0)
    narrow.save(tmp_path)
    ac.load_adapters(wide, tmp_path)
    for key, value in narrow.adapters.state_dict().items():
        assert torch.equal(wide.adapters.state_dict()[key], value.float())


def test_adapters_of_integers_are_refused(trained: ac.AdaptedModel, tmp_path: Path) -> None:
    change_tensor(trained.save(tmp_path), P, torch.ones(6, 2, dtype=torch.int32))
    with pytest.raises(CheckpointError, match=r"site raw: P is I32, expected floating-point numbers"):
        trained.load_adapter("other", tmp_path)
    assert trained.adapter_names == ("default",)


def test_an_adapter_that_is_refused_late_is_not_there(
    trained: ac.AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.save(tmp_path)
    before = list(trained.state_dict())

    def fail(*_: object) -> None:
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("adapter_compiler.saving.load_adapter.fill_parameters", fail)
        with pytest.raises(RuntimeError, match="no room"):
            trained.load_adapter("other", tmp_path)
    assert trained.adapter_names == ("default",)
    assert list(trained.state_dict()) == before
    trained.load_adapter("other", tmp_path)
    trained.use("other")


def test_adapters_for_parts_of_a_kernel_are_told_from_those_of_stacked_matrices(tmp_path: Path) -> None:
    """A file does not say which a weight of three dimensions is."""
    torch.manual_seed(0)
    model, x = nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)
    config = ac.AdapterConfig(rank=1, alpha=1, sites="weight", rules=(ac.AdapterRule(name="weight", split=2),))
    adapted = ac.compile_with_adapters(model, (x,), config=config)
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_()
    adapted.save(tmp_path)
    adapted.load_adapter("other", tmp_path)
    expected = adapted(x)
    adapted.use("other")
    assert torch.equal(adapted(x), expected)
    fold(adapted, tmp_path)
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("weight"), adapted.fold().state_dict()["weight"])


def test_a_converted_folder_has_checksums_and_the_names_of_tied_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    head.weight = embedding.weight
    model, ids = nn.Sequential(embedding, head), torch.randint(0, 9, (2, 3))
    adapted = ac.compile_with_adapters(model, (ids,), config=ac.AdapterConfig(rank=2, sites=("*",)))
    adapted.save(tmp_path / "first")
    convert_adapters(tmp_path / "first", tmp_path / "second", to="native")
    first, second = (read_header(tmp_path / name / FILE_NAME) for name in ("first", "second"))
    assert first["aliases"] == second["aliases"] == {"1.weight": "0.weight"}
    assert first["tensors"] == second["tensors"]
    assert second["checksum"]


@pytest.mark.parametrize("reader", READERS)
def test_every_changed_byte_is_noticed(trained: ac.AdaptedModel, tmp_path: Path, reader: str) -> None:
    path = trained.save(tmp_path)
    whole = path.read_bytes()
    before = copy.deepcopy(trained.state_dict())
    for place in range(5, len(whole), 61):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CheckpointError) as caught:
            READERS[reader](trained, tmp_path)
        assert str(path) in str(caught.value)
    torch.testing.assert_close(trained.state_dict(), before, rtol=0, atol=0)
    assert trained.adapter_names == ("default",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h: h["tensors"].pop(P),
            r"the tensor adapters\.raw\.P is \['F32', \[6, 2\]\], its header says \[None\]",
        ),
        (lambda h: h["tensors"][P].__setitem__(2, "0" * 32), r"tensor adapters\.raw\.P has the checksum \w+, expected"),
        (lambda h: h.update(checksum="0" * 32), r"its header has the checksum 0000.*, expected \w+: it was changed or"),
        (lambda h: h.update(tensors=3), "its header: tensors is 3, expected .dtype, shape, checksum. by tensor"),
        (lambda h: h.update(more=3), "its header: the key 'more' is unknown, expected aliases, checksum, kind, "),
        (lambda h: h["sites"]["raw"].update(more=3), "site raw: the key 'more' is unknown, expected form, rank, rows"),
        (lambda h: h.update(aliases={"x": 3}), "its header: aliases is {'x': 3}, expected names by name"),
        (lambda h: h["sites"]["raw"].update(scale=float("nan")), "site raw: scale is nan, expected a finite number"),
        (lambda h: h["sites"]["raw"].update(scale=float("inf")), "site raw: scale is inf, expected a finite number"),
    ],
)
def test_headers_that_contradict_the_file_are_refused(
    trained: ac.AdaptedModel, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = trained.save(tmp_path)

    def apply(header: dict[str, Any], _: dict[str, Tensor]) -> None:
        del header["checksum"]
        change(header)

    rewrite(path, apply, keep_checksums=True)
    for reader in ("load_adapters", "load_adapter", "convert"):
        with pytest.raises(CheckpointError, match=message) as caught:
            READERS[reader](trained, tmp_path)
        assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("kind", ["peft-lora", "peft-adalora"])
def test_a_conversion_that_loses_range_is_refused(kind: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6)).double()
    adapted = ac.compile_with_adapters(model, (X.double(),), config=ac.AdapterConfig(rank=2))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.fill_(1e100)
    adapted.save(tmp_path)
    with pytest.raises(ConfigError, match=r"lora_A.* would have inf or nan in torch\.float32, expected finite values"):
        convert_adapters(tmp_path, tmp_path / "out", to=kind)
    assert not (tmp_path / "out").exists()
