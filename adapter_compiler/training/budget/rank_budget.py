"""Prune ranks to a global budget while the user's own loop trains.

The optimizer step is the only hook, so that nothing can be forgotten or called in the wrong order:

    before the step    regularizer's gradient, scores (semantics "paper")
    after the step     scores (semantics "peft"), masking when it is due, compaction when the set is final

A step that a GradScaler skips never happens here either. If the step gets a closure, "before the step" is after
each call of it; scores follow the first, whose gradient belongs to the weights before the step. The loss that a
closure returns is left alone, so a line search does not see the regularizer's value.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from adapter_compiler.adapters.compact import compact_adapters
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.budget.checks import (
    GradientWatch,
    assert_active,
    assert_finite,
    assert_fits,
    assert_kinds,
    warn_of_shifted_starts,
)
from adapter_compiler.training.budget.closures import StepArguments, call_after_closure
from adapter_compiler.training.budget.masking_record import MaskingRecord
from adapter_compiler.training.budget.schedule import BudgetSchedule
from adapter_compiler.training.budget.state import assert_same_run, dump_state, restore_state
from adapter_compiler.training.scoring.allocator import Request, allocate_best, allocate_by_site, choose_grown
from adapter_compiler.training.scoring.importance import SiteImportance
from adapter_compiler.training.scoring.metrics import GrowthTracker, make_metric, take_triplets
from adapter_compiler.training.scoring.regularizer import add_regularizer_gradient
from adapter_compiler.training.scoring.triplet_buffers import TripletBuffers

logger = logging.getLogger(__name__)

#: γ where λ starts at zero: from there the factors would grow in place of λ.
_GAMMA = 0.1


class RankBudget:
    """Scores every triplet at each optimizer step and keeps the best b(t) of them.

    Masking sets λ of the other triplets to zero; P and Q stay, and λ may grow back until the next
    masking. From ``schedule.freeze_step`` on the set is fixed and the pruned λ are exactly zero after
    every step.

    Attributes:
        schedule: when, how far and by what rule to prune.
        step: number of optimizer steps seen.
        history: one record a masking, oldest first.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        optimizer: torch.optim.Optimizer,
        schedule: BudgetSchedule,
        *,
        observers: Sequence[Callable[[MaskingRecord], None]] = (),
    ) -> None:
        """Hook the budget to ``optimizer``; each observer is called with the record of each masking.

        Raises:
            BudgetError: the optimizer does not hold the adapters, or the target exceeds their ranks or leaves none.
        """
        assert_kinds(adapted, optimizer, schedule)
        self.schedule = schedule
        self.step = 0
        self.history: list[MaskingRecord] = []
        self.observers = list(observers)
        self._adapted = adapted
        self._adapter = adapted.active_adapter
        self._optimizer = optimizer
        assert_fits(adapted, optimizer, schedule)
        self._triplets = TripletBuffers(adapted.adapters)
        self._gamma = adapted.options.gamma
        self._costs = self._find_costs()
        self._initial = sum(size * cost for size, cost in zip(self._triplets.sizes, self._costs, strict=True))
        self._target = schedule.target_triplets(len(self._triplets.sites), self._initial)
        schedule.allocation.bounds(self._triplets.sites, self._triplets.sizes)
        self._mask = torch.ones(sum(self._triplets.sizes), dtype=torch.bool, device=self._triplets.device)
        self._pruned = self._triplets.split_lam(~self._mask)
        self._metric = make_metric(schedule.allocation.metric, self._triplets, schedule.beta1, schedule.beta2)
        self._growth = (
            GrowthTracker(self._triplets, schedule.allocation.smoothing) if schedule.allocation.grow else None
        )
        self._importance = SiteImportance(len(self._triplets.sites), schedule.allocation.smoothing)
        self._skips_step = False
        self._has_followed = False
        self._watch = GradientWatch(adapted)
        self._loss: float | torch.Tensor | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def gamma(self) -> float:
        """The regularizer's weight. Without ``AdapterConfig.gamma``, the first step chooses it by where λ stand."""
        return _choose_gamma(self._triplets) if self._gamma is None else self._gamma

    @property
    def budget(self) -> int:
        """b(t) at the last optimizer step (at the start, everything), in triplets or parameters."""
        return self.schedule.budget(self._last_step_number, self._initial, self._target) if self.step else self._initial

    @property
    def live_triplets(self) -> int:
        """Triplets that the last masking kept. Between maskings a masked λ may regrow and is not counted."""
        return int(self._mask.sum())

    @property
    def live_parameters(self) -> int:
        """Parameters that these triplets consist of."""
        ranks = self.ranks()
        plan = {adapter.site.name: adapter.site for adapter in self._adapted.adapter_set.plans[self._adapter]}
        return sum(rank * (plan[name].out_features + plan[name].in_features + 1) for name, rank in ranks.items())

    @property
    def is_frozen(self) -> bool:
        """Whether the surviving set is fixed."""
        return self.step > 0 and self._last_step_number >= self.schedule.freeze_step

    def ranks(self) -> dict[str, int]:
        """Live triplets by site; sites that compaction emptied have 0."""
        counts = [int(part.sum()) for part in self._mask.cpu().split(self._triplets.sizes)]
        return dict(zip(self._triplets.sites, counts, strict=True))

    def note_loss(self, loss: float | torch.Tensor) -> None:
        """Remember the last loss for :attr:`history`; a tensor is read only when the next masking comes."""
        self._loss = loss.detach() if isinstance(loss, torch.Tensor) else float(loss)

    def compact(self) -> dict[str, int]:
        """Remove the pruned triplets from memory: parameters, gradients, optimizer state, statistics, graphs.

        Outputs stay as with the mask, and the optimizer and the loop go on as they are. λ that has grown
        back since the last masking is pruned first. Wrappers that hold the adapters' shapes (DDP) must be
        made anew.

        Returns:
            The ranks that are left, by site.

        Raises:
            BudgetError: another adapter is active, a parameter is sharded, or the optimizer keeps a state that
                cannot be cut.
        """
        assert_active(self._adapted, self._adapter)
        self._refresh()
        self._apply_mask()
        none = torch.zeros(0, dtype=torch.long)
        self._resize(dict.fromkeys(self._triplets.sites, none) | {s: c.nonzero()[:, 0] for s, c in self._columns()})
        logger.info("compacted to %d triplets at step %d", self.live_triplets, self.step)
        return self.ranks()

    def shrink(self, kept: Mapping[str, torch.Tensor]) -> None:
        """Keep these triplets of each site only (ascending indices), whether the others live or not."""
        assert_active(self._adapted, self._adapter)
        self._refresh()
        self._resize(dict(kept))

    def assert_same_run(self, state: Mapping[str, Any]) -> None:
        """Raise :class:`CheckpointError` if a state is of another version, schedule or other sites.

        Ranks may differ: those of the state are smaller if it was saved after compaction.
        """
        assert_same_run(self, state)

    def detach(self) -> None:
        """Take the hooks off the optimizer; the adapters stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, together with the model's and the optimizer's states."""
        self._refresh()
        return dump_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`. Nothing changes if it does not fit.

        Raises:
            CheckpointError: other version, schedule, sites or shapes.
        """
        self._refresh()
        restore_state(self, state)

    @property
    def _last_step_number(self) -> int:
        return self.step - 1 + self.schedule.first_step

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> StepArguments | None:
        # A GradScaler tells a fused optimizer, which unscales inside its step, the scale and whether to skip.
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        self._skips_step = found_inf is not None and bool(found_inf)
        if self._skips_step:
            return None
        assert_active(self._adapted, self._adapter)
        if not self.step:
            warn_of_shifted_starts(self._adapted)
        self._has_followed = False
        grad_scale = None if found_inf is None or scale is None else float(scale)
        take = functools.partial(self._take_gradients, grad_scale)
        with_closure = call_after_closure(args, kwargs, take)
        if with_closure is None:
            take()
        return with_closure

    @torch.no_grad()
    def _take_gradients(self, scale: float | None) -> None:
        """What is to be done when the gradients of a step are there, and with closures perhaps several times."""
        self._refresh()
        grad_scale = 1.0 if scale is None else scale
        gradients = self._triplets.gather_gradients()
        if scale is None:
            assert_finite(self._triplets, gradients, self.step + 1)
        self._watch.look(self._triplets, self.step + 1)
        self._gamma = self.gamma
        if self._gamma > 0:
            add_regularizer_gradient(self._triplets, gradients, self._gamma, self.schedule.semantics, grad_scale)
            self._triplets.scatter_gradients(gradients, names=("P", "Q"))
        if self.schedule.semantics == "paper" and not self.is_frozen and not self._has_followed:
            self._has_followed = True
            self._follow(gradients, grad_scale)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._skips_step:
            return
        self.step += 1
        number = self._last_step_number
        if self.schedule.semantics == "peft" and number < self.schedule.freeze_step:
            self._follow(self._triplets.gather_gradients(), 1.0)
        if self.schedule.is_masking_step(number):
            self._allocate(number)
        if self.schedule.is_masking_step(number) or number > self.schedule.freeze_step:
            self._apply_mask()
        if number == self.schedule.freeze_step and self.schedule.compact:
            self.compact()
        if number == self.schedule.total_steps + self.schedule.first_step:
            logger.warning(
                "the optimizer took more than total_steps=%d steps; ranks stay as they are", self.schedule.total_steps
            )

    def _follow(self, gradients: Sequence[torch.Tensor], grad_scale: float) -> None:
        self._metric.update(self._triplets, gradients, grad_scale)
        if self._growth is not None:
            self._growth.update(self._triplets, gradients, grad_scale)

    def _allocate(self, number: int) -> None:
        budget = self.schedule.budget(number, self._initial, self._target)
        low, high = self.schedule.allocation.bounds(self._triplets.sites, self._triplets.sizes)
        preferred = None
        if self._growth is not None and number < self.schedule.freeze_step:
            # A share of the budget is a share of the triplets that it buys at the average cost.
            count = int(self.schedule.allocation.grow * budget * len(self._mask) / max(1, self._spendable()))
            preferred = choose_grown(self._growth.growth, self._mask, count)
        request = Request(
            scores=self._metric.scores(self._triplets),
            sizes=self._triplets.sizes,
            budget=budget,
            costs=self._costs,
            low=low,
            high=high,
            preferred=preferred,
        )
        if self.schedule.allocation.allocator == "redistribute":
            mask = allocate_by_site(request, self._importance.follow(self._triplets, self._adapted.plan))
        else:
            mask = allocate_best(request)
        self._set_mask(mask)
        self._record(number, budget)

    def _spendable(self) -> int:
        return sum(size * cost for size, cost in zip(self._triplets.sizes, self._costs, strict=True))

    def _record(self, number: int, budget: int) -> None:
        loss = None if self._loss is None else float(self._loss)
        record = MaskingRecord(step=number, budget=budget, ranks=self.ranks(), live=self.live_triplets, loss=loss)
        self.history.append(record)
        logger.debug("step %d: %d triplets live", number, record.live)
        for observer in self.observers:
            observer(record)

    def _set_mask(self, mask: torch.Tensor) -> None:
        self._mask = mask.to(self._triplets.device)
        self._pruned = self._triplets.split_lam(~self._mask)

    @torch.no_grad()
    def _apply_mask(self) -> None:
        for lam, pruned in zip(self._triplets.lam(self._triplets.values), self._pruned, strict=True):
            lam.masked_fill_(pruned, 0.0)

    def _columns(self) -> list[tuple[str, torch.Tensor]]:
        """By site, which columns of λ [..., r] hold a live triplet."""
        parts = zip(self._triplets.sites, self._mask.split(self._triplets.sizes), strict=True)
        return [(site, part.view(-1, self._triplets.shapes[site][-1]).any(0)) for site, part in parts if part.numel()]

    def _resize(self, kept: Mapping[str, torch.Tensor]) -> None:
        """Keep these triplets of each site only, in the adapters and in all that is known about them."""
        whole = {site: torch.arange(self._triplets.shapes[site][-1]) for site in self._triplets.sites}
        kept = whole | dict(kept)
        mask = take_triplets(self._mask, self._triplets, kept)
        compact_adapters(self._adapted, kept, self._optimizer)
        self._rebind(kept, mask)

    def _refresh(self) -> None:
        """Follow the adapter parameters when their memory has moved (``.to()``, sharding)."""
        if not self._triplets.is_current():
            self._rebind(None, self._mask)

    def _rebind(self, kept: Mapping[str, torch.Tensor] | None, mask: torch.Tensor) -> None:
        old, self._triplets = self._triplets, TripletBuffers(self._adapted.parameters_of_adapter(self._adapter))
        self._metric.rebind(old, self._triplets, kept)
        if self._growth is not None:
            self._growth.rebind(old, self._triplets, kept)
        self._set_mask(mask)

    def _find_costs(self) -> list[int]:
        if not self.schedule.counts_parameters:
            return [1] * len(self._triplets.sites)
        sites = {adapter.site.name: adapter.site for adapter in self._adapted.plan}
        return [sites[name].out_features + sites[name].in_features + 1 for name in self._triplets.sites]


def _choose_gamma(triplets: TripletBuffers) -> float:
    return 0.0 if bool(triplets.join_lam(triplets.lam(triplets.values)).any()) else _GAMMA
