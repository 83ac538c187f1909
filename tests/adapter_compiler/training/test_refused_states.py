"""A training state, like saved adapters, is loaded completely or not at all, wherever loading stops."""

from __future__ import annotations

import copy
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.primitives.adapter_file import FILE_NAME
from adapter_compiler.training.training_state import TRAINING_FILE
from tests.adapter_compiler.saving.rewriting import Change, rewrite
from tests.adapter_compiler.saving.same_bits import assert_same_bits
from tests.adapter_compiler.training.models import Net

PACKAGES = ("adapter_compiler", "passes")
HANDING_ON = (
    "adapter_compiler/adapters/parameters/adapter_parameters.py",
    "random_state.py",
    "budget/state.py",
    "realign.py",
)


class Log:
    """An object whose state is changed in place, and which can refuse a state."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.inner = {"total": torch.zeros(2)}
        #: Which of the next states to refuse; in a list, because removals from it are not undone.
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
    """A run with every kind of state that can be saved."""

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
        """Take micro-steps, two for each step, so that half of the time there are accumulated gradients."""
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
        """Copies of everything in the run that can change."""
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
        """The identity of all objects and of their memory."""
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
    """Raised at one line, in place of Ctrl-C."""


def stop_at(number: int, error: type[BaseException]) -> tuple[Callable[..., Any], list[str]]:
    """A trace function that raises at the n-th executed line of this library, and the lines that it has seen."""
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


def find_stops(run: Run, folder: Path, most: int | None, dice: random.Random) -> list[int]:
    """The first and last time that each line of ours runs; with ``most``, of a sample of lines only.

    Half of a sample are lines that pass states on.
    """
    trace, seen = stop_at(-2, Stop)
    load_traced(run, folder, trace)
    first = {line: number for number, line in reversed(list(enumerate(seen)))}
    last = {line: number for number, line in enumerate(seen)}
    if most is None:
        return sorted({*first.values(), *last.values()})
    passing_on = [line for line in first if line.partition(":")[0].endswith(HANDING_ON)]
    half = min(most // 2, len(passing_on))
    chosen = dice.sample(passing_on, half) + dice.sample(list(first), most - half)
    return sorted({dice.choice((first[line], last[line])) for line in chosen})


SITUATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "compacted": ({}, {}, 16),
    "not compacted": ({"compact": False}, {"compact": False}, 16),
    "no budget": ({"budget": False}, {"budget": False}, 6),
    "another start": ({"budget": False, "start": "pissa"}, {"budget": False}, 6),
    "a start that goes": ({"budget": False}, {"budget": False, "start": "pissa"}, 6),
}


@pytest.fixture(params=SITUATIONS)
def situation(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """The options of a run, and the saved state of another run to load into it."""
    saved, own, steps = SITUATIONS[request.param]
    other = Run(**saved)
    other.advance(steps)
    np.random.seed(4)
    other.save(tmp_path)
    yield own, tmp_path


#: A stop at the line of a with statement, as it begins or ends, leaves what it opens to the garbage collector.
LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def check_stops(own: dict[str, Any], folder: Path, most: int | None) -> None:
    """Check that after stops at these lines, everything is as before, and training continues as usual."""
    run, copied, rehearsal = Run(**own), Run(**own), Run(**own)
    for one in (copied, run, rehearsal):
        torch.manual_seed(1)
        one.advance(5)
    dice = random.Random(repr(own))
    stops = find_stops(rehearsal, folder, most, dice)
    torch.manual_seed(2)
    before, places = run.snapshot(), run.places()
    for number in stops:
        error = dice.choice([Stop, RuntimeError, torch.OutOfMemoryError])
        trace, seen = stop_at(number, error)
        with pytest.raises((Stop, CheckpointError, RuntimeError)) as caught:
            load_traced(run, folder, trace)
        assert len(seen) == number + 1
        # An exception that is raised while a with statement ends can skip its exit.
        assert torch.is_grad_enabled(), str(caught.value)
        assert_same_bits(run.snapshot(), before, str(caught.value))
        assert run.places() == places, str(caught.value)
    assert len(stops) > 10
    for one in (copied, run):
        torch.manual_seed(3)
        one.advance(7)
    random.setstate(before["random"][1])
    found, expected = run.snapshot(), copied.snapshot()
    del found["random"], expected["random"]
    assert_same_bits(found, expected)


@LEFT_OPEN
def test_wherever_loading_stops_everything_is_as_it_was(situation: tuple[dict[str, Any], Path]) -> None:
    check_stops(*situation, most=18)


@LEFT_OPEN
@pytest.mark.slow
def test_at_each_line_at_which_loading_stops_everything_is_as_it_was(situation: tuple[dict[str, Any], Path]) -> None:
    """At each line with ADAPTER_COMPILER_EVERY_LINE=1 (minutes), else at some of them."""
    check_stops(*situation, most=None if os.environ.get("ADAPTER_COMPILER_EVERY_LINE") else 60)


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


def swap_parameters(header: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
    names = header["optimizer"]["parameters"][0]
    names[0], names[3] = names[3], names[0]


def change_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda _, tensors: tensors.update({name: change(tensors[name])})


DAMAGES: dict[str, tuple[Change, str]] = {
    "no states": (
        lambda h, _: h.pop("state"),
        "its header: the key 'state' is missing, expected an object there",
    ),
    "no gradients": (
        lambda h, _: h["state"].pop("gradients"),
        "its states: the key 'gradients' is missing, expected an object there",
    ),
    "a list": (lambda h, _: h["state"].update(others=[]), r"its states: others is \[\], expected an object"),
    "no tensor": (
        lambda h, t: t.pop("random.torch"),
        r"what was saved as 'random' .*no tensor 'random\.torch', or names it twice",
    ),
    "a number for a tensor": (
        lambda h, _: h["state"]["random"]["torch"].update(__tensor__=3),
        "what was saved as 'random' could not be taken over.*has no tensor 3",
    ),
    "two marks": (
        lambda h, _: h["state"]["random"]["python"].update(__items__=[]),
        r"\['__items__', '__tuple__'\] stand beside each other, expected __items__ alone",
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
    "no sites": (lambda h, _: h.update(sites=[]), r"its header: sites is \[\], expected an object of sites"),
    "a site that is none": (
        lambda h, _: h["sites"].update({"up.weight": 3}),
        "site up.weight is 3, expected an object",
    ),
    "a rank that is none": (
        lambda h, _: h["sites"]["up.weight"].update(rank=True),
        "site up.weight: rank is True, expected a number of triplets",
    ),
    "a scale that is none": (
        lambda h, _: h["sites"]["up.weight"].update(scale=float("nan")),
        "site up.weight: scale is nan, expected a finite number",
    ),
    "rows that are none": (
        lambda h, _: h["sites"]["up.weight"].update(rows=[3, 1]),
        r"site up.weight: rows is \[3, 1\], expected \[first, end\]",
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
        "the state of the optimizer: its class was SGD, expected AdamW; make the same optimizer, with the parameters",
    ),
    "another order": (
        swap_parameters,
        r"the state of the optimizer: its parameter 0 was adapters\.down\.weight\.P, expected adapters\.up",
    ),
    "no groups": (
        lambda h, _: h["state"]["optimizer"].pop("param_groups"),
        "the state of the optimizer: the key 'param_groups' is missing",
    ),
    "moments that are none": (
        lambda h, _: h["state"]["optimizer"].update(state={"__items__": [[0, 3]]}),
        "the state of the optimizer: it has 3 for parameter 0, expected states of 8 parameters",
    ),
    "a state for no parameter": (
        lambda h, _: h["state"]["optimizer"]["state"]["__items__"].append([99, {}]),
        "the state of the optimizer: it has {} for parameter 99, expected states of 8 parameters",
    ),
    "other numbers of parameters": (
        lambda h, _: h["state"]["optimizer"]["param_groups"][0].update(params=[1, 0, *range(2, 8)]),
        r"group 0: params is \[1, 0, 2, 3, .*, expected \[0, 1, 2, 3, ",
    ),
    "numbers that stand twice": (
        lambda h, _: h["state"]["optimizer"]["param_groups"][0].update(params=[0] * 8),
        r"group 0: params is \[0, 0, 0",
    ),
    "an option that is no number": (
        lambda h, _: h["state"]["optimizer"]["param_groups"][0].update(weight_decay="0.1"),
        "group 0: weight_decay is '0.1', expected a finite number",
    ),
    "no learning rate": (
        lambda h, _: h["state"]["optimizer"]["param_groups"][0].pop("lr"),
        "group 0: the key 'lr' is missing, expected the learning rate there",
    ),
    "a negative step": (
        change_tensor("optimizer.state.0.step", lambda t: t - 99),
        r"the step of adapters\.up\.weight\.P is tensor\(-\d+\.?\), expected a number of steps, 0 or more",
    ),
    "a step that is none": (
        change_tensor("optimizer.state.0.step", lambda t: t * float("nan")),
        r"the step of adapters\.up\.weight\.P is tensor\(nan\), expected a number of steps",
    ),
    "moments of integers": (
        change_tensor("optimizer.state.0.exp_avg", lambda t: t.long()),
        r"exp_avg of adapters\.up\.weight\.P is torch\.int64, expected floating-point numbers",
    ),
    "a negative step of the budget": (
        lambda h, _: h["state"]["budget"].update(step=-1),
        "the state of the budget could not be taken over: budget state: step is -1, expected a number of",
    ),
    "a mask of numbers": (
        change_tensor("budget.sites.up.weight.mask", lambda t: t.float()),
        "the state of the budget could not be taken over: budget state at site up.weight has .*'float'",
    ),
    "another base": (
        lambda h, _: h["base"].update({"up.weight": h["base"]["down.weight"]}),
        r"1 of 6 frozen weights of this model are not those of the run .*, for example up\.weight is float32 \[9, 6\]",
    ),
    "a tensor too many": (
        lambda _, t: t.update({"others.more": torch.ones(1)}),
        "the tensor 'others.more' belongs to none of the states",
    ),
    "a tensor for two": (
        lambda h, t: [
            h["state"]["others"]["average"].update({"module.bias": {"__tensor__": "others.average.module.weight"}}),
            t.pop("others.average.module.bias"),
        ],
        "the file has no tensor 'others.average.module.weight', or names it twice",
    ),
    "moments of another shape": (
        change_tensor("optimizer.state.0.exp_avg", lambda t: torch.zeros(5)),
        r"the state of the optimizer: exp_avg of adapters\.up\.weight\.P has shape \(5,\), expected \(9, 1\) for",
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
        r"the gradient of module.head.bias has \(\(4,\), torch.float32\), expected \(\(3,\), torch.float32\)",
    ),
    "a gradient of nothing": (
        lambda h, _: h["state"]["gradients"].update(foot=h["state"]["gradients"].pop("module.head.bias")),
        r"the gradient of foot has \(\(3,\), torch.float32\), expected no such parameter",
    ),
    "budget of another schedule": (
        lambda h, _: h["state"]["budget"].update(schedule=3),
        "the state of the budget could not be taken over",
    ),
    "budget of other shapes": (
        change_tensor("budget.sites.up.weight.mask", lambda t: torch.ones(7, dtype=torch.bool)),
        "the state of the budget could not be taken over.*budget state at site up.weight has",
    ),
    "budget without growth": (
        lambda h, _: h["state"]["budget"]["sites"]["up.weight"].pop("growth"),
        "the state of the budget could not be taken over.*at site up.weight has",
    ),
    "half a budget": (
        lambda h, _: h["state"]["budget"].update(history=[{"step": 1}]),
        "the state of the budget could not be taken over.* history 0: the key .budget. is missing",
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
    """The saved state of a compacted run with gradients."""
    folder = tmp_path_factory.mktemp("whole")
    saved = Run()
    saved.advance(19)
    saved.save(folder)
    return folder / TRAINING_FILE


@pytest.fixture(scope="module")
def untouched() -> tuple[Run, dict[str, Any], list[Any]]:
    """A run into which nothing is ever loaded, how it is, and which objects it consists of."""
    run = Run()
    run.advance(5)
    return run, run.snapshot(), run.places()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_does_not_fit_changes_nothing(
    damage: str, whole_file: Path, untouched: tuple[Run, dict[str, Any], list[Any]], tmp_path: Path
) -> None:
    change, message = DAMAGES[damage]
    path = tmp_path / TRAINING_FILE
    path.write_bytes(whole_file.read_bytes())
    rewrite(path, change)
    run, before, places = untouched
    before = {**before, "random": run.snapshot()["random"]}
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


def test_other_base_weights_are_refused_and_nothing_changes(whole_file: Path) -> None:
    run = Run()
    with torch.no_grad():
        run.adapted.base_weight("up.weight")[2, 3] += 1e-6
    before, places = run.snapshot(), run.places()
    with pytest.raises(CheckpointError, match=r"1 of 6 frozen weights .*up\.weight .* load the same base weights"):
        run.load(whole_file.parent)
    assert_same_bits(run.snapshot(), before)
    assert run.places() == places


def test_another_optimizer_or_order_of_parameters_is_refused(whole_file: Path) -> None:
    run = Run()
    parameters = list(run.adapted.trainable_parameters())
    others: dict[str, torch.optim.Optimizer] = {
        "its class was AdamW, expected Adam": torch.optim.Adam(parameters, lr=0.01),
        "its parameter 0 was adapters.up.weight.P, expected": torch.optim.AdamW(parameters[::-1], lr=0.01),
    }
    for message, optimizer in others.items():
        before = run.snapshot()
        with pytest.raises(CheckpointError, match=message):
            ac.load_training_state(whole_file.parent, run.adapted, optimizer, run.budget, **run.others)
        assert_same_bits(run.snapshot(), before)
        assert not optimizer.state


def test_a_changed_byte_is_refused(whole_file: Path, tmp_path: Path) -> None:
    data = bytearray(whole_file.read_bytes())
    path = tmp_path / TRAINING_FILE
    run, dice = Run(), random.Random(1)
    before = run.snapshot()
    for place in (dice.randrange(len(data)) for _ in range(20)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            run.load(tmp_path)
        assert str(path) in str(caught.value)
    assert_same_bits(run.snapshot(), before)


def test_an_optimizer_beside_the_first_keeps_its_wide_moments(tmp_path: Path) -> None:
    """torch casts moments to the parameters' dtypes when they are loaded."""

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


