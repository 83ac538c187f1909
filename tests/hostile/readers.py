"""Every reader of files, with small files that it reads, ways to damage these, and what a right result is."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Protocol

import onnx
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import AdapterCompilerError, CheckpointError, ExportError, SiteError
from adapter_compiler.saving.exchange.convert import convert_adapters
from adapter_compiler.saving.folding.fold_files import fold_files
from tests.adapter_compiler.saving.same_bits import assert_same_bits
from tests.hostile.mutations import damage_bytes, damage_json, damage_safetensors

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


#: Files by name, and what damages each.
Files = dict[str, Callable[[bytes, Random], bytes]]


#: Classes of exceptions.
Errors = tuple[type[AdapterCompilerError], ...]


class Reader(Protocol):
    """A reader and its files.

    Attributes:
        files: what is damaged, relative to the folder, and how.
        errors: what refusals are.
    """

    files: ClassVar[Files]
    errors: ClassVar[Errors]

    def write(self, folder: Path) -> None:
        """Write whole files."""

    def read(self, folder: Path) -> None:
        """Read the files and check the result.

        Raises:
            AdapterCompilerError: they were refused; it is one of ``errors``.
            AssertionError: the result is wrong, or something was changed although they were refused.
        """


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).eval()


def make_adapted(kind: str = "svd", seed: int = 1) -> ac.AdaptedModel:
    config = ac.AdapterConfig(rank=2, alpha=3, kind=kind, sites=("0.weight",), trainable=("3.*",))
    adapted = ac.compile_with_adapters(make_model(), (X,), config=config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.trainable_parameters():
            parameter.normal_(0, 0.4)
    return adapted


@contextlib.contextmanager
def unchanged_if_refused(state: Callable[[], Any]) -> Iterator[None]:
    """Check that a refusal leaves a state as it was."""
    before = _copy(state())
    try:
        yield
    except AdapterCompilerError:
        assert_same_bits(_copy(state()), before)
        raise


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(one) for key, one in value.items()}
    return [_copy(one) for one in value] if isinstance(value, (list, tuple)) else value


def fold_by_hand(file: Path, name: str, weight: torch.Tensor) -> torch.Tensor:
    """W + s P diag(λ) Q or W + s B A, of a file that is read by safetensors itself."""
    with safe_open(file, framework="pt") as opened:
        entry = json.loads(opened.metadata()["adapter_compiler"])["sites"][name]
        tensors = {key.rpartition(".")[2]: opened.get_tensor(key).double() for key in opened.keys() if name in key}  # noqa: SIM118
    delta = tensors["P"] * tensors["lam"] @ tensors["Q"] if "P" in tensors else tensors["B"] @ tensors["A"]
    folded: torch.Tensor = weight.double() + entry["scale"] * delta
    return folded.to(weight.dtype)


class LoadAdapters:
    """load_adapters into the active adapter."""

    files: ClassVar[Files] = {"adapters.safetensors": damage_safetensors}
    errors: ClassVar[Errors] = (CheckpointError,)

    def __init__(self) -> None:
        self.saved, self.adapted = make_adapted(), make_adapted(seed=2)

    def write(self, folder: Path) -> None:
        self.saved.save(folder)

    def read(self, folder: Path) -> None:
        with unchanged_if_refused(self.adapted.state_dict):
            ac.load_adapters(self.adapted, folder)
        found = load_file(folder / "adapters.safetensors")
        for key, value in self.adapted.adapters.state_dict().items():
            assert_same_bits(value, found[f"adapters.{key}"].to(value.dtype), key)


class LoadAdapter(LoadAdapters):
    """load_adapter, under a further name."""

    def read(self, folder: Path) -> None:
        with unchanged_if_refused(lambda: {**self.adapted.state_dict(), "names": list(self.adapted.adapter_names)}):
            self.adapted.load_adapter("other", folder)
        found = load_file(folder / "adapters.safetensors")
        own = dict(self.adapted.parameters_of_adapter("other").state_dict())
        self.adapted.remove_adapter("other")
        for key, value in own.items():
            assert torch.equal(value, found[f"adapters.{key}"].to(value.dtype))


class Load(LoadAdapters):
    """load, which compiles a model as the folder says."""

    def read(self, folder: Path) -> None:
        adapted = ac.load(make_model(), folder)
        found = load_file(folder / "adapters.safetensors")
        for key, value in adapted.adapters.state_dict().items():
            assert_same_bits(value, found[f"adapters.{key}"].to(value.dtype), key)


class Convert(LoadAdapters):
    """convert_adapters into our own format."""

    def read(self, folder: Path) -> None:
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        convert_adapters(folder, out, to="native")
        found, expected = load_file(out / "adapters.safetensors"), load_file(folder / "adapters.safetensors")
        assert_same_bits(dict(sorted(found.items())), dict(sorted(expected.items())))


class FoldFile:
    """fold_files into one safetensors file; both files are damaged."""

    files: ClassVar[Files] = {
        "adapters/adapters.safetensors": damage_safetensors,
        "base.safetensors": damage_safetensors,
    }
    errors: ClassVar[Errors] = (CheckpointError,)
    kind = "svd"

    def __init__(self) -> None:
        self.saved = make_adapted(self.kind)

    def write(self, folder: Path) -> None:
        self.saved.save(folder / "adapters")
        save_file(make_model().state_dict(), folder / "base.safetensors", metadata={"format": "pt"})

    def read(self, folder: Path) -> None:
        base, out = folder / "base.safetensors", folder / "out.safetensors"
        out.unlink(missing_ok=True)
        try:
            fold_files(base, folder / "adapters", out)
        except AdapterCompilerError:
            assert not out.exists()
            raise
        self.check(load_file(out), load_file(base), folder / "adapters" / "adapters.safetensors")

    def check(self, found: dict[str, torch.Tensor], base: dict[str, torch.Tensor], adapters: Path) -> None:
        saved = load_file(adapters)
        for name, value in base.items():
            expected = saved.get(f"module.{name}", value)
            if name == "0.weight":
                expected = fold_by_hand(adapters, name, value)
                torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
            else:
                assert_same_bits(found[name], expected, name)


class FoldShards(FoldFile):
    """fold_files into a sharded checkpoint, whose files have one name in different folders; its index is damaged."""

    files: ClassVar[Files] = {
        "base/model.safetensors.index.json": damage_json,
        "base/b/model.safetensors": damage_safetensors,
    }
    kind = "lora"

    def write(self, folder: Path) -> None:
        self.saved.save(folder / "adapters")
        state = make_model().state_dict()
        weight_map: dict[str, str] = {}
        for file, prefixes in (("a/model.safetensors", ("0.",)), ("b/model.safetensors", ("1.", "3."))):
            (folder / "base" / file).parent.mkdir(parents=True, exist_ok=True)
            own = {name: value for name, value in state.items() if name.startswith(prefixes)}
            save_file(own, folder / "base" / file)
            weight_map |= dict.fromkeys(own, file)
        size = sum(value.nbytes for value in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))

    def read(self, folder: Path) -> None:
        base, out = folder / "base", folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        try:
            fold_files(base, folder / "adapters", out)
        except AdapterCompilerError:
            assert not out.exists()
            raise
        index = json.loads((out / "model.safetensors.index.json").read_text())
        found = {name: load_file(out / file)[name] for name, file in index["weight_map"].items()}
        weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
        expected = {name: load_file(base / file)[name] for name, file in weight_map.items()}
        self.check(found, expected, folder / "adapters" / "adapters.safetensors")


class FoldPeft(FoldFile):
    """fold_files of a folder of PEFT's."""

    files: ClassVar[Files] = {
        "peft/adapter_config.json": damage_json,
        "peft/adapter_model.safetensors": damage_safetensors,
    }

    def write(self, folder: Path) -> None:
        self.saved.save(folder / "native")
        convert_adapters(folder / "native", folder / "peft", to="peft-lora")
        self.config = (folder / "peft" / "adapter_config.json").read_bytes()
        save_file(make_model().state_dict(), folder / "base.safetensors")

    def read(self, folder: Path) -> None:
        out = folder / "out.safetensors"
        out.unlink(missing_ok=True)
        try:
            fold_files(folder / "base.safetensors", folder / "peft", out)
        except AdapterCompilerError:
            assert not out.exists()
            raise
        found, base = load_file(out), load_file(folder / "base.safetensors")
        assert {name: found[name].shape for name in base} == {name: value.shape for name, value in base.items()}
        if (folder / "peft" / "adapter_config.json").read_bytes() != self.config:
            return  # which means another scale or another kind; see the tests of PEFT's options
        saved = load_file(folder / "peft" / "adapter_model.safetensors")
        lora_b, lora_a = (next(saved[key] for key in saved if f".lora_{part}." in key).double() for part in "BA")
        expected = base["0.weight"].double() + lora_b.flatten(1) @ lora_a.flatten(
            1
        )  # also of a shape with a 1 behind it
        torch.testing.assert_close(found["0.weight"], expected.float(), rtol=1e-5, atol=1e-6)


