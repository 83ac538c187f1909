"""Changes of weights in length and direction, against the formulas row by row, and the picture of them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError


class Model(nn.Module):
    """A linear layer, one with its weight transposed, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.turned = nn.Parameter(torch.randn(5, 8))
        self.conv = nn.Conv1d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.conv((self.linear(x) @ self.turned).unsqueeze(-1))
        return result


def make(kind: str = "lora") -> tuple[nn.Module, ac.AdaptedModel]:
    torch.manual_seed(0)
    model = Model()
    config = ac.AdapterConfig(rank=2, kind=kind, sites=("linear", "turned", "conv"))
    adapted = ac.compile_with_adapters(model, (torch.randn(3, 6),), config=config)
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, adapted


def expect(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """ΔM and ΔD by a loop over the rows."""
    lengths, turns = [], []
    for old, new in zip(before.double().flatten(1), after.double().flatten(1), strict=True):
        first, second = math.sqrt(sum(float(v) ** 2 for v in old)), math.sqrt(sum(float(v) ** 2 for v in new))
        lengths.append(abs(second - first))
        turns.append(1 - sum(float(a) * float(b) for a, b in zip(old, new, strict=True)) / (first * second))
    return sum(lengths) / len(lengths), sum(turns) / len(turns)


@pytest.mark.parametrize("kind", ["svd", "lora", "dora"])
def test_changes_are_those_of_the_formula(kind: str) -> None:
    model, adapted = make(kind)
    folded = dict(adapted.fold().named_parameters())
    report = adapted.fold_report
    found = ac.measure_weight_changes(adapted)
    assert adapted.fold_report is report
    assert set(found) == {"linear.weight", "turned", "conv.weight"}
    for name, change in found.items():
        before, after = model.get_parameter(name).detach(), folded[name].detach()
        if name == "turned":
            before, after = before.t(), after.t()
        assert (change.magnitude, change.direction) == pytest.approx(expect(before, after), rel=1e-5)
        assert change.magnitude > 1e-3 and change.direction > 1e-3


def test_dora_turns_a_row_without_changing_its_length() -> None:
    """As long as its magnitudes have not moved, which the form keeps apart from the directions."""
    _, adapted = make("dora")
    with torch.no_grad():
        for adapter in adapted.plan:
            parameters = adapted.adapters.parameters_of(adapter)
            weight = adapted.base_weight(adapter.site.weight)
            rows = weight.t() if adapter.site.transposed else weight.flatten(1)
            parameters["magnitude"].copy_(rows.norm(dim=1))
    for change in ac.measure_weight_changes(adapted).values():
        assert change.magnitude < 1e-5 < change.direction


def test_a_module_that_was_trained_fully_is_compared_with_its_base() -> None:
    model, _ = make()
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.get_parameter("linear.weight").mul_(1.5)
        trained.get_parameter("turned").neg_()
    found = ac.measure_weight_changes(trained, model)
    assert list(found) == ["turned", "linear.weight", "conv.weight"]
    assert found["linear.weight"].direction == pytest.approx(0, abs=1e-12)
    assert found["linear.weight"].magnitude == pytest.approx(
        0.5 * float(model.get_parameter("linear.weight").detach().norm(dim=1).mean()), rel=1e-6
    )
    assert (found["turned"].magnitude, found["turned"].direction) == pytest.approx((0, 2))
    assert (found["conv.weight"].magnitude, found["conv.weight"].direction) == pytest.approx((0, 0), abs=1e-12)


def test_weights_that_a_parametrization_computes_are_measured() -> None:
    torch.manual_seed(0)
    layer: nn.Linear = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    model, before = nn.Sequential(layer), layer.weight.detach().clone()
    adapted = ac.compile_with_adapters(model, (torch.randn(3, 6),), config=ac.AdapterConfig(rank=2))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    found = ac.measure_weight_changes(adapted)["0.weight"]
    after = adapted.fold(parametrized="remove").get_parameter("0.weight").detach()
    assert (found.magnitude, found.direction) == pytest.approx(expect(before, after), rel=1e-4)


def test_rows_of_zeros_turn_by_nothing() -> None:
    base, trained = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        base.weight.zero_()
    found = ac.measure_weight_changes(trained, base)["weight"]
    assert found.direction == 0
    assert found.magnitude == pytest.approx(float(trained.weight.detach().norm(dim=1).mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Linear(2, 2),), r"trained=...\) is a Linear, expected an AdaptedModel, or the module as it was"),
        ((nn.Linear(2, 2), nn.Linear(3, 2)), r"weight has shape \(2, 2\), \(2, 3\) before"),
        (
            (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))),
            "weight is a parameter of the trained module, expected one of both",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ac.measure_weight_changes(*arguments)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is a parameter of neither module"):
        ac.measure_weight_changes(make()[1], weights=("nothing",))


def test_the_picture_has_a_color_for_each_label(tmp_path: Path) -> None:
    changes = {kind: ac.measure_weight_changes(make(kind)[1]) for kind in ("lora", "dora")}
    path = ac.plot_weight_changes(changes, tmp_path / "changes.png", title="Two forms")
    pixels = matplotlib.image.imread(path)
    colors = {tuple(color) for color in (pixels[..., :3].reshape(-1, 3) * 255).round().astype(int)}
    assert pixels.shape[1] > 400 and len(colors) > 50
    assert [one.name for one in tmp_path.iterdir()] == ["changes.png"]


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [({}, "a.png", "got no changes"), ({"lora": {}}, "a.png", "got no changes"), (None, "a.xyz", "no picture format")],
)
def test_a_picture_of_nothing_is_refused(changes: Any, name: str, message: str, tmp_path: Path) -> None:
    given = {"lora": ac.measure_weight_changes(make()[1])} if changes is None else changes
    with pytest.raises(ConfigError, match=message):
        ac.plot_weight_changes(given, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
