"""What a notebook shows of models, budgets and reports: their text, with nothing in it taken for HTML."""

from __future__ import annotations

import html
from pathlib import Path

import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.adapters.reports import FoldReport, QuantizationReport, WeightError
from adapter_compiler.training.calibration.start_from_data import SiteStart

NAME = "<b>&layer"


def make_reports() -> list[object]:
    """Each kind of report, with a name in it that would be HTML."""
    error = WeightError(largest=0.25, relative=0.125)
    return [
        FoldReport(rounding_error={NAME: 1e-7}, quantization_error={NAME: error}),
        QuantizationReport(kind="nf4", errors={NAME: error}, skipped={NAME: "small"}, bytes_before=90, bytes_after=30),
        ac.InitializationReport(method="eva", sites={NAME: SiteStart(values=(0.75, 0.125), left_over=0.125)}),
        ac.RateSearch(losses={0.1: 1.0, 0.2: 0.5}, is_inside=False, steps=3),
        ac.IntrinsicDimension(dimension=8, short=4, points=(), base=0.1, full=0.9, target=0.8, weights=100),
        ac.ExportReport(
            path=Path("model.onnx"),
            inputs=(NAME,),
            outputs=("y",),
            dynamic="all",
            dynamic_axes={NAME: (0,)},
            opset=20,
            errors=(),
            not_verified=(),
            fold=None,
        ),
    ]


@pytest.mark.parametrize("report", make_reports(), ids=lambda report: type(report).__name__)
def test_a_report_is_its_text_in_a_notebook(report: object) -> None:
    shown = report._repr_html_()  # type: ignore[attr-defined]
    assert "<b>" not in shown
    assert html.unescape(shown.removeprefix("<pre style='line-height:1.2'>").removesuffix("</pre>")) == str(report)
    assert "object at 0x" not in shown


def test_a_report_says_what_it_holds() -> None:
    fold, packed, start = map(str, make_reports()[:3])
    assert fold.splitlines()[1].split() == ["1.0e-07", NAME]
    assert packed.splitlines()[0] == "1 weights in nf4: 90 bytes before, 30 after"
    assert packed.splitlines()[2:] == [f"     2.5e-01     12.50%  {NAME}", f"not quantized: {NAME}: small"]
    assert start.splitlines()[1] == f"  12.5%  {NAME}: 0.75, 0.125"


def test_a_model_and_a_budget_show_themselves() -> None:
    model = nn.ModuleDict({NAME: nn.Linear(6, 6)})
    adapted = ac.compile_with_adapters(model, config=ac.AdapterConfig(rank=3))
    layer = adapted.module.get_submodule(NAME)
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=1e-3)
    budget = ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=2, total_steps=10))
    assert repr(budget) == "RankBudget(step 0 of 10, 3 of 3 triplets live, budget 3)"
    for shown in (budget._repr_html_(), adapted._repr_html_(), adapted.report()._repr_html_()):
        assert html.escape(NAME) in shown and "<b>" not in shown
    for _ in range(10):
        layer(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert repr(budget) == "RankBudget(step 10 of 10, 2 of 3 triplets live, budget 2)"
    assert str(budget).splitlines()[-1] == f"     2  {NAME}.weight"