class FoldOnnx(FoldFile):
    """fold_files into an ONNX file, with weights in it and beside it."""

    files: ClassVar[Files] = {"base.onnx": damage_bytes}
    errors: ClassVar[Errors] = (CheckpointError, ExportError)

    def __init__(self) -> None:
        super().__init__()
        self.data: dict[str, bytes] = {}

    def write(self, folder: Path) -> None:
        self.saved.save(folder / "adapters")
        if not self.data:
            ac.export_onnx(make_model(), folder / "base.onnx", (X,))
            model = onnx.load(folder / "base.onnx")
            onnx.save(
                model, folder / "base.onnx", save_as_external_data=True, location="base.onnx.data", size_threshold=60
            )
            self.data = {name: (folder / name).read_bytes() for name in ("base.onnx", "base.onnx.data")}
        for name, data in self.data.items():
            (folder / name).write_bytes(data)

    def read(self, folder: Path) -> None:
        out = folder / "out.onnx"
        out.unlink(missing_ok=True)
        try:
            fold_files(folder / "base.onnx", folder / "adapters", out)
        except AdapterCompilerError:
            assert not out.exists()
            raise
        base = _read_initializers(folder / "base.onnx")
        if base is None:
            return  # another weight is damaged, and stays so
        found = _read_initializers(out)
        assert found is not None
        saved = load_file(folder / "adapters" / "adapters.safetensors")
        assert found.keys() == base.keys()
        for name, value in base.items():
            expected = saved.get(f"module.{name}", value)
            if name == "0.weight":
                expected = fold_by_hand(folder / "adapters" / "adapters.safetensors", name, value)
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def _read_initializers(path: Path) -> dict[str, torch.Tensor] | None:
    """The weights of a file, by its own library; ``None`` if it cannot read it."""
    try:
        weights = onnx.load(path).graph.initializer
        return {weight.name: torch.tensor(onnx.numpy_helper.to_array(weight)) for weight in weights}
    except (ValueError, TypeError, OSError, onnx.checker.ValidationError):
        return None


