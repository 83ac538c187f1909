"""Take one model of the zoo through everything that must hold, against eager code of the model's own class.

The oracle is the user's model called by ``torch.func.functional_call`` with W + ΔW as ordinary tensors, so
that outputs and the adapters' gradients are known without any graph.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import CaptureError, SiteError
from passes.capture.module_state import without_fast_path
from tests.zoo.entry import ZooEntry, find_tensors, loss_of

#: (relative to the largest value, absolute) by dtype of an output or gradient.
TOLERANCES = {torch.float64: (1e-8, 1e-9), torch.float32: (5e-4, 1e-5), torch.float16: (2e-2, 2e-3)}
TOLERANCES |= {torch.complex64: TOLERANCES[torch.float32], torch.bfloat16: (6e-2, 2e-2)}
LOOSEST = max(TOLERANCES.values())


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """What became of one model; a check that failed holds the reason, one that passed is empty, one not run None."""

    name: str
    group: str
    compile: str | None = None
    identity_eval: str | None = None
    identity_train: str | None = None
    outputs_eval: str | None = None
    outputs_train: str | None = None
    other_size: str | None = None
    reach: str | None = None
    pruning: str | None = None
    fold: str | None = None
    onnx: str | None = None
    whole_eval: bool = False
    whole_train: bool = False
    used_weights: int = 0
    adapted_weights: int = 0
    reachable_weights: int = 0
    unreachable: list[str] = dataclasses.field(default_factory=list)
    reasons: list[str] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0
    seconds: float = 0.0


def check_entry(entry: ZooEntry, *, onnx: bool = False, graphs: bool = False) -> Outcome:
    """Every check on one model; with ``graphs`` also whether its calls capture as one fx graph each."""
    started = time.process_time()
    outcome = Outcome(name=entry.name, group=entry.group)
    _seed()
    model = entry.build()
    warm_up(model, entry)
    adapted = _attempt(outcome, "compile", lambda: compile_entry(model.train(), entry))
    outcome.compile_seconds = time.process_time() - started
    if adapted is not None:
        _attempt(outcome, "identity_eval", lambda: _check_identity(adapted, entry, training=False))
        _attempt(outcome, "identity_train", lambda: _check_identity(adapted, entry, training=True))
        _randomize(adapted)
        _attempt(outcome, "outputs_eval", lambda: _check_outputs(adapted, entry, entry.example, "eval"))
        _attempt(outcome, "outputs_train", lambda: _check_outputs(adapted, entry, entry.example, "train"))
        _attempt(outcome, "other_size", lambda: _check_other_size(adapted, entry))
        _attempt(outcome, "fold", lambda: _check_fold(adapted, entry))
        outcome.adapted_weights = len(_find_used(model, entry) & {site.weight for site in adapted.sites})
        if graphs:
            _check_graphs(outcome, adapted, entry)
        _attempt(outcome, "pruning", lambda: _check_pruning(model, entry))
        _attempt(outcome, "reach", lambda: _check_reach(outcome, model, entry))
        if onnx:
            _attempt(outcome, "onnx", lambda: _check_onnx(adapted, entry))
    outcome.seconds = time.process_time() - started
    return outcome


def _attempt(outcome: Outcome, check: str, run: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run()
    except Exception as error:  # a failed check is a row of the table, whatever failed
        text = " ".join(str(error).split())
        setattr(outcome, check, f"{type(error).__name__}: {text[:300]}")
        return None
    setattr(outcome, check, "")
    return result


def _seed(seed: int = 7) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(seed)


def warm_up(model: nn.Module, entry: ZooEntry) -> None:
    """Lazy modules get their shapes."""
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        args, kwargs = entry.example()
        model(*args, **kwargs)


def compile_entry(model: nn.Module, entry: ZooEntry, sites: str = "all-linear") -> ac.AdaptedModel:
    """With the sites asked for, or all that there are where the model has no matrix product."""
    _seed()
    args, kwargs = entry.example()
    try:
        config = ac.AdapterConfig(rank=4, alpha=4, sites=sites)
        return ac.compile_with_adapters(model, args, kwargs, config=config)
    except SiteError:
        if sites == "*":
            raise
    return compile_entry(model, entry, "*")


def _randomize(adapted: ac.AdaptedModel) -> None:
    """A ΔW of about a tenth of a weight's size, so that it shows and nothing overflows."""
    _seed(11)
    with torch.no_grad():
        for name, parameter in adapted.adapters.named_parameters():
            parameter.normal_(0.0, 0.1 if name.endswith("lam") else 0.3)


