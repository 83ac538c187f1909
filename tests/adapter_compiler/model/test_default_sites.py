"""Models of which the default adapts little: a warning says so, and sites="auto" adapts them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(self.stem(x).relu()).mean((2, 3)))
        return result


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layers, self.head = nn.Embedding(20, 8), nn.LSTM(8, 8, num_layers=2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.layers(self.table(x))[0][-1])
        return result


MODELS = {
    "convolutional": (Convolutional, torch.randn(2, 1, 6, 6), 1, 3),
    "recurrent": (Recurrent, torch.randint(0, 20, (5, 2)), 1, 6),
}


@pytest.mark.parametrize("has_example", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize("name", MODELS)
def test_a_default_that_adapts_little_says_so(name: str, has_example: bool, caplog: pytest.LogCaptureFixture) -> None:
    kind, x, few, count = MODELS[name]
    ac.compile_with_adapters(kind(), (x,) if has_example else ())
    found = [record.getMessage() for record in caplog.records if "all-linear" in record.getMessage()]
    assert len(found) == 1
    assert f"sites='all-linear' adapts {few} of the {count} weights that can have an adapter" in found[0]
    assert "AdapterConfig(sites='auto')" in found[0]


@pytest.mark.parametrize("name", MODELS)
def test_auto_adapts_all_of_them(name: str, caplog: pytest.LogCaptureFixture) -> None:
    kind, x, _, count = MODELS[name]
    adapted = ac.compile_with_adapters(kind(), (x,), config=ac.AdapterConfig(rank=2, sites="auto"))
    assert len(adapted.sites) == count
    assert not adapted.rejected
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.3)
    torch.testing.assert_close(adapted.fold()(x), adapted(x))
    assert "all-linear" not in caplog.text


def test_a_model_of_linear_layers_gets_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    ac.compile_with_adapters(model, (torch.randn(2, 4),))
    ac.compile_with_adapters(Convolutional(), (torch.randn(2, 1, 6, 6),), config=ac.AdapterConfig(sites="head"))
    assert "all-linear" not in caplog.text
