"""A training state is taken over whole or not at all, wherever loading it stops; and so are saved adapters."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.primitives.adapter_file import FILE_NAME
from adapter_compiler.training.training_state import TRAINING_FILE
from tests.adapter_compiler.saving.same_bits import assert_same_bits

PACKAGES = ("adapter_compiler", "passes")
HANDING_ON = (
    "adapter_compiler/adapters/parameters/adapter_parameters.py",
    "random_state.py",
    "budget/state.py",
    "realign.py",
)


class Net(nn.Module):
    """Running statistics, dropout, a head that is trained fully."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.2)
        self.down, self.head = nn.Linear(9, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(torch.tanh(self.norm(self.up(x))))
        y: torch.Tensor = self.head(torch.tanh(self.down(x)))
        return y


class Log:
    """Something with a state that is changed in place, and that can be told to refuse one."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.inner = {"total": torch.zeros(2)}
        #: When to refuse the next states; a list, as taking from it is not undone.
        self.fails: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "total": self.inner["total"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        fails = self.fails.pop() if self.fails else None
        if fails == "at once":
            raise RuntimeError("no room")
        self.seen.clear()
        if fails == "half-way":
            raise KeyError("total")
        self.seen.extend(state["seen"])
        self.inner["total"].copy_(state["total"])
        if fails == "at the end":
            raise ValueError("odd total")


class Run:
    """A run that has everything that can be saved."""

    def __init__(
        self, *, budget: bool = True, compact: bool = True, start: str | None = None, lr: float = 0.01
    ) -> None:
        torch.manual_seed(7)
        config = ac.AdapterConfig(rank=4, gamma=0.05, trainable=("head*",), init=start)
        self.adapted = ac.compile_with_adapters(Net(), (torch.randn(8, 6),), config=config)
        self.optimizer = torch.optim.AdamW(self.adapted.trainable_parameters(), lr=lr)
        schedule = ac.BudgetSchedule(
            target_rank=1.5,
            total_steps=12,
            warmup_steps=1,
            final_steps=6,
            interval=2,
            compact=compact,
            allocation=ac.Allocation(grow=0.25),
        )
        self.budget = ac.RankBudget(self.adapted, self.optimizer, schedule) if budget else None
        self.average: Any = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
        self.log = Log()
        self.others: dict[str, Any] = {
            "scheduler": torch.optim.lr_scheduler.SequentialLR(
                self.optimizer,
                [
                    torch.optim.lr_scheduler.ConstantLR(self.optimizer),
                    torch.optim.lr_scheduler.StepLR(self.optimizer, 2),
                ],
                [3],
            ),
            "scaler": torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3),
            "realigner": ac.Realigner(self.adapted, self.optimizer, realign_every=4),
            "average": self.average,
            "log": self.log,
        }
        self.micro = 0

    def advance(self, micro_steps: int) -> None:
        """Two micro-steps a step, so that gradients are being accumulated half of the time."""
        for _ in range(micro_steps):
            generator = torch.Generator().manual_seed(self.micro)
            x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
            self.others["scaler"].scale((self.adapted(x) - y).square().mean()).backward()
            self.micro += 1
            if self.micro % 2 == 0:
                self.others["scaler"].step(self.optimizer)
                self.others["scaler"].update()
                self.others["scheduler"].step()
                self.optimizer.zero_grad()
            self.log.seen.append(float(self.micro))
            self.log.inner["total"] += self.micro
            self.average.module.weight.detach().add_(1)

    def save(self, folder: Path) -> None:
        ac.save_training_state(folder, self.adapted, self.optimizer, self.budget, **self.others)

    def load(self, folder: Path) -> None:
        ac.load_training_state(folder, self.adapted, self.optimizer, self.budget, **self.others)

    def snapshot(self) -> dict[str, Any]:
        """Everything that can be seen of the run, as copies."""
        gradients = {name: p.grad for name, p in self.adapted.named_parameters()}
        numbers: Any = np.random.get_state()
        return copy.deepcopy(
            {
                "model": self.adapted.state_dict(),
                "gradients": {name: g for name, g in gradients.items() if g is not None},
                "trains": [name for name, p in self.adapted.named_parameters() if p.requires_grad],
                "ranks": [(adapter.form.name, adapter.rank) for adapter in self.adapted.plan],
                "optimizer": self.optimizer.state_dict(),
                "budget": None if self.budget is None else self.budget.state_dict(),
                "others": {name: other.state_dict() for name, other in self.others.items()},
                "random": (torch.get_rng_state(), random.getstate(), numbers[1].tolist(), numbers[2:]),
            }
        )

    def places(self) -> list[Any]:
        """Which objects and which memory everything is in."""
        parameters = list(self.adapted.parameters())
        flat = self.adapted.adapters.flat
        return [
            [(id(p), p.data_ptr(), id(p.grad)) for p in parameters],
            [type(module) for module in self.adapted.modules()],
            [id(group) for group in self.optimizer.param_groups],
            [(id(p), key, id(value)) for p, held in self.optimizer.state.items() for key, value in held.items()],
            None if flat is None else [buffer.data_ptr() for buffer in flat[1]],
        ]


class Stop(BaseException):
    """Stands for Ctrl-C, at one line."""


def stop_at(number: int, error: type[BaseException]) -> tuple[Callable[..., Any], list[str]]:
    """A trace function that raises at the n-th line of ours that is run, and the lines that it has seen."""
    seen: list[str] = []

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            return trace if frame.f_globals.get("__name__", "").startswith(PACKAGES) else None
        if event == "line":
            seen.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            if len(seen) == number + 1:
                raise error(f"at {seen[-1]}")
        return trace

    return trace, seen


def load_traced(run: Run, folder: Path, trace: Callable[..., Any]) -> None:
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run.load(folder)
    finally:
        sys.settrace(before)


def find_stops(run: Run, folder: Path, share: float) -> list[int]:
    """When a share of our lines is run for the first and for the last time; of those that hand states on, all."""
    trace, seen = stop_at(-2, Stop)
    load_traced(run, folder, trace)
    first = {line: number for number, line in reversed(list(enumerate(seen)))}
    last = {line: number for number, line in enumerate(seen)}
    dice = random.Random(0)
    chosen = [line for line in first if dice.random() < share or line.partition(":")[0].endswith(HANDING_ON)]
    return sorted({number for line in chosen for number in (first[line], last[line])})


SITUATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "compacted": ({}, {}, 16),
    "not compacted": ({"compact": False}, {"compact": False}, 16),
    "no budget": ({"budget": False}, {"budget": False}, 6),
    "another start": ({"budget": False, "start": "pissa"}, {"budget": False}, 6),
    "a start that goes": ({"budget": False}, {"budget": False, "start": "pissa"}, 6),
}


@pytest.fixture(params=SITUATIONS)
def situation(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """What a run is made like, and the state of another one to be loaded into it."""
    saved, own, steps = SITUATIONS[request.param]
    other = Run(**saved)
    other.advance(steps)
    np.random.seed(4)
    other.save(tmp_path)
    yield own, tmp_path


def check_stops(own: dict[str, Any], folder: Path, share: float) -> None:
    """Loading stops at a share of our lines: everything is as before, and training goes on as if nothing had been."""
    run, copied, rehearsal = Run(**own), Run(**own), Run(**own)
    for one in (copied, run, rehearsal):
        torch.manual_seed(1)
        one.advance(5)
    dice = random.Random(0)
    stops = find_stops(rehearsal, folder, share)
    torch.manual_seed(2)
    before, places = run.snapshot(), run.places()
    for number in stops:
        error = dice.choice([Stop, RuntimeError, torch.OutOfMemoryError])
        trace, seen = stop_at(number, error)
        with pytest.raises((Stop, CheckpointError, RuntimeError)) as caught:
            load_traced(run, folder, trace)
        assert len(seen) == number + 1
        # Python's with statement itself does not hold against what is raised as it ends.
        assert torch.is_grad_enabled(), str(caught.value)
        assert_same_bits(run.snapshot(), before, str(caught.value))
        assert run.places() == places, str(caught.value)
    assert len(stops) > 20
    for one in (copied, run):
        torch.manual_seed(3)
        one.advance(7)
    random.setstate(before["random"][1])
    found, expected = run.snapshot(), copied.snapshot()
    del found["random"], expected["random"]
    assert_same_bits(found, expected)


def test_wherever_loading_stops_everything_is_as_it_was(situation: tuple[dict[str, Any], Path]) -> None:
    check_stops(*situation, share=0.02)


@pytest.mark.slow
def test_at_each_line_at_which_loading_stops_everything_is_as_it_was(situation: tuple[dict[str, Any], Path]) -> None:
    check_stops(*situation, share=1)


@pytest.mark.parametrize("fails", ["at once", "half-way", "at the end"])
@pytest.mark.parametrize("name", ["first", "last"])
def test_another_object_that_refuses_its_state_leaves_all_as_it_was(name: str, fails: str, tmp_path: Path) -> None:
    saved, run = Run(), Run()
    for one, steps in ((saved, 16), (run, 5)):
        if name == "first":
            one.others = {"log": one.others.pop("log"), **one.others}
        one.advance(steps)
    saved.save(tmp_path)
    before, places = run.snapshot(), run.places()
    run.log.fails.append(fails)
    with pytest.raises(
        CheckpointError, match=r"the state of 'log' \(Log\) could not be taken over .*, expected"
    ) as caught:
        run.load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / TRAINING_FILE))
    assert_same_bits(run.snapshot(), before)
    assert run.places() == places
    run.load(tmp_path)
    assert_same_bits(run.snapshot(), saved.snapshot())


def test_an_object_that_does_not_take_its_own_state_back_is_named_and_the_rest_is_as_it_was(tmp_path: Path) -> None:
    saved, run = Run(), Run()
    saved.advance(16)
    saved.save(tmp_path)
    run.advance(5)
    before = run.snapshot()

    class Stubborn(Log):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen.append(1.0)
            raise RuntimeError("never")

    stubborn = Stubborn()
    run.others["log"] = stubborn
    with pytest.raises(CheckpointError, match=r"'log' \(Stubborn\) does not take back the state that it had .*never"):
        run.load(tmp_path)
    run.others["log"] = run.log
    assert_same_bits(run.snapshot(), before)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_optimizer_that_refuses_its_state_leaves_all_as_it_was(moment: str, tmp_path: Path) -> None:
    saved, run = Run(), Run()
    saved.advance(16)
    saved.save(tmp_path)
    run.advance(5)
    before, places = run.snapshot(), run.places()

    def refuse(*_: Any) -> None:
        raise ValueError("no such state")

    register = f"register_load_state_dict_{'pre' if moment == 'before' else 'post'}_hook"
    handle = getattr(run.optimizer, register)(refuse)
    with pytest.raises(CheckpointError, match=r"the state of the optimizer \(AdamW\) could not be .* no such state"):
        run.load(tmp_path)
    handle.remove()
    assert_same_bits(run.snapshot(), before)
    assert run.places() == places


Damage = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]


def rewrite(path: Path, damage: Damage) -> None:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["adapter_compiler"])
    tensors = load_file(path)
    damage(header, tensors)
    save_file(tensors, path, metadata={"adapter_compiler": json.dumps(header), "format": "pt"})


def swap_parameters(header: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
    names = header["optimizer"]["parameters"][0]
    names[0], names[3] = names[3], names[0]


def change_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda _, tensors: tensors.update({name: change(tensors[name])})


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no states": (
        lambda h, _: h.pop("state"),
        "holds the states None, expected gradients, optimizer, budget, others, ra",
    ),
    "no gradients": (lambda h, _: h["state"].pop("gradients"), r"holds the states \['budget', 'optimizer', 'others',"),
    "a list": (lambda h, _: h["state"].update(others=[]), "'others' is a list, expected a dict"),
    "no tensor": (lambda h, t: t.pop("random.torch"), r"what was saved as 'random' .*no tensor random\.torch"),
    "a number for a tensor": (
        lambda h, _: h["state"]["random"]["torch"].update(__tensor__=3),
        "what was saved as 'random' could not be taken over .*has no tensor 3",
    ),
    "two marks": (
        lambda h, _: h["state"]["random"]["python"].update(__items__=[]),
        "__items__, __tuple__ stand beside each other, expected __items__ alone",
    ),
    "no tuple": (
        lambda h, _: h["state"]["random"]["python"].update(__tuple__=3),
        "__tuple__ holds a int, expected a list",
    ),
    "no pairs": (
        lambda h, _: h["state"]["optimizer"].update(state={"__items__": [[1]]}),
        r"__items__ holds \[1\], expected \[key, value\]",
    ),
    "a list as a key": (
        lambda h, _: h["state"]["optimizer"].update(state={"__items__": [[[], 1]]}),
        r"__items__ holds \[\[\], 1\], expected \[key, value\]",
    ),
    "no sites": (lambda h, _: h.update(sites=[]), "its header names no sites"),
    "a site that is none": (
        lambda h, _: h["sites"].update({"up.weight": 3}),
        "site up.weight was saved with form=None",
    ),
    "a rank that is none": (
        lambda h, _: h["sites"]["up.weight"].update(rank=True),
        "site up.weight was saved with rank=True, expected a number of triplets",
    ),
    "a scale that is none": (
        lambda h, _: h["sites"]["up.weight"].update(scale=float("nan")),
        "site up.weight was saved with scale=nan, expected a finite number",
    ),
    "rows that are none": (
        lambda h, _: h["sites"]["up.weight"].update(rows=[3, 1]),
        r"site up.weight was saved with rows=\[3, 1\], expected \[first, end\]",
    ),
    "another version": (
        lambda h, _: h.update(version=2),
        "holds 'training state' of version 2, expected .* of version 1",
    ),
    "no version": (lambda h, _: h.update(version=True), "'training state' of version True, expected .* of version 1"),
    "another kind": (
        lambda h, _: h.pop("kind"),
        "holds 'saved adapters' of version 1, expected 'training state' of ver",
    ),
    "another optimizer": (
        lambda h, _: h["optimizer"].update({"class": "SGD"}),
        "the optimizer's class was SGD, expected AdamW; make the same optimizer, with the parameters in the same order",
    ),
    "another order": (
        swap_parameters,
        r"the optimizer's parameter 0 was adapters\.down\.weight\.P, expected adapters\.up\.weight\.P; make the",
    ),
    "no groups": (
        lambda h, _: h["state"]["optimizer"].pop("param_groups"),
        "the state of the optimizer could not be take",
    ),
    "moments that are none": (
        lambda h, _: h["state"]["optimizer"].update(state={"__items__": [[0, 3]]}),
        "the state of the optimizer could not be taken over .TypeError",
    ),
    "moments of another shape": (
        change_tensor("optimizer.state.0.exp_avg", lambda t: torch.zeros(5)),
        r"the optimizer's exp_avg of adapters\.up\.weight\.P has shape \(5,\), expected that of the parameter, \(9",
    ),
    "another dtype": (
        change_tensor("values.adapters.up.weight.P", torch.Tensor.double),
        "adapters.up.weight.P is torch.float64, this model has torch.float32, expected the same, as training",
    ),
    "another shape": (
        change_tensor("values.adapters.up.weight.P", lambda t: torch.zeros(9, 4)),
        r"adapters.up.weight.P has shape \(9, 4\), this model expects \(9, \d\)",
    ),
    "no value": (lambda _, t: t.pop("values.module.head.bias"), "tensor module.head.bias is on one side only"),
    "a gradient of another shape": (
        change_tensor("gradients.module.head.bias", lambda t: torch.zeros(4)),
        r"the gradient of module.head.bias has \(4,\), expected shape \(3,\)",
    ),
    "a gradient of nothing": (
        lambda h, _: h["state"]["gradients"].update(foot={"__tensor__": "gradients.module.head.bias"}),
        r"the gradient of foot has \(3,\), expected no such parameter",
    ),
    "budget of another schedule": (
        lambda h, _: h["state"]["budget"].update(schedule=3),
        "the state of the budget could not be taken over",
    ),
    "budget of other shapes": (
        change_tensor("budget.sites.up.weight.mask", lambda t: torch.ones(7, dtype=torch.bool)),
        "the state of the budget could not be taken over .*budget state at site up.weight has shapes",
    ),
    "budget without growth": (
        lambda h, _: h["state"]["budget"]["sites"]["up.weight"].pop("growth"),
        "the state of the budget could not be taken over .*at site up.weight has shapes",
    ),
    "half a budget": (
        lambda h, _: h["state"]["budget"].update(history=[{"step": 1}]),
        "the state of the budget could not be taken over .*TypeError",
    ),
    "no random states": (lambda h, _: h["state"].update(random={}), "the states of the random generators could not be"),
    "a short random state": (
        change_tensor("random.torch", lambda t: t[:7].clone()),
        "the states of the random generators could not be taken over .*RuntimeError",
    ),
    "a random state of Python's that is none": (
        lambda h, _: h["state"]["random"].update(python={"__tuple__": [3, {"__tuple__": [1]}, None]}),
        "the states of the random generators could not be taken over .*ValueError",
    ),
    "a random state of numpy's that is none": (
        lambda h, _: h["state"]["random"].update(numpy=[1]),
        "the states of the random generators could not be taken over .*ValueError",
    ),
    "a scheduler's that is none": (
        lambda h, _: h["state"]["others"].update(scheduler={"_schedulers": [{}, {}, {}]}),
        r"the state of 'scheduler' \(SequentialLR\) could not be taken over",
    ),
    "a scaler's that is none": (
        lambda h, _: h["state"]["others"].update(scaler={}),
        r"the state of 'scaler' \(GradScaler\) could not be taken over .*RuntimeError",
    ),
    "a realigner's of other options": (
        lambda h, _: h["state"]["others"]["realigner"].update(every=5),
        "the state of 'realigner' .*every=5, this one has every=4; resume with the same options",
    ),
    "a model's of other shapes": (
        change_tensor("others.average.module.weight", lambda t: torch.ones(3)),
        r"the state of 'average' \(AveragedModel\) could not be taken over .*size mismatch",
    ),
}


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a compacted run with gradients."""
    folder = tmp_path_factory.mktemp("whole")
    saved = Run()
    saved.advance(19)
    saved.save(folder)
    return folder / TRAINING_FILE


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_does_not_fit_changes_nothing(damage: str, whole_file: Path, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    path = tmp_path / TRAINING_FILE
    path.write_bytes(whole_file.read_bytes())
    run = Run()
    run.advance(5)
    before, places = run.snapshot(), run.places()
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        run.load(tmp_path)
    assert str(caught.value).startswith(str(path))
    assert_same_bits(run.snapshot(), before)
    assert run.places() == places


def test_a_file_that_does_not_describe_its_optimizer_is_read(whole_file: Path, tmp_path: Path) -> None:
    path = tmp_path / TRAINING_FILE
    path.write_bytes(whole_file.read_bytes())
    rewrite(path, lambda header, _: header.pop("optimizer"))
    run, expected = Run(), Run()
    run.load(tmp_path)
    expected.load(whole_file.parent)
    assert_same_bits(run.snapshot(), expected.snapshot())


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    run = Run()
    with pytest.raises(CheckpointError, match=r"load_training_state\(adapted=...\) is a Net, expected an AdaptedModel"):
        ac.load_training_state(tmp_path, Net(), run.optimizer)  # type: ignore[arg-type]


def test_an_optimizer_beside_the_first_keeps_its_wide_moments(tmp_path: Path) -> None:
    """Torch casts moments to the parameters' dtypes when they are loaded."""

    def make() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        return parameter, torch.optim.Adam([parameter])

    run, (parameter, beside) = Run(), make()
    beside.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": torch.rand(3), "exp_avg_sq": torch.rand(3)}
    run.others["beside"] = beside
    run.save(tmp_path)
    again, (_, other) = Run(), make()
    again.others["beside"] = other
    again.load(tmp_path)
    assert_same_bits(other.state_dict(), beside.state_dict())


def test_names_with_dots_do_not_stand_for_others(tmp_path: Path) -> None:
    class Dotted(Log):
        def state_dict(self) -> dict[Any, Any]:
            return {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}, "a.b#2": torch.ones(2), 1: torch.ones(3)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.loaded = state

    run, dotted = Run(), Dotted()
    run.others["log"] = dotted
    run.save(tmp_path)
    run.load(tmp_path)
    assert_same_bits(dotted.loaded, dotted.state_dict())


def test_adapters_that_are_refused_late_leave_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, run = Run(start="pissa", budget=False), Run(budget=False)
    for one in (saved, run):
        one.advance(6)
    saved.adapted.save(tmp_path)
    before, places = run.snapshot(), run.places()
    calls: list[Any] = []

    def attach(*arguments: Any) -> Any:
        calls.append(original(*arguments))
        if len(calls) == 1:
            raise RuntimeError("no room")

    original = ac.AdaptedModel._attach
    with monkeypatch.context() as patch:
        patch.setattr(ac.AdaptedModel, "_attach", attach)
        with pytest.raises(
            CheckpointError, match=r"the adapters could not be taken over .RuntimeError: no room"
        ) as caught:
            ac.load_adapters(run.adapted, tmp_path)
    assert str(caught.value).startswith(str(tmp_path / FILE_NAME))
    assert_same_bits(run.snapshot(), before)
    assert run.places() == places
    ac.load_adapters(run.adapted, tmp_path)
    x = torch.randn(5, 6)
    assert torch.equal(run.adapted.eval()(x), saved.adapted.eval()(x))