def _draw(example: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    _seed(5)
    return example()


def _call(module: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    _seed(9)
    args, kwargs = copy.deepcopy((args, kwargs))  # caches among the arguments are written to
    # The fused encoder of torch gives other numbers under a padding mask than the code it stands for.
    with without_fast_path():
        return module(*args, **kwargs)


def _check_identity(adapted: ac.AdaptedModel, entry: ZooEntry, *, training: bool) -> None:
    args, kwargs = _draw(entry.example)
    adapted.train(training)
    expected = _call(_as_written(adapted), args, kwargs)
    _assert_close(_call(adapted, args, kwargs), expected, "output")


def _as_written(adapted: ac.AdaptedModel) -> nn.Module:
    """A copy of the user's model in its present state, without adapters."""
    return adapted.copy_base().train(adapted.training)


def _effective(adapted: ac.AdaptedModel, model: nn.Module) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for adapter in adapted.plan:
        weight = model.get_parameter(adapter.site.name).detach()
        delta = adapter.delta(adapted.adapters.parameters_of(adapter))
        values[f"model.{adapter.site.name}"] = weight + delta.to(weight.dtype)
    return values


class _Oracle(nn.Module):
    """A model's own code, and its gradients, made while its weights are replaced: checkpoints compute again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: Any, kwargs: Any, wanted: list[nn.Parameter]) -> Any:
        return _differentiate(self.model, args, kwargs, wanted)


def _differentiate(module: nn.Module, args: Any, kwargs: Any, wanted: list[nn.Parameter]) -> tuple[Any, list[Any]]:
    for parameter in wanted:
        parameter.grad = None
    output = _call(module, args, kwargs)
    if wanted:
        loss_of(output).backward()
    return output, [parameter.grad for parameter in wanted]


def _check_outputs(
    adapted: ac.AdaptedModel,
    entry: ZooEntry,
    example: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]],
    mode: str,
) -> None:
    """Outputs, and gradients of the adapters, are those of eager code with effective weights."""
    args, kwargs = _draw(example)
    adapted.train(mode == "train")
    named = {} if "no-eval-backward" in entry.traits and mode == "eval" else dict(adapted.adapters.named_parameters())
    oracle = _Oracle(_as_written(adapted))
    weights = _effective(adapted, oracle.model)
    wanted = list(named.values())
    expected, want = torch.func.functional_call(oracle, weights, (args, kwargs, wanted))
    found, got = _differentiate(adapted, args, kwargs, wanted)
    loose = bool(entry.traits & {"autocast", "dtype"})
    _assert_close(found, expected, "output", loose=loose)
    for name, g, w in zip(named, got, want, strict=True):
        if g is not None or w is not None:
            like = g if g is not None else w
            _assert_close([like * 0 if g is None else g], [like * 0 if w is None else w], name, loose=loose)


def _check_other_size(adapted: ac.AdaptedModel, entry: ZooEntry) -> None:
    for mode in ("eval", "train"):
        _check_outputs(adapted, entry, entry.other_example, mode)


def _check_fold(adapted: ac.AdaptedModel, entry: ZooEntry) -> None:
    merged = adapted.eval().fold(parametrized="remove")
    for example in (entry.example, entry.other_example):
        args, kwargs = _draw(example)
        with torch.no_grad():
            loose = bool(entry.traits & {"autocast", "dtype"})
            _assert_close(_call(adapted, args, kwargs), _call(merged, args, kwargs), "merged output", loose=loose)


def _check_pruning(model: nn.Module, entry: ZooEntry) -> None:
    """Six steps from rank 4 to an average of 2; the budget is kept exactly and some P moved."""
    adapted = compile_entry(model.train(), entry)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-3)
    schedule = ac.BudgetSchedule(target_rank=2, total_steps=6, warmup_steps=1, final_steps=2, interval=1)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    for _ in range(6):
        args, kwargs = _draw(entry.example)
        loss_of(_call(adapted, args, kwargs)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert budget.live_triplets == budget.budget, f"{budget.live_triplets} live, budget {budget.budget}"
    assert budget.live_triplets == min(2 * len(adapted.sites), sum(a.rank for a in adapted.plan))
    moved = [name for name, p in adapted.adapters.named_parameters() if name.endswith(".P") and bool(p.any())]
    assert moved, "no P moved"
    _check_fold(adapted, entry)


def _check_reach(outcome: Outcome, model: nn.Module, entry: ZooEntry) -> None:
    """Every weight of two dimensions or more that gets a gradient can carry an adapter that is in use."""
    used = _find_used(model, entry)
    adapted = compile_entry(model.train(), entry, "*")
    sites = {site.name.partition("[")[0] for site in adapted.sites}
    used = {_find_computed(name, sites) for name in used}
    outcome.used_weights = len(used)
    outcome.reachable_weights = len(used & sites)
    outcome.unreachable = [f"{name}: {adapted.rejected.get(name)}" for name in sorted(used - sites)]
    _randomize(adapted)
    for mode in ("eval", "train"):
        _check_outputs(adapted, entry, entry.example, mode)
    _check_fold(adapted, entry)


def _find_computed(name: str, sites: set[str]) -> str:
    """The adapted weight that a parametrization computes from a parameter, or else the parameter's own name."""
    computed = re.sub(r"\.parametrizations\.(\w+)\.original\d?$|(?<=weight)_(?:orig|g|v)$", r".\1", name).rstrip(".")
    return computed if computed in sites else name


def _find_used(model: nn.Module, entry: ZooEntry) -> set[str]:
    with torch.no_grad():  # so that what TorchScript copies by itself stays a leaf
        model = copy.deepcopy(model).train()
    args, kwargs = _draw(entry.example)
    loss_of(_call(model, args, kwargs)).backward()
    return {
        name
        for name, p in model.named_parameters()
        if p.dim() >= 2 and p.is_floating_point() and p.grad is not None and bool(p.grad.abs().sum() > 0)
    }


def _check_onnx(adapted: ac.AdaptedModel, entry: ZooEntry) -> None:
    import tempfile
    from pathlib import Path

    args, kwargs = _draw(entry.example)
    with tempfile.TemporaryDirectory() as folder:
        ac.export_onnx(adapted, Path(folder) / "model.onnx", args, kwargs)


def _check_graphs(outcome: Outcome, adapted: ac.AdaptedModel, entry: ZooEntry) -> None:
    """Whether a call captures as one graph with its adapters, in each mode, and why not."""
    for mode in ("eval", "train"):
        args, kwargs = _draw(entry.example)
        try:
            adapted.train(mode == "train").capture(*args, **kwargs)
        except CaptureError as error:
            outcome.reasons.append(f"{mode}: {str(error)[:200]}")
        else:
            setattr(outcome, f"whole_{mode}", True)


def _assert_close(found: Any, expected: Any, what: str, *, loose: bool = False) -> None:
    pairs = list(_pair(list(find_tensors(found)), list(find_tensors(expected)), what))
    assert pairs or what != "output", "no tensor in the output"
    for i, (mine, theirs) in enumerate(pairs):
        assert mine.shape == theirs.shape, f"{what} {i}: shape {tuple(mine.shape)}, expected {tuple(theirs.shape)}"
        assert mine.dtype == theirs.dtype, f"{what} {i}: {mine.dtype}, expected {theirs.dtype}"
        if not (mine.is_floating_point() or mine.is_complex()):
            assert torch.equal(mine, theirs), f"{what} {i} differs"
            continue
        rtol, atol = LOOSEST if loose else TOLERANCES.get(mine.dtype, LOOSEST)
        finite = theirs.isfinite()
        assert torch.equal(finite, mine.isfinite()), f"{what} {i}: inf or nan in other places"
        if not bool(finite.any()):
            continue
        largest = float(theirs[finite].abs().max())
        difference = float((mine[finite] - theirs[finite]).abs().max())
        assert difference <= atol + rtol * largest, f"{what} {i} differs by {difference:.3g} of {largest:.3g}"


def _pair(found: list[Tensor], expected: list[Tensor], what: str) -> Iterator[tuple[Tensor, Tensor]]:
    assert len(found) == len(expected), f"{what}: {len(found)} tensors, expected {len(expected)}"
    for mine, theirs in zip(found, expected, strict=True):
        yield mine.detach(), theirs.detach()
