"""Ranks by block and weight, the budget over steps, and the picture of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError
from adapter_compiler.report.rank_figure import draw_ranks
from adapter_compiler.report.ranks import arrange_ranks, trace_budget
from adapter_compiler.training.budget.masking_record import MaskingRecord

RANKS = {
    "embedding.weight": 3,
    "layers.0.attention.query.weight": 2,
    "layers.0.mlp.experts.3.up": 1,
    "layers.10.attention.query.weight": 0,
    "layers.2.attention.query.weight": 4,
    "raw": 5,
}
HISTORY = (
    MaskingRecord(step=20, budget=17, live=17, ranks={**RANKS, "raw": 7}),
    MaskingRecord(step=30, budget=15, live=15, ranks=RANKS),
)


def read_cells(history: Sequence[MaskingRecord]) -> list[list[str]]:
    """The numbers written into each heat map of the figure, in reading order."""
    figure = draw_ranks(arrange_ranks(history[-1].ranks), trace_budget(history), (), "")
    return [[text.get_text() for text in axes.texts] for axes in figure.axes if axes.images]


def test_ranks_are_arranged_by_the_first_number_of_the_name() -> None:
    grid = arrange_ranks(RANKS)
    assert grid.blocks == ("layers.0", "layers.10", "layers.2")
    assert grid.weights == ("attention.query", "mlp.experts.3.up")
    np.testing.assert_array_equal(grid.ranks, [[2, 1], [0, np.nan], [4, np.nan]])
    assert grid.elsewhere == {"embedding": 3, "raw": 5}


def test_layers_of_a_sequential_are_blocks_of_one_weight() -> None:
    grid = arrange_ranks({"0.weight": 2, "2.weight": 1})
    assert (grid.blocks, grid.weights, grid.elsewhere) == (("0", "2"), ("weight",), {})
    np.testing.assert_array_equal(grid.ranks, [[2], [1]])


def test_a_number_that_names_the_parameter_itself_is_no_block() -> None:
    assert arrange_ranks({"weights.0": 2}).elsewhere == {"weights.0": 2}


def test_the_budget_starts_at_step_zero_if_its_start_is_known() -> None:
    curve = trace_budget(HISTORY, 18)
    assert (curve.steps, curve.triplets) == ((0, 20, 30), (18, 17, 15))
    assert trace_budget(HISTORY).steps == (20, 30)


def test_every_rank_is_written_into_its_cell() -> None:
    assert read_cells(HISTORY) == [["2", "1", "0", "4"], ["3", "5"]]


def test_weights_outside_blocks_alone_are_drawn() -> None:
    assert read_cells([MaskingRecord(step=1, budget=3, live=3, ranks={"up.weight": 2, "down.weight": 1})]) == [
        ["2", "1"]
    ]


def test_many_cells_have_a_color_scale_instead_of_numbers() -> None:
    ranks = {f"layers.{i}.{name}.weight": i % 5 for i in range(101) for name in ("q", "k", "v", "o")}
    figure = draw_ranks(
        arrange_ranks(ranks), trace_budget([MaskingRecord(step=1, budget=1, live=1, ranks=ranks)]), (), ""
    )
    heat, scale = figure.axes[0], figure.axes[1]
    assert not heat.texts
    assert scale.get_ylim() == (0, 4)
    assert heat.images[0].get_array().shape == (101, 4)  # type: ignore[union-attr]


def test_the_loss_has_one_value_a_step_and_a_mean_in_its_middle() -> None:
    losses = [float(step) for step in range(1, 61)]
    figure = draw_ranks(arrange_ranks(RANKS), trace_budget(HISTORY), losses, "title")
    raw, mean = (line.get_xydata() for line in figure.axes[-1].lines)
    np.testing.assert_array_equal(raw, [[step, step] for step in range(1, 61)])
    np.testing.assert_allclose(mean, [[step, step] for step in range(2, 60)])  # type: ignore[arg-type]


@pytest.mark.parametrize("losses", [(), (0.5,), tuple(np.linspace(2, 0.1, 40))], ids=["none", "one", "forty"])
def test_the_file_is_a_picture(tmp_path: Path, losses: tuple[float, ...]) -> None:
    path = ac.plot_ranks(HISTORY, tmp_path / "new" / "ranks.png", initial_triplets=18, losses=losses, title="Ranks")
    picture = matplotlib.image.imread(path)
    height, width, _ = picture.shape
    assert (width, height) == (round(10.4 * 130), round(4.8 * 130))
    assert picture[..., :3].std() > 0.05
    assert list(path.parent.iterdir()) == [path]


def test_the_suffix_chooses_the_format(tmp_path: Path) -> None:
    assert ac.plot_ranks(HISTORY, tmp_path / "ranks.svg").read_text().startswith("<?xml")
    with pytest.raises(ConfigError, match=r"no picture format '\.doc'; expected one of .*\.png"):
        ac.plot_ranks(HISTORY, tmp_path / "ranks.doc")
    assert [file.name for file in tmp_path.iterdir()] == ["ranks.svg"]


def test_a_history_without_masking_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"empty history, expected at least one masking; train past"):
        ac.plot_ranks([], tmp_path / "ranks.png")
