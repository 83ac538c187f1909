"""Compare one situation with eager PyTorch.

The oracle is a deep copy of the user's model with W + ΔW written into its weights, parametrized ones as computed. Both
models are called, changed in the same way, and called again; outputs, errors, in-place changes of the arguments and the
gradients of the adapters must agree each time. The gradient of an adapter follows from that of the oracle's plain
weight by the chain rule.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

import adapter_compiler as ac
from tests.soundness.common import Context, Run, Situation, adapt, seed, treat_all_as_large


class Oracle:
    """The user's model with W + ΔW as plain weights.

    Attributes:
        model: the model.
    """

    def __init__(self, adapted: ac.AdaptedModel, model: nn.Module) -> None:
        self.adapted = adapted
        self.model = copy_model(model).requires_grad_(False)
        for site in adapted.sites:
            make_plain(self.model, site.weight)
        #: The modules that have a weight (they may be moved), the name in each, and the weight's name.
        self._places = [
            (self.model.get_submodule(name.rpartition(".")[0]), name.split(".")[-1], site.weight)
            for site in adapted.sites
            for name in (site.weight, *site.aliases)
        ]
        #: The plain weights by identity, with the values written last, the W that they were made from, and the name.
        self._written: dict[int, tuple[Tensor, Tensor, Tensor, str]] = {}
        self._add_updates()

    def apply(self, change: Callable[[Any], object], *, rebased: bool = False) -> None:
        """Change the model; with ``rebased``, add ΔW to weights that got new values."""
        for weight, _, base, name in list(self._written.values()):
            self._written[id(weight)] = weight, weight.detach().clone(), base, name
        change(self.model)
        if rebased:
            self._add_updates()

    def _add_updates(self) -> None:
        for owner, leaf, name in self._places:
            weight = owner._parameters.get(leaf)
            known = None if weight is None else self._written.get(id(weight))
            if weight is None or (known is not None and torch.equal(known[1], weight)):
                continue
            base = weight.detach().clone()
            with torch.no_grad():
                weight.copy_(self.effective(name, base))
            weight.requires_grad_(True)
            self._written[id(weight)] = weight, weight.detach().clone(), base, name

    def effective(self, name: str, weight: Tensor) -> Tensor:
        """W + ΔW for a W, differentiable with respect to the adapters."""
        for planned in self.adapted.plan.by_weight[name]:
            parameters = self.adapted.adapters.parameters_of(planned)
            weight = planned.rescale(weight + planned.delta(parameters).to(weight.dtype), parameters)
        return weight

    def zero_grad(self) -> None:
        self.model.zero_grad()
        for weight, *_ in self._written.values():
            weight.grad = None

    def expected_gradients(self) -> list[Tensor]:
        """The expected gradients of the adapters, computed from those of the weights."""
        adapters = [p for p in self.adapted.adapters.parameters() if p.requires_grad]
        total = [torch.zeros_like(p) for p in adapters]
        for weight, _, base, name in self._written.values():
            gradient: Tensor | None = getattr(weight, "grad", None)
            if gradient is None:
                continue
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            effective = self.effective(name, base)
            found: Sequence[Tensor | None] = torch.autograd.grad(effective, adapters, gradient, allow_unused=True)
            total = [t if g is None else t + g for t, g in zip(total, found, strict=True)]
        return total


def make_plain(model: nn.Module, name: str) -> None:
    """Put what eager PyTorch computes as the weight in eval mode in place of a parametrization, if there is one."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if parametrize.is_parametrized(owner, leaf):
        parts: Any = owner.parametrizations
        value = parts[leaf].eval()().detach()
        owner.__class__ = type(owner).__bases__[0]  # not remove_parametrizations: copies share the class
        del owner.parametrizations
        owner.register_parameter(leaf, nn.Parameter(value))
    elif f"{leaf}_orig" in owner._parameters:
        torch.nn.utils.remove_spectral_norm(owner, leaf)
    elif f"{leaf}_v" in owner._parameters:
        torch.nn.utils.remove_weight_norm(owner, leaf)


def copy_model(model: nn.Module) -> nn.Module:
    with torch.no_grad():  # so that a tensor that TorchScript copies itself stays a leaf
        return copy.deepcopy(model)


@dataclasses.dataclass
class Outcome:
    """The result of a call: outputs or an error, the arguments after the call, gradients of the arguments."""

    outputs: Any
    error: BaseException | None
    args: Any
    requires_grad: list[bool]
    input_gradients: list[Tensor | None]


def observe(
    situation: Situation, model: Any, args: Callable[[], Sequence[Any]], around: Context, number: int
) -> Outcome:
    """Call a model as in the situation, and run backward if an output requires grad."""
    seed(number)
    given = args()
    seed(number + 1)
    outputs, error = None, None
    tensors: list[Tensor] = []
    try:
        with around():
            outputs = situation.call(model, *given)
        tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
        losses = [weigh(t) for t in tensors if t.requires_grad and t.is_floating_point()]
        if losses and situation.has_gradients:
            torch.stack(losses).sum().backward()
    except Exception as raised:  # the comparison with the oracle decides whether an error is right
        error = raised
    leaves = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    gradients = [leaf.grad if leaf.is_leaf else None for leaf in leaves]
    return Outcome(outputs, error, given, [t.requires_grad for t in tensors], gradients)


def weigh(t: Tensor) -> Tensor:
    """A scalar in which every element counts differently."""
    t = t.to_dense() if t.is_sparse else t
    t = t if t.layout == torch.strided else t.values()
    weights = torch.cos(torch.arange(t.numel(), dtype=torch.float64)).to(t.dtype).reshape(t.shape)
    return (t * weights).sum().double()