def test_names_with_dots_are_not_confused_with_others(tmp_path: Path) -> None:
    class Dotted(Log):
        def state_dict(self) -> dict[Any, Any]:
            tensors = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}, "a.b#2": torch.ones(2), 1: torch.ones(3)}
            return {**tensors, "1": torch.ones(4), "c": {"d": 1}, "c.d": 2, "__tensor__": {"__tuple__": ()}}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.loaded = state

    run, dotted = Run(), Dotted()
    run.others["log"] = dotted
    run.save(tmp_path)
    run.load(tmp_path)
    assert_same_bits(dotted.loaded, dotted.state_dict())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            torch.ones(2).to_mkldnn(),
            "others.log.value is a tensor of torch.float32 and torch._mkldnn, which a safet",
        ),
        (torch.ones(2, dtype=torch.complex128), "others.log.value is a tensor of torch.complex128"),
        (torch.ones(2, device="meta"), "others.log.value is on the meta device, which holds no values"),
        ({1, 2}, "others.log.value is a set, which cannot be saved without pickle"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_when_it_is_saved(value: Any, message: str, tmp_path: Path) -> None:
    class Odd(Log):
        def state_dict(self) -> dict[Any, Any]:
            return {"value": value}

    run = Run()
    run.others["log"] = Odd()
    with pytest.raises(CheckpointError, match=message):
        run.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_state_that_holds_itself_is_refused(tmp_path: Path) -> None:
    class Circle(Log):
        def state_dict(self) -> dict[Any, Any]:
            state: dict[Any, Any] = {}
            state["again"] = state
            return state

    run = Run()
    run.others["log"] = Circle()
    with pytest.raises(CheckpointError, match="is nested more than 100 levels deep"):
        run.save(tmp_path)


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
