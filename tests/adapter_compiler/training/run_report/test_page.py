"""The report of a run: its numbers are those of the budget, and a browser shows it on a phone, in light and dark."""

from __future__ import annotations

import dataclasses
import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import adapter_compiler as ac
from adapter_compiler.cli.main import app
from adapter_compiler.training.run_report.page import render_page
from adapter_compiler.training.run_report.run_data import Extras, MaskingData, RunData, SiteData

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TITLE = 'Ranks of <script>alert("x")</script> & more'


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(torch.tanh(self.up(x)))
        return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        y: torch.Tensor = self.head(x)
        return y


@dataclasses.dataclass
class Trained:
    adapted: ac.AdaptedModel
    optimizer: torch.optim.Optimizer
    budget: ac.RankBudget
    losses: list[float]


def train(**options: Any) -> Trained:
    torch.manual_seed(0)
    x, y = torch.randn(32, 6), torch.randn(32, 4)
    adapted = ac.compile_with_adapters(Model(), (x,), config=ac.AdapterConfig(rank=4))
    optimizer = adapted.make_optimizer(0.01)
    schedule = ac.BudgetSchedule(
        **{"target_rank": 2, "total_steps": 30, "warmup_steps": 4, "final_steps": 10, "interval": 4} | options
    )
    budget = ac.RankBudget(adapted, optimizer, schedule)
    losses = []
    for _ in range(30):
        loss = (adapted(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        budget.note_loss(losses[-1])
    adapted.fold()
    return Trained(adapted=adapted, optimizer=optimizer, budget=budget, losses=losses)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train()


class Reader(HTMLParser):
    """The tables of a page by heading, its text, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self._heading = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag != "meta":
            self._open.append(tag)
        if tag == "h2":
            self._heading = ""
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self._heading][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._open and self._open[-1] == "h2":
            self._heading += data
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[self._heading][-1][-1] += data


def read(trained: Trained, path: Path, **options: Any) -> Reader:
    written = trained.budget.report(path, losses=trained.losses, title=TITLE, **options)
    assert written == path
    return Reader(path.read_text(encoding="utf-8"))


def test_it_loads_nothing_and_runs_nothing(trained: Trained, tmp_path: Path) -> None:
    page = read(trained, tmp_path / "run.html")
    assert page.loads == []
    assert "script" not in page.tags
    text = (tmp_path / "run.html").read_text()
    assert not re.search(r"https?:|url\(|@import", text)
    assert TITLE in page.words


def test_the_numbers_are_the_budgets(trained: Trained, tmp_path: Path) -> None:
    page = read(trained, tmp_path / "run.html")
    ranks = trained.budget.ranks()
    assert "7 weights have adapters. Step 30 of 30." in page.words
    assert "The budget pruned 14 of 28 triplets (50%), to an average rank of 2.00" in page.words
    assert f"{trained.budget.live_parameters:,} values are live. The set of live triplets is fixed." in page.words
    pruned = {row[0]: row for row in page.tables["What was pruned, and why"][1:]}
    assert {name: row[2] for name, row in pruned.items()} == {name: f"4 → {rank}" for name, rank in ranks.items()}
    for name, row in pruned.items():
        changes = [(a, b) for a, b in zip([None, *trained.budget.history], trained.budget.history, strict=False)]
        steps = [
            now.step for before, now in changes if now.ranks[name] != (4 if before is None else before.ranks[name])
        ]
        assert row[3] == (f"step {steps[-1]}" if steps else "never")
        # Nothing else than the scores decided, so no pruned triplet has a larger one than the least that was kept.
        assert row[5] == "–" or float(row[5].removesuffix("×")) <= 1
    shares = [float(row[4].removesuffix("%")) for row in pruned.values()]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_the_spectra_are_those_of_the_updates(trained: Trained, tmp_path: Path) -> None:
    page = read(trained, tmp_path / "run.html")
    rows = {row[0]: row for row in page.tables["Spectra of the updates"][1:]}
    for adapter in trained.adapted.plan:
        parameters = trained.adapted.adapters.parameters_of(adapter)
        values = torch.linalg.svdvals(adapter.form.delta(parameters, adapter.scale).detach())
        row = rows[adapter.site.name]
        assert float(row[3]) == pytest.approx(float(values[0]), rel=5e-3)
        assert float(row[4]) == pytest.approx(float(values.square().sum() ** 2 / values.pow(4).sum()), abs=0.06)


def test_curve_fold_and_export_are_shown_if_they_are_given(trained: Trained, tmp_path: Path) -> None:
    point = SimpleNamespace(values=1234.0, score=0.875, error=0.01)
    curve: Any = SimpleNamespace(points=[point, SimpleNamespace(values=5000.0, score=0.9, error=None)])
    curve.target, curve.recommended = 0.86, point
    error = SimpleNamespace(case="batch 5", output="logits", max_abs=2.5e-7, max_rel=1e-7)
    export: Any = SimpleNamespace(errors=[error])
    page = read(trained, tmp_path / "run.html", search=curve, export=export)
    assert "1,234 values with a score of 0.875" in page.words
    assert ["batch 5", "logits", "2.50e-07", "1.00e-07"] in page.tables["Folding and export"]
    worst = max(trained.adapted.fold_report.rounding_error.values()) if trained.adapted.fold_report else 0
    assert f"largest rounding error {worst:.2e}" in page.words


@pytest.mark.parametrize("options", [{"compact": True}, {"target_rank": None, "target_parameters": 200}])
def test_after_compaction_and_with_a_budget_in_parameters(options: dict[str, Any], tmp_path: Path) -> None:
    found = train(**options)
    page = read(found, tmp_path / "run.html")
    assert ("not in memory any more" in page.words) == ("compact" in options)
    rows = page.tables["What was pruned, and why"][1:]
    assert {row[0]: row[2] for row in rows} == {name: f"4 → {rank}" for name, rank in found.budget.ranks().items()}


def test_the_alignment_over_steps_is_the_realigners(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = torch.randn(32, 6), torch.randn(32, 4)
    adapted = ac.compile_with_adapters(Model(), batch[:1], config=ac.AdapterConfig(rank=4))
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.02)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    budget = ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=3, total_steps=12))
    realigner = ac.Realigner(adapted, optimizer, realign_every=4, batches=[batch], loss=loss, threshold=1.25)
    page = Reader(budget.report(tmp_path / "before.html", realigner=realigner).read_text(encoding="utf-8"))
    assert "Alignment with the gradient" not in page.words
    for _ in range(12):
        loss(adapted, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [step for step, _ in realigner.history] == [4, 8, 12]
    text = budget.report(tmp_path / "run.html", realigner=realigner).read_text(encoding="utf-8")
    _, *rows = Reader(text).tables["Alignment with the gradient"]
    expected = sorted(realigner.history[-1][1].items(), key=lambda item: item[1])
    assert rows == [[name, f"{value:.3f}"] for name, value in expected[:10]]
    assert "re-aligned below this" in text
    assert "at step 12" in text


def test_a_run_that_has_not_pruned_yet(tmp_path: Path) -> None:
    adapted = ac.compile_with_adapters(Model(), (torch.randn(2, 6),), config=ac.AdapterConfig(rank=4))
    schedule = ac.BudgetSchedule(target_rank=2, total_steps=30)
    budget = ac.RankBudget(adapted, adapted.make_optimizer(0.01), schedule)
    page = Reader(budget.report(tmp_path / "run.html").read_text())
    assert "Nothing has been pruned yet." in page.words
    assert "What was pruned, and why" not in page.tables


def test_the_command_reads_a_saved_state(trained: Trained, tmp_path: Path) -> None:
    ac.save_training_state(tmp_path / "run", trained.adapted, trained.optimizer, trained.budget)
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "-o", str(tmp_path / "saved.html")])
    assert result.exit_code == 0, result.output
    assert "The budget pruned" in result.output
    saved = Reader((tmp_path / "saved.html").read_text())
    live = read(trained, tmp_path / "live.html")
    assert saved.tables["Spectra of the updates"] == live.tables["Spectra of the updates"]
    pairs = zip(*(page.tables["What was pruned, and why"][1:] for page in (saved, live)), strict=True)
    assert all((a[0], a[2], a[3]) == (b[0], b[2], b[3]) for a, b in pairs)
    assert f"{trained.budget.live_parameters:,} values are live" in saved.words


def test_a_state_without_a_budget_is_refused(tmp_path: Path) -> None:
    adapted = ac.compile_with_adapters(Model(), (torch.randn(2, 6),), config=ac.AdapterConfig(rank=4))
    ac.save_training_state(tmp_path, adapted, adapted.make_optimizer(0.01))
    result = CliRunner().invoke(app, ["report", str(tmp_path), "-o", str(tmp_path / "run.html")])
    assert result.exit_code == 1
    assert "was saved without a budget, expected one" in result.output
    assert not (tmp_path / "run.html").exists()


def make_large() -> RunData:
    """Many blocks with long names, and a long loss curve."""
    names = [f"model.encoder.layers.{i}.self_attention.projection.weight" for i in range(24)]
    sites = [
        SiteData(
            name=name, block=name.split(".self")[0], role="attention.query", shape=(64, 64), before=8, after=4,
            singular_values=(3.0, 2.0, 1.0, 0.5, 0, 0, 0, 0), scores=(1.0,) * 4, pruned_scores=(0.5,) * 4,
        )
        for name in names
    ]  # fmt: skip
    maskings = [
        MaskingData(step=10 * n, budget=192 - n, live=192 - n, ranks=dict.fromkeys(names, 8 - n // 16))
        for n in range(60)
    ]
    losses = [1 / (1 + n / 500) for n in range(5000)]
    return RunData(title="A large run", sites=sites, maskings=maskings, step=600, total_steps=600, losses=losses)


def browse(page: str, folder: Path, width: int, *options: str) -> str:
    """What a browser makes of the page in a frame of this width, as the attributes of the outer body."""
    measure = (
        "const d=f.contentDocument.documentElement;document.body.dataset.width=d.scrollWidth;"
        "document.body.dataset.back=f.contentWindow.getComputedStyle(f.contentDocument.body).backgroundColor"
    )
    frame = f'<iframe id="f" width="{width}" height="800" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
    outer = f"<body>{frame}<script>f.onload=()=>{{{measure}}}</script></body>"
    (folder / "outer.html").write_text(outer, encoding="utf-8")
    return run_browser(folder / "outer.html", "--dump-dom", "--virtual-time-budget=3000", *options)


def run_browser(file: Path, *options: str) -> str:
    assert CHROMIUM is not None
    common = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={file.parent / 'profile'}")
    command = [CHROMIUM, *common, *options, file.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_it_on_a_phone_in_light_and_dark(tmp_path: Path) -> None:
    page = render_page(make_large(), Extras())
    backgrounds = []
    for scheme in (1, 0):
        found = browse(page, tmp_path, 360, f"--blink-settings=preferredColorScheme={scheme}")
        width, back = re.search(r'data-width="(\d+)"', found), re.search(r'data-back="rgb\(([^)]*)\)"', found)
        assert width is not None
        assert back is not None
        assert int(width[1]) <= 360, "nothing makes the page wider than a phone; tables scroll by themselves"
        backgrounds.append(sum(map(int, back[1].split(","))) / 3)
    light, dark = backgrounds
    assert light > 200
    assert dark < 60


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_draws_the_charts(tmp_path: Path) -> None:
    (tmp_path / "run.html").write_text(render_page(make_large(), Extras()), encoding="utf-8")
    picture = tmp_path / "run.png"
    run_browser(tmp_path / "run.html", f"--screenshot={picture}", "--window-size=900,1600")
    pixels: Any = matplotlib.image.imread(picture)[..., :3]
    blue = np.abs(pixels - np.array([0x26, 0x5C, 0xB2]) / 255).max(-1) < 0.05
    assert blue.sum() > 500, "lines and cells have the color of the style"
    assert pixels.std() > 0.05


def test_text_of_names_is_escaped() -> None:
    site = SiteData(name="<b>&", block="", role='"q"', shape=(2, 2), before=2, after=1, singular_values=(1.0,))
    masking = MaskingData(step=1, budget=1, live=1, ranks={"<b>&": 1})
    text = render_page(RunData(title="<i>", sites=[site], maskings=[masking]), Extras())
    assert "<b>" not in text
    assert "<i>" not in text
    assert "&lt;b&gt;&amp;" in text