def check(situation: Situation, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the adapted model with the oracle, before and after the change."""
    if run.is_large:
        treat_all_as_large(monkeypatch)
    seed(1)
    model = situation.build().train(run.training)
    pristine = copy_model(model)  # before the example runs, which must have no side effects
    seed(2)
    args, kwargs = (situation.args(), situation.keywords()) if run.has_example else ((), {})
    adapted = adapt(model, args, kwargs, **{**run.options, **situation.options})
    oracle, base = Oracle(adapted, pristine), pristine
    later = situation.later or situation.args
    later_around = situation.later_around or situation.around

    first = compare(situation, adapted, oracle, situation.args, situation.around, 3)
    plain = observe(situation, base, situation.args, situation.around, 3) if run.is_thorough else None
    is_shown = run.is_thorough and situation.shows(run)
    before = copy.deepcopy(oracle.model) if is_shown else None
    situation.change(adapted.module)
    oracle.apply(situation.change, rebased=situation.rebased)
    folds = situation.is_folded and not run.training
    changed = compare(situation, adapted, oracle, later, later_around, 5, is_folded=folds)
    assert situation.raises == (first.error is not None or changed.error is not None)
    if before is not None:
        unchanged = observe(situation, before, later, situation.around, 5)
        assert find_difference(changed, unchanged) > 1e-3, "the change has no effect in eager code"
    if plain is None or not situation.differs or find_difference(first, plain) > 1e-2:
        return
    # A branch that the example has not taken has no adapters, so one of the calls may give the base's result.
    situation.change(base)
    plain = observe(situation, base, later, later_around, 5)
    assert find_difference(changed, plain) > 1e-2, "the adapters have no effect"


def compare(
    situation: Situation,
    adapted: ac.AdaptedModel,
    oracle: Oracle,
    args: Callable[[], Sequence[Any]],
    around: Context,
    number: int,
    *,
    is_folded: bool = False,
) -> Outcome:
    """Compare one call; returns the outcome of the oracle."""
    folded = adapted.fold(parametrized="remove") if is_folded else None
    adapted.zero_grad()
    oracle.zero_grad()
    found = observe(situation, adapted, args, around, number)
    expected = observe(situation, oracle.model, args, around, number)
    if expected.error is not None and not situation.raises:
        raise expected.error
    assert_same(found, expected, situation.tolerance)
    if situation.has_gradients and expected.error is None:
        parameters = [p for p in adapted.adapters.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        assert_close(gradients, oracle.expected_gradients(), situation.tolerance)
    if folded is not None:
        assert_same(observe(situation, folded, args, around, number), expected, situation.tolerance, is_whole=False)
    return expected


def assert_same(found: Outcome, expected: Outcome, tolerance: tuple[float, float], *, is_whole: bool = True) -> None:
    if expected.error is not None:
        # Autograd refuses a write into tensors that backward needs. An adapted weight keeps them, so more code runs.
        is_lost_value = any(text in str(expected.error) for text in ("modified by an inplace", "been modified inplace"))
        assert is_lost_value or type(found.error) is type(expected.error), f"{found.error!r} for {expected.error!r}"
        return
    if found.error is not None:
        raise found.error
    assert_close(found.outputs, expected.outputs, tolerance)
    assert_close(found.args, expected.args, tolerance)
    if is_whole:
        assert found.requires_grad == expected.requires_grad
        assert_close(found.input_gradients, expected.input_gradients, tolerance)


def assert_close(found: Any, expected: Any, tolerance: tuple[float, float] = (1e-4, 1e-5)) -> None:
    """Compare tensors and numbers up to rounding, relative to the largest value, and everything else for equality."""
    found_leaves, found_spec = pytree.tree_flatten(found)
    leaves, spec = pytree.tree_flatten(expected)
    assert str(found_spec) == str(spec)
    for one, other in zip(found_leaves, leaves, strict=True):
        if not isinstance(other, (Tensor, float)):
            assert type(one) is type(other)
            assert one == other or not isinstance(other, (int, str, bool, bytes))
            continue
        one, other = (torch.as_tensor(v).detach() for v in (one, other))
        one, other = (v.to_dense() if v.is_sparse else v for v in (one, other))
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        if torch.equal(one, other):
            continue
        size = float(other.abs().max()) if other.is_floating_point() else 0.0
        relative, absolute = tolerance
        torch.testing.assert_close(one, other, rtol=relative, atol=absolute + relative * size, equal_nan=True)


def find_difference(one: Outcome, other: Outcome) -> float:
    """The difference of outcomes relative to the largest value; 1 if other things than numbers differ."""
    if one.error is not None or other.error is not None:
        return float(type(one.error) is not type(other.error))
    leaves = [pytree.tree_leaves(outcome.outputs) for outcome in (one, other)]
    if len(leaves[0]) != len(leaves[1]):
        return 1.0
    return max((_distance(a, b) for a, b in zip(*leaves, strict=True)), default=0.0)


def _distance(a: Any, b: Any) -> float:
    if not isinstance(a, (Tensor, float, int)) or not isinstance(b, (Tensor, float, int)):
        return float(not isinstance(a, Tensor) and a != b)
    a, b = (torch.as_tensor(v).detach() for v in (a, b))
    a, b = (v.to_dense() if v.is_sparse else v for v in (a, b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return 1.0
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / (1e-6 + b.abs().max())) if a.numel() else 0.0
