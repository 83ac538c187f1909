"""Prune ranks to a global budget while the user's own loop trains.

The optimizer step is the only hook, so that nothing can be forgotten or called in the wrong order:

    before the step    regulariser's gradient, sensitivity (semantics "paper")
    after the step     sensitivity (semantics "peft"), masking when it is due

A step that a GradScaler skips never happens here either.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch

from adapter_compiler.adapted import AdaptedModel
from adapter_compiler.budget.allocator import allocate_best
from adapter_compiler.budget.regulariser import add_regulariser_gradient
from adapter_compiler.budget.schedule import BudgetSchedule
from adapter_compiler.budget.sensitivity import SensitivityTracker, Triplets
from adapter_compiler.errors import BudgetError, CheckpointError, NonFiniteGradientError

logger = logging.getLogger(__name__)

_STATE_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskingRecord:
    """What one masking did: at which step, to how many triplets, with which rank at each site."""

    step: int
    budget: int
    ranks: dict[str, int]


class RankBudget:
    """Scores every triplet at each optimizer step and keeps the best b(t) of them.

    Masking sets λ of the other triplets to zero; P and Q stay, and λ may grow back until the next
    masking. From ``schedule.freeze_step`` on the set is fixed and the pruned λ are exactly zero after
    every step.

    Attributes:
        schedule: when and how far to prune.
        step: number of optimizer steps seen.
        history: one record a masking, oldest first.
    """

    def __init__(self, adapted: AdaptedModel, optimizer: torch.optim.Optimizer, schedule: BudgetSchedule) -> None:
        """Hook the budget to ``optimizer``.

        Raises:
            BudgetError: the optimizer does not hold the adapters, or the target exceeds their rank or leaves none.
        """
        _assert_kinds(adapted, optimizer, schedule)
        self.schedule = schedule
        self.step = 0
        self.history: list[MaskingRecord] = []
        self._gamma = adapted.config.gamma
        self._names = [adapter.site.name for adapter in adapted.plan]
        self._triplets: list[Triplets] = [
            (p["lam"], p["P"], p["Q"]) for p in map(adapted.adapters.parameters_of, adapted.plan)
        ]
        self._parameters = [parameter for triplet in self._triplets for parameter in triplet]
        self._initial = sum(len(lam) for lam, _, _ in self._triplets)
        self._target = schedule.target_triplets(len(self._names), self._initial)
        self._masks = [torch.ones_like(lam, dtype=torch.bool) for lam, _, _ in self._triplets]
        self._skips_step = False
        self._sensitivity = SensitivityTracker(self._parameters, schedule.beta1, schedule.beta2)
        _assert_fits(adapted, optimizer, schedule)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def budget(self) -> int:
        """b(t) at the last optimizer step (at the start, all triplets)."""
        return self.schedule.budget(self._last_step_number, self._initial, self._target) if self.step else self._initial

    @property
    def live_triplets(self) -> int:
        """Triplets that the last masking kept. Between maskings a masked λ may regrow and is not counted."""
        return sum(self.ranks().values())

    @property
    def is_frozen(self) -> bool:
        """Whether the surviving set is fixed."""
        return self.step > 0 and self._last_step_number >= self.schedule.freeze_step

    def ranks(self) -> dict[str, int]:
        """Live triplets by site."""
        device = self._masks[0].device
        counts = torch.stack([mask.sum().to(device) for mask in self._masks]).tolist()
        return dict(zip(self._names, counts, strict=True))

    def detach(self) -> None:
        """Take the hooks off the optimizer; the adapters stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, together with the model's and the optimizer's states."""
        return {
            "version": _STATE_VERSION,
            "step": self.step,
            "schedule": dataclasses.asdict(self.schedule),
            "history": [dataclasses.asdict(record) for record in self.history],
            "sites": {
                name: {
                    "mask": mask.clone(),
                    "mean": [t.clone() for t in self._sensitivity.mean[3 * i : 3 * i + 3]],
                    "uncertainty": [t.clone() for t in self._sensitivity.uncertainty[3 * i : 3 * i + 3]],
                }
                for i, (name, mask) in enumerate(zip(self._names, self._masks, strict=True))
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`. Nothing changes if it does not fit.

        Raises:
            CheckpointError: other version, schedule, sites or shapes.
        """
        _assert_state_fits(state, self)
        sites = [state["sites"][name] for name in self._names]
        for i, (mask, saved) in enumerate(zip(self._masks, sites, strict=True)):
            mask.copy_(saved["mask"])
            for j in range(3):
                self._sensitivity.mean[3 * i + j].copy_(saved["mean"][j])
                self._sensitivity.uncertainty[3 * i + j].copy_(saved["uncertainty"][j])
        self.step = state["step"]
        self.history = [MaskingRecord(**record) for record in state["history"]]

    @property
    def _last_step_number(self) -> int:
        return self.step - 1 + self.schedule.first_step

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(callable(value) for value in (*args[1:], *kwargs.values())):
            raise BudgetError(
                f"{type(optimizer).__name__}.step got a closure, so the gradients of this step are not known "
                "before it; call loss.backward() first and step() without arguments"
            )
        # A GradScaler tells a fused optimizer, which unscales inside its step, the scale and whether to skip.
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        self._skips_step = found_inf is not None and bool(found_inf)
        if self._skips_step:
            return
        if found_inf is None or scale is None:
            self._assert_finite_gradients()
        grad_scale = 1.0 if scale is None else float(scale)
        if self._gamma > 0:
            add_regulariser_gradient(self._triplets, self._gamma, self.schedule.semantics, grad_scale)
        if self.schedule.semantics == "paper" and not self.is_frozen:
            self._sensitivity.update(self._parameters, grad_scale)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._skips_step:
            return
        self.step += 1
        number = self._last_step_number
        if self.schedule.semantics == "peft" and number < self.schedule.freeze_step:
            self._sensitivity.update(self._parameters)
        if self.schedule.is_masking_step(number):
            self._allocate(number)
        if self.schedule.is_masking_step(number) or number > self.schedule.freeze_step:
            for (lam, _, _), mask in zip(self._triplets, self._masks, strict=True):
                lam.masked_fill_(~mask, 0.0)
        if number == self.schedule.total_steps + self.schedule.first_step:
            logger.warning(
                "the optimizer took more than total_steps=%d steps; ranks stay as they are",
                self.schedule.total_steps,
            )

    def _allocate(self, number: int) -> None:
        budget = self.schedule.budget(number, self._initial, self._target)
        self._masks = allocate_best(self._sensitivity.triplet_scores(), budget)
        self.history.append(MaskingRecord(step=number, budget=budget, ranks=self.ranks()))
        logger.debug("step %d: %d triplets live", number, budget)

    def _assert_finite_gradients(self) -> None:
        """One read-back from the device a step: an inf must be known before anything is changed."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if not gradients:
            return
        norms = torch._foreach_norm(gradients, float("inf"))
        largest = torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).max()
        if bool(torch.isfinite(largest)):
            return
        for name, triplet in zip(self._names, self._triplets, strict=True):
            for letter, p in zip(("λ", "P", "Q"), triplet, strict=True):
                if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                    raise NonFiniteGradientError(
                        f"site {name}: the gradient of {letter} has inf or nan at step {self.step + 1}, expected "
                        "finite values; nothing was changed. Lower the learning rate, clip the gradients, or use a "
                        "GradScaler, which skips such steps"
                    )


def _assert_kinds(adapted: object, optimizer: object, schedule: object) -> None:
    expected: list[tuple[str, object, type, str]] = [
        ("adapted", adapted, AdaptedModel, "what compile_with_adapters returned"),
        ("optimizer", optimizer, torch.optim.Optimizer, "one over adapted.trainable_parameters()"),
        ("schedule", schedule, BudgetSchedule, "BudgetSchedule(target_rank=..., total_steps=...)"),
    ]
    for name, value, kind, hint in expected:
        if not isinstance(value, kind):
            raise BudgetError(
                f"RankBudget({name}=...) is a {type(value).__name__}, expected {kind.__name__}; give {hint}"
            )


def _assert_fits(adapted: AdaptedModel, optimizer: torch.optim.Optimizer, schedule: BudgetSchedule) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [
        adapter.site.name
        for adapter in adapted.plan
        if not all(id(p) in held for p in adapted.adapters.parameters_of(adapter).values())
    ]
    if missing:
        raise BudgetError(
            f"the optimizer does not hold the adapters of {len(missing)} of {len(adapted.plan)} sites "
            f"(first: {missing[0]}), expected all of them; make it from adapted.trainable_parameters()"
        )
    initial = sum(adapter.rank for adapter in adapted.plan)
    if schedule.target_triplets(len(adapted.plan), initial) < 1:
        raise BudgetError(
            f"BudgetSchedule(target_rank={schedule.target_rank:g}) times {len(adapted.plan)} sites leaves no triplet; "
            f"expected at least {1 / len(adapted.plan):g}; raise it"
        )
    largest = max(adapter.rank for adapter in adapted.plan)
    if schedule.target_rank > largest:
        raise BudgetError(
            f"BudgetSchedule(target_rank={schedule.target_rank:g}) exceeds the rank {largest} that the adapters "
            f"start with; expected at most {largest}; lower it or compile with AdapterConfig(rank=...) above it"
        )


def _assert_state_fits(state: Mapping[str, Any], budget: RankBudget) -> None:
    mine = budget.state_dict()
    version = state.get("version")
    if version != _STATE_VERSION:
        raise CheckpointError(
            f"budget state has version {version!r}, expected {_STATE_VERSION}; give what RankBudget.state_dict() gave"
        )
    if missing := sorted(mine.keys() - state.keys()):
        raise CheckpointError(f"budget state has no {missing[0]!r}; give all that RankBudget.state_dict() gave")
    for key, value in mine["schedule"].items():
        if state["schedule"].get(key) != value:
            raise CheckpointError(
                f"budget state was made with {key}={state['schedule'].get(key)!r}, this budget has {key}={value!r}; "
                "resume with the same BudgetSchedule"
            )
    if odd := sorted(mine["sites"].keys() ^ state["sites"].keys()):
        side = "the state" if odd[0] in state["sites"] else "this model"
        raise CheckpointError(f"budget state belongs to other sites: {odd[0]} is in {side} only; compile the same ones")
    for name, own in mine["sites"].items():
        found, expected = _shapes(state["sites"][name]), _shapes(own)
        if found != expected:
            raise CheckpointError(
                f"budget state at site {name} has shapes {found}, this model has {expected}; compile with the same rank"
            )


def _shapes(site: Mapping[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    tensors = {"mask": [site["mask"]], "mean": site["mean"], "uncertainty": site["uncertainty"]}
    return {name: [tuple(tensor.shape) for tensor in found] for name, found in tensors.items()}
