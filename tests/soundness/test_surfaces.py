"""What else looks at an adapted model: its training mode, indices, event loops, fx, C++'s fast path."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.soundness.common import WIDTH, adapt, make, seed
from tests.soundness.oracle import Oracle, assert_close


def compute(net: Any, x: Tensor) -> Any:
    return net.second(torch.tanh(net.first(x)) @ net.raw)


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.raw = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x) @ self.raw
        return y * 2 if self.training else y


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True), 2)

    def forward(self, x: Tensor) -> Any:
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[0, -2:] = mask[1, -1:] = True
        return self.encoder(x, src_key_padding_mask=mask)


def adapt_seeded(model: nn.Module, x: Tensor, **options: Any) -> tuple[Any, Any]:
    adapted = adapt(model, (x,), **options)
    return adapted, Oracle(adapted, model).model


def test_the_training_mode_is_that_of_the_module() -> None:
    seed(1)
    x = torch.randn(3, WIDTH)
    adapted, oracle = adapt_seeded(Moody().eval(), x)
    adapted.training = oracle.training = True
    assert_close(adapted(x), oracle(x))
    adapted.module.eval()
    oracle.eval()
    assert not adapted.training
    assert_close(adapted(x), oracle(x))
    assert adapted.train().training
    assert adapted.module.training


def test_indices_and_iteration() -> None:
    seed(1)
    x = torch.randn(3, WIDTH)
    adapted, oracle = adapt_seeded(nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(3)]), x)
    assert len(adapted) == 3
    assert_close([adapted[0](x), adapted[1:](x)], [oracle[0](x), oracle[1:](x)])
    assert_close([layer(x) for layer in adapted], [layer(x) for layer in oracle])
    del adapted[1], oracle[1]
    assert_close(adapted(x), oracle(x))
    assert_close(adapted.fold()(x), oracle(x))
    assert not hasattr(adapt_seeded(Moody(), x)[0], "__len__")


def test_tasks_of_an_event_loop_disable_adapters_for_themselves() -> None:
    seed(1)
    model, x = make(compute)(), torch.randn(3, WIDTH)
    adapted, oracle = adapt_seeded(model, x)
    outputs = {}

    async def without() -> None:
        with adapted.disable_adapters():
            await asyncio.sleep(0.02)
            outputs["without"] = adapted(x)

    async def plain() -> None:
        await asyncio.sleep(0.01)
        outputs["with"] = adapted(x)

    async def both() -> None:
        await asyncio.gather(without(), plain())

    asyncio.run(both())
    assert_close(outputs, {"with": oracle(x), "without": model(x)})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
def test_frozen_adapters_use_the_fast_path_of_eager_code() -> None:
    seed(1)
    x = torch.randn(2, 5, WIDTH)
    adapted, oracle = adapt_seeded(Padded().eval(), x)
    assert_close(adapted(x), oracle(x))
    oracle.requires_grad_(False)
    adapted.adapters.requires_grad_(False)
    expected = oracle(x)
    assert (expected[0, -2:] == 0).all()
    assert_close(adapted(x), expected)


def test_names_of_the_users_own() -> None:
    """Attributes of the user's modules may have the names of ours."""
    seed(1)
    x = torch.randn(3, WIDTH)
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0))
    for layer in model:
        layer.users_class, layer.made_with, layer._adapted_weights = 1, 2, 3
    adapted, oracle = adapt_seeded(model, x)
    assert_close(adapted(x), oracle(x))
    assert_close(adapted.fold()(x), oracle(x))
