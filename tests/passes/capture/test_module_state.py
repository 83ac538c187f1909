"""What a run leaves behind in a module is found, and undone."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from passes.capture.module_state import (
    StateChanges,
    canonical_kernels,
    find_state_changes,
    is_known_hook,
    is_without_memory,
    restored_state,
    runs_more_than_forward,
    without_fast_path,
    without_redundant_moves,
)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = [1]
        self.names = {"a"}
        self.table = {"key": 0}
        self.last = deque([1, 2], maxlen=3)


class Stateful(nn.Module):
    """Attributes of every kind that is watched, here and in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.inner = Inner()
        self.count = 3
        self.scale = 0.5


def add_attribute(module: Stateful) -> None:
    module.extra = torch.zeros(1)


def delete_attribute(module: Stateful) -> None:
    del module.count


def replace_attribute(module: Stateful) -> None:
    module.count = 4


def change_type(module: Stateful) -> None:
    module.count = True


def fill_list(module: Stateful) -> None:
    module.inner.seen.append(2)


def replace_in_list(module: Stateful) -> None:
    module.inner.seen[0] = 2


def fill_set(module: Stateful) -> None:
    module.inner.names.add("b")


def change_dict(module: Stateful) -> None:
    module.inner.table["key"] = 1


def rotate_deque(module: Stateful) -> None:
    module.inner.last.rotate()


CHANGES: list[tuple[Callable[[Stateful], None], str]] = [
    (add_attribute, "extra"),
    (delete_attribute, "count"),
    (replace_attribute, "count"),
    (change_type, "count"),
    (fill_list, "inner.seen"),
    (replace_in_list, "inner.seen"),
    (fill_set, "inner.names"),
    (change_dict, "inner.table"),
    (rotate_deque, "inner.last"),
]
changes = pytest.mark.parametrize(("change", "name"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])


def read_attributes(module: nn.Module) -> dict[str, Any]:
    """Plain attributes by qualified name: which object each is, and what is in it."""
    children = module.named_modules()
    items = [(f"{n}.{key}", value) for n, child in children for key, value in vars(child).items() if key[0] != "_"]
    return {name: (id(value), repr(value)) for name, value in items}


@changes
def test_a_changed_attribute_is_named(change: Callable[[Stateful], None], name: str) -> None:
    module, found = Stateful(), StateChanges()
    with find_state_changes(module, found):
        change(module)
    assert found.attributes == [f"changes its attribute {name}"]
    assert found.others == []
    assert found.first == found.attributes[0]


@changes
def test_a_changed_attribute_is_restored(change: Callable[[Stateful], None], name: str) -> None:
    module = Stateful()
    before = read_attributes(module)
    with restored_state(module):
        change(module)
        assert read_attributes(module) != before, name
    assert read_attributes(module) == before


def test_an_attribute_that_is_set_to_an_equal_number_has_not_changed() -> None:
    module, found = Stateful(), StateChanges()
    with find_state_changes(module, found):
        module.count, module.scale = int("3"), float("0.5")
        module.linear(torch.zeros(1, 2))
        module.norm(torch.zeros(2, 2))  # buffers are not attributes
    assert found.first is None


def test_an_equal_tensor_in_place_of_another_is_a_change() -> None:
    module, found = Stateful(), StateChanges()
    module.cache = torch.zeros(2)
    with find_state_changes(module, found):
        module.cache = torch.zeros(2)
    assert found.attributes == ["changes its attribute cache"]


def test_a_parameter_changed_in_place_is_named() -> None:
    module, found = Stateful(), StateChanges()
    with find_state_changes(module, found), torch.no_grad():
        module.linear.bias.add_(1)
    assert found.others == ["changes its parameter linear.bias in place"]


@pytest.mark.parametrize(
    ("draw", "name"),
    [(random.random, "Python's random module"), (lambda: np.random.rand(), "numpy")],
    ids=["python", "numpy"],
)
def test_a_draw_outside_torch_is_named_and_restored(draw: Callable[[], float], name: str) -> None:
    module, found = Stateful(), StateChanges()
    with restored_state(module), find_state_changes(module, found):
        first = draw()
    assert found.others == [f"draws from the generator of {name}"]
    assert draw() == first


def test_a_draw_from_torch_is_no_change_but_is_restored() -> None:
    module, found = Stateful(), StateChanges()
    with restored_state(module), find_state_changes(module, found):
        first = torch.rand(3)
    assert found.first is None
    assert torch.equal(torch.rand(3), first)


def test_buffers_are_restored_in_place_and_when_replaced() -> None:
    module = Stateful()
    mean, count = module.norm.running_mean, module.norm.num_batches_tracked
    assert mean is not None and count is not None
    with restored_state(module):
        module.norm(torch.randn(4, 2))
        assert mean.any() and count == 1
        module.norm.running_mean = torch.full((2,), 7.0)
        module.norm.register_buffer("added", torch.zeros(1))
    assert module.norm.running_mean is mean
    assert not mean.any() and count == 0
    assert "added" not in dict(module.named_buffers())


def test_hooks_are_restored() -> None:
    module = Stateful()
    kept = module.linear.register_forward_hook(lambda *_: None)
    with restored_state(module):
        kept.remove()
        module.linear.register_forward_pre_hook(lambda *_: None)
    assert len(module.linear._forward_hooks) == 1
    assert len(module.linear._forward_pre_hooks) == 0


def test_state_is_restored_after_an_error() -> None:
    module = Stateful()
    with pytest.raises(KeyError), restored_state(module):
        module.count = 9
        module.inner.seen.clear()
        raise KeyError
    assert module.count == 3
    assert module.inner.seen == [1]


def test_what_a_hook_of_torch_computes_is_no_attribute() -> None:
    module, found = nn.utils.spectral_norm(nn.Linear(3, 3)), StateChanges()
    with find_state_changes(module, found):
        module(torch.randn(2, 3))
    assert found.attributes == []
    assert all(map(is_known_hook, module._forward_pre_hooks.values()))
    assert not is_known_hook(lambda *_: None)


def test_modules_without_memory() -> None:
    assert is_without_memory(nn.Linear(2, 2, device="meta"))
    assert not is_without_memory(nn.Linear(2, 2))
    assert not is_without_memory(nn.ReLU())
    assert not is_without_memory(nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2)))


class OwnCall(nn.Linear):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) + 1


def test_modules_whose_call_is_more_than_forward() -> None:
    assert not runs_more_than_forward(nn.Linear(2, 2))
    assert runs_more_than_forward(OwnCall(2, 2))
    hooked = nn.Linear(2, 2)
    hooked.register_full_backward_hook(lambda *_: None)
    assert runs_more_than_forward(hooked)


def test_autocast_and_the_fast_path_are_off_inside_only() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16), canonical_kernels():
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), without_fast_path():
        raise KeyError
    assert torch.backends.mha.get_fastpath_enabled()


def test_only_redundant_moves_are_left_out() -> None:
    original = nn.Module.to
    module = nn.Linear(2, 2)
    with without_redundant_moves():
        assert nn.Module.to is not original
        assert module.to(torch.float32) is module
        assert module.to("cpu", torch.float32) is module
        assert module.to(torch.float64).weight.dtype is torch.float64
    assert nn.Module.to is original
