"""Other libraries' savers write every tensor, and what they read comes in, at whatever ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

import adapter_compiler as ac
from adapter_compiler.adapters.compact import compact_adapters
from tests.integrations.models import draw_values, make_adapted, values_of

pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
KEPT = {"first.weight": torch.tensor([0, 2]), "second.weight": torch.tensor([], dtype=torch.long)}


def save_by_accelerate(adapted: nn.Module, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="the extra 'integrations' is not installed")
    accelerate.Accelerator(cpu=True).save_model(adapted, str(folder))


def load_by_accelerate(adapted: nn.Module, folder: Path) -> None:
    load_model(adapted, folder / "model.safetensors")


def load_by_dcp(adapted: nn.Module, folder: Path) -> None:
    state = adapted.state_dict()
    load_sharded(state, checkpoint_id=folder)
    adapted.load_state_dict(state)


SAVERS: dict[str, tuple[Any, Any]] = {
    "save_model": (
        lambda adapted, folder: save_model(adapted, folder / "m.safetensors"),
        lambda adapted, folder: load_model(adapted, folder / "m.safetensors"),
    ),
    "save_file": (
        lambda adapted, folder: save_file(adapted.state_dict(), folder / "m.safetensors"),
        lambda adapted, folder: adapted.load_state_dict(load_file(folder / "m.safetensors")),
    ),
    "torch": (
        lambda adapted, folder: torch.save(adapted.state_dict(), folder / "m.pt"),
        lambda adapted, folder: adapted.load_state_dict(torch.load(folder / "m.pt", weights_only=True)),
    ),
    "accelerate": (save_by_accelerate, load_by_accelerate),
    "dcp": (lambda adapted, folder: save_sharded(adapted.state_dict(), checkpoint_id=folder), load_by_dcp),
}


@pytest.mark.parametrize("saver", SAVERS)
def test_every_tensor_is_written_and_read(saver: str, tmp_path: Path) -> None:
    save, load = SAVERS[saver]
    first, second = make_adapted(), make_adapted()
    draw_values(first)
    save(first, tmp_path)
    assert not torch.equal(first(X)["logits"], second(X)["logits"])
    load(second, tmp_path)
    for name, value in values_of(first).items():
        torch.testing.assert_close(values_of(second)[name], value, rtol=0, atol=0, msg=name)
    assert second.adapters.flat is not None
    torch.testing.assert_close(second(X)["logits"], first(X)["logits"], rtol=0, atol=0)


@pytest.mark.parametrize("saver", sorted(SAVERS.keys() - {"dcp"}))  # DCP wants the ranks to be there first
def test_smaller_ranks_come_first(saver: str, tmp_path: Path) -> None:
    save, load = SAVERS[saver]
    first, second = make_adapted(), make_adapted()
    draw_values(first)
    compact_adapters(first, KEPT)
    save(first, tmp_path)
    load(second, tmp_path)
    assert [adapter.rank for adapter in second.plan] == [2, 0]
    assert [p.requires_grad for p in second.adapters.parameters()] == [True] * 3 + [False] * 3
    torch.testing.assert_close(second(X)["logits"], first(X)["logits"], rtol=0, atol=0)
    load(make_adapted(), tmp_path)


def test_ranks_grow_back_to_those_of_the_start_only() -> None:
    first, second, third = make_adapted(), make_adapted(), make_adapted(3)
    draw_values(first)
    compact_adapters(second, KEPT)
    second.load_state_dict(first.state_dict())
    assert all(p.requires_grad for p in second.adapters.parameters())
    torch.testing.assert_close(second(X)["logits"], first(X)["logits"], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"size mismatch for adapters\.first\.weight\.P"):
        third.load_state_dict(first.state_dict())
    assert [adapter.rank for adapter in third.plan] == [3, 3]


def test_states_of_modules_around_it_are_followed() -> None:
    first, second = (nn.ModuleDict({"inner": make_adapted()}) for _ in range(2))
    compact_adapters(first["inner"], KEPT)  # type: ignore[arg-type]
    second.load_state_dict(first.state_dict())
    assert [adapter.rank for adapter in second["inner"].plan] == [2, 0]  # type: ignore[union-attr]


def test_inactive_adapters_are_followed() -> None:
    first, second = make_adapted(), make_adapted()
    for adapted in (first, second):
        adapted.add_adapter("task")
    first.use("task")
    compact_adapters(first, KEPT)
    first.use("default")
    second.load_state_dict(first.state_dict())
    second.use("task")
    assert [adapter.rank for adapter in second.plan] == [2, 0]
    assert [p.requires_grad for p in second.adapters.parameters()] == [True] * 3 + [False] * 3
    first.use("task")
    torch.testing.assert_close(second(X)["logits"], first(X)["logits"], rtol=0, atol=0)


def test_starting_values_are_followed() -> None:
    batch = {"x": torch.randn(8, 6), "labels": torch.randint(0, 4, (8,))}
    first, second = make_adapted(), make_adapted()
    ac.initialize_adapters(first, "lora_ga", [batch], lambda model, one: model(**one)["loss"])
    assert any(name.endswith("_start") for name in values_of(first))
    draw_values(first)
    second.load_state_dict(first.state_dict())
    assert second.plan == first.plan
    torch.testing.assert_close(second(X)["logits"], first(X)["logits"], rtol=0, atol=0)


def test_what_is_written_into_a_state_dict_reaches_the_parameters() -> None:
    """Averages of weights work so."""
    adapted = make_adapted()
    for value in adapted.adapters.state_dict().values():
        value.fill_(0.5)
    assert all(bool(p.eq(0.5).all()) for p in adapted.adapters.parameters())


def test_tied_weights_can_be_written(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.head(self.inner(self.table(tokens)))
            return result

    tokens = torch.randint(0, 9, (2, 3))
    adapted = ac.compile_with_adapters(Tied(), (tokens,), config=ac.AdapterConfig(rank=2))
    save_file(adapted.state_dict(), tmp_path / "m.safetensors")
    other = ac.compile_with_adapters(Tied(), (tokens,), config=ac.AdapterConfig(rank=2))
    other.load_state_dict(load_file(tmp_path / "m.safetensors"))
    torch.testing.assert_close(other(tokens), adapted(tokens), rtol=0, atol=0)