class Plan:
    """AdapterPlan.from_json."""

    files: ClassVar[Files] = {"plan.json": damage_json}
    errors: ClassVar[Errors] = (SiteError,)

    def __init__(self) -> None:
        self.plan = make_adapted().plan

    def write(self, folder: Path) -> None:
        (folder / "plan.json").write_text(self.plan.to_json())

    def read(self, folder: Path) -> None:
        plan = ac.AdapterPlan.from_json((folder / "plan.json").read_bytes())  # type: ignore[arg-type]
        assert ac.AdapterPlan.from_json(plan.to_json()) == plan


class TrainingState:
    """load_training_state with a budget, an optimizer and a scheduler."""

    files: ClassVar[Files] = {"training_state.safetensors": damage_safetensors}
    errors: ClassVar[Errors] = (CheckpointError,)

    def __init__(self) -> None:
        self.first, self.second = _Run(1), _Run(2)
        for step in range(5):
            self.first.step(step)

    def write(self, folder: Path) -> None:
        self.first.save(folder)

    def read(self, folder: Path) -> None:
        with unchanged_if_refused(self.second.state):
            self.second.load(folder)
        found = load_file(folder / "training_state.safetensors")
        for key, value in self.second.adapted.adapters.state_dict().items():
            assert_same_bits(value, found[f"values.adapters.{key}"], key)


class _Run:
    def __init__(self, seed: int) -> None:
        self.adapted = make_adapted(seed=seed)
        self.optimizer = torch.optim.AdamW(self.adapted.trainable_parameters(), lr=0.01)
        schedule = ac.BudgetSchedule(target_rank=1, total_steps=8, warmup_steps=1, final_steps=3, interval=1)
        self.budget = ac.RankBudget(self.adapted, self.optimizer, schedule)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)

    def step(self, number: int) -> None:
        (self.adapted(X) - number).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        ac.save_training_state(folder, self.adapted, self.optimizer, self.budget, scheduler=self.scheduler)

    def load(self, folder: Path) -> None:
        ac.load_training_state(folder, self.adapted, self.optimizer, self.budget, scheduler=self.scheduler)

    def state(self) -> dict[str, Any]:
        objects: dict[str, Any] = {"optimizer": self.optimizer, "budget": self.budget, "scheduler": self.scheduler}
        random = {"torch": torch.get_rng_state()}
        return {**random, **self.adapted.state_dict(), **{name: one.state_dict() for name, one in objects.items()}}


READERS: dict[str, Callable[[], Reader]] = {
    "load_adapters": LoadAdapters,
    "load_adapter": LoadAdapter,
    "load": Load,
    "convert": Convert,
    "fold a file": FoldFile,
    "fold shards": FoldShards,
    "fold a PEFT folder": FoldPeft,
    "fold an ONNX file": FoldOnnx,
    "plan": Plan,
    "training state": TrainingState,
}
