"""Each call finds the graph that is right for it, or gets one: never a wrong answer."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac


class Net(nn.Module):
    """Behaves differently by mode, flags, sizes and what is None."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, twice: bool = False, power: int = 1) -> dict[str, Any]:
        y = self.drop(self.inner(x))
        if mask is not None:
            y = y * mask.unsqueeze(-1)
        if twice:
            y = self.inner(y)
        if x.shape[0] % 2 == 0:
            y = y + 1
        if x.shape[1] > 8:
            y = y * 2
        return {"y": y**power, "power": power, "mask": None}


def adapt(model: nn.Module, *args: Any, max_variants: int = 16) -> ac.AdaptedModel:
    torch.manual_seed(0)
    config = ac.AdapterConfig(rank=2, alpha=2, max_variants=max_variants)
    adapted = ac.compile_with_adapters(model, args, config=config)
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_()
    return adapted


@pytest.fixture
def adapted() -> ac.AdaptedModel:
    torch.manual_seed(0)
    return adapt(Net().eval(), torch.randn(3, 5, 4))


def assert_right(adapted: ac.AdaptedModel, *args: Any, **kwargs: Any) -> None:
    """The call gives what the folded model gives: eager code of the user's own class."""
    merged = adapted.fold()
    torch.manual_seed(3)
    expected = merged(*args, **kwargs)
    torch.manual_seed(3)
    found = adapted(*args, **kwargs)
    assert found.keys() == expected.keys()
    assert found["power"] == expected["power"]
    assert found["mask"] is None
    torch.testing.assert_close(found["y"], expected["y"], rtol=1e-4, atol=1e-4)


SHAPES = [(3, 5), (7, 5), (3, 7), (2, 5), (4, 5), (1, 5), (3, 8), (3, 9), (4, 12), (1, 1), (6, 1), (5, 30)]


def test_every_shape_is_answered_right(adapted: ac.AdaptedModel) -> None:
    for batch, length in SHAPES:
        assert_right(adapted, torch.randn(batch, length, 4))
    # odd batches up to length 8 share the first graph; none of the others is served by it
    captured = len(adapted.variants)
    assert 4 <= captured <= 10
    for batch, length in SHAPES:
        assert_right(adapted, torch.randn(batch, length, 4))
    assert len(adapted.variants) == captured


def test_another_batch_and_length_share_a_graph(adapted: ac.AdaptedModel) -> None:
    for batch, length in [(3, 5), (5, 6), (9, 8), (7, 2)]:
        assert_right(adapted, torch.randn(batch, length, 4))
    assert len(adapted.variants) == 1


@pytest.mark.parametrize(("shape", "guard"), [((4, 5, 4), "even batch"), ((3, 9, 4), "long"), ((1, 5, 4), "one row")])
def test_specialised_shapes_get_another_graph(adapted: ac.AdaptedModel, shape: tuple[int, ...], guard: str) -> None:
    assert len(adapted.variants) == 1
    assert_right(adapted, torch.randn(shape))
    assert len(adapted.variants) == 2, guard


def test_modes_have_graphs_of_their_own(adapted: ac.AdaptedModel) -> None:
    x = torch.randn(3, 5, 4)
    adapted.train()
    assert_right(adapted, x)
    assert not torch.equal(adapted(x)["y"], adapted(x)["y"])
    adapted.eval()
    assert torch.equal(adapted(x)["y"], adapted(x)["y"])
    assert [variant.training for variant in adapted.variants] == [True, False]


def test_the_mode_of_one_submodule_counts(adapted: ac.AdaptedModel) -> None:
    x = torch.randn(3, 5, 4)
    adapted.train()
    adapted.module.get_submodule("drop").eval()
    assert torch.equal(adapted(x)["y"], adapted(x)["y"])
    adapted.module.get_submodule("drop").train()
    assert not torch.equal(adapted(x)["y"], adapted(x)["y"])


def test_python_arguments_and_none_make_other_graphs(adapted: ac.AdaptedModel) -> None:
    x, mask = torch.randn(3, 5, 4), torch.ones(3, 5)
    calls: list[dict[str, Any]] = [{}, {"twice": True}, {"power": 2}, {"power": 3}, {"mask": mask}]
    for count, kwargs in enumerate(calls, start=1):
        assert_right(adapted, x, **kwargs)
        assert len(adapted.variants) == count
    assert_right(adapted, x, power=2)
    assert len(adapted.variants) == 5


def test_the_order_of_keywords_does_not_matter(adapted: ac.AdaptedModel) -> None:
    x, mask = torch.randn(3, 5, 4), torch.rand(3, 5)
    assert_right(adapted, x, mask=mask, twice=True)
    count = len(adapted.variants)
    assert_right(adapted, x, twice=True, mask=mask)
    assert_right(adapted, mask=mask, twice=True, x=x)
    assert len(adapted.variants) == count + 1
    assert_right(adapted, twice=True, x=x, mask=mask)
    assert len(adapted.variants) == count + 1


def test_layouts_and_dtypes_are_answered_right(adapted: ac.AdaptedModel) -> None:
    assert_right(adapted, torch.randn(5, 3, 4).transpose(0, 1))
    assert_right(adapted, torch.randn(3, 5, 8)[..., ::2])
    assert_right(adapted, torch.randn(4).expand(3, 5, 4))


def test_the_number_of_graphs_is_bounded_and_the_oldest_goes(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(3, 5, 4)
    adapted = adapt(Net().eval(), x, max_variants=2)
    with caplog.at_level(logging.WARNING, logger="adapter_compiler"):
        assert_right(adapted, x, power=2)
        assert_right(adapted, x)
        assert "max_variants" not in caplog.text
        assert_right(adapted, x, power=3)
    assert "max_variants=2" in caplog.text
    assert "pass them as tensors" in caplog.text
    assert len(adapted.variants) == 2
    caplog.clear()
    assert_right(adapted, x)
    assert_right(adapted, x, power=3)
    assert "max_variants" not in caplog.text
    assert_right(adapted, x, power=2)
    assert "dropped the graph" in caplog.text


def test_gradients_flow_through_every_variant(adapted: ac.AdaptedModel) -> None:
    x = torch.randn(4, 5, 4)
    adapted(x[:3])["y"].sum().backward()
    one = [p.grad.clone() for p in adapted.trainable_parameters() if p.grad is not None]
    adapted(x)["y"].sum().backward()
    two = [p.grad for p in adapted.trainable_parameters() if p.grad is not None]
    assert len(one) == len(two) == 3
    assert all(not torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_no_grad_and_autocast_around_a_call_are_respected(adapted: ac.AdaptedModel) -> None:
    x = torch.randn(3, 5, 4)
    with torch.no_grad():
        assert not adapted(x)["y"].requires_grad
    assert adapted(x)["y"].requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapted(x)["y"].dtype == adapted.fold()(x)["y"].dtype == torch.bfloat16


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_results_keep_their_containers() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Any, ...]:
            y = self.inner(x)
            return (y, [y, {"same": y}], None, "text", 3)

    adapted = ac.compile_with_adapters(Nested(), (X,))
    y, (again, inner), nothing, text, number = adapted(X)
    assert torch.equal(y, again)
    assert torch.equal(y, inner["same"])
    assert (nothing, text, number) == (None, "text", 3)
