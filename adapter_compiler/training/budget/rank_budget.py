"""Prune ranks to a global budget while the user's own loop trains.

All work is done in hooks on the optimizer step, so users have no method to call and no order of calls to keep:

    before the step    gradient of the regularizer; scores with semantics "paper"
    after the step     scores with semantics "peft"; masking when it is due; compaction when the set is fixed

A step that a GradScaler skips has no effect here either. If the step gets a closure, "before the step" is after each
evaluation of it. Scores use the first evaluation, whose gradient belongs to the weights before the step. The loss that
the closure returns does not change, so a line search does not include the regularizer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from adapter_compiler.adapters.compact import compact_adapters, forget_empty, forget_other_shapes
from adapter_compiler.adapters.reports import ShownInNotebooks
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.budget.checks import (
    GradientWatch,
    assert_active,
    assert_fits,
    assert_kinds,
    assert_reachable,
    warn_of_shifted_starts,
)
from adapter_compiler.training.budget.masking_record import MaskingRecord
from adapter_compiler.training.budget.report_data import collect_run, split_scores
from adapter_compiler.training.budget.schedule import BudgetSchedule
from adapter_compiler.training.budget.state import assert_same_run, dump_state, restore_state
from adapter_compiler.training.budget.stepping.copies import mask_copies, mask_second_weights
from adapter_compiler.training.budget.stepping.finite_gradients import FiniteGradients, find_others
from adapter_compiler.training.budget.stepping.rounds import StepRounds
from adapter_compiler.training.budget.stepping.wrappers import (
    assert_can_shrink,
    assert_not_replicated,
    find_optimizers,
    unwrap_model,
)
from adapter_compiler.training.run_report.page import write_page
from adapter_compiler.training.run_report.run_data import Alignment, Exported, Extras, SizeCurve
from adapter_compiler.training.scoring.allocator import Request, allocate_best, allocate_by_site, choose_grown
from adapter_compiler.training.scoring.importance import SiteImportance
from adapter_compiler.training.scoring.metrics import GrowthTracker, Metric, make_metric, take_triplets
from adapter_compiler.training.scoring.regularizer import add_regularizer_gradient
from adapter_compiler.training.scoring.triplet_buffers import TripletBuffers

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)

#: γ if λ starts at zero; without the regularizer the factors would then grow instead of λ.
_GAMMA = 0.1


class RankBudget(ShownInNotebooks):
    """Scores every triplet at each optimizer step and keeps the best b(t) of them (AdaLoRA, arXiv 2303.10512).

    Masking sets λ of the other triplets to zero. Their P and Q do not change, and λ can grow again until the next
    masking. From ``schedule.freeze_step`` on, the set of live triplets is fixed, and the pruned λ are exactly zero
    after every step.

    Attributes:
        schedule: when, how far and by which rule to prune.
        step: the number of optimizer steps so far.
        history: one record for each masking, the oldest first.
    """

    def __init__(
        self,
        adapted: nn.Module | Callable[..., Any],
        optimizer: Any,
        schedule: BudgetSchedule,
        *,
        observers: Sequence[Callable[[MaskingRecord], None]] = (),
    ) -> None:
        """Register hooks on the optimizer steps.

        Args:
            adapted: the result of ``compile_with_adapters``, also inside DDP or ``torch.compile``.
            optimizer: an optimizer, also inside wrappers (Accelerate, Lightning, SAM, a scheduler), or a list of
                optimizers that have all adapters together, such as Muon for P and Q and AdamW for λ. One step of the
                budget is one step of each optimizer.
            schedule: when, how far and by which rule to prune.
            observers: functions to call with the record of each masking.

        Raises:
            BudgetError: the optimizers do not hold the adapters, the target exceeds their ranks or leaves none, or
                ranks are to shrink and cannot.
        """
        given, adapted = adapted, assert_kinds(unwrap_model(adapted, AdaptedModel), schedule)
        self._chains = find_optimizers(optimizer)
        if schedule.compact:
            assert_can_shrink(given, self._chains)
            assert_not_replicated(adapted)
        self.schedule = schedule
        self.step = 0
        self.history: list[MaskingRecord] = []
        self.observers = list(observers)
        self._adapted = adapted
        self._adapter = adapted.active_adapter
        assert_fits(adapted, [chain[0] for chain in self._chains], schedule)
        self._triplets = TripletBuffers(adapted.adapters)
        self._gamma = adapted.options.gamma
        self._costs = self._find_costs()
        self._initial = sum(size * cost for size, cost in zip(self._triplets.sizes, self._costs, strict=True))
        self._target = schedule.target_triplets(len(self._triplets.sites), self._initial)
        least, _ = schedule.allocation.bounds(self._triplets.sites, self._triplets.sizes)
        assert_reachable(schedule, self._triplets.sites, least, self._costs, self._target)
        self._mask = torch.ones(sum(self._triplets.sizes), dtype=torch.bool, device=self._triplets.device)
        self._pruned = self._triplets.split_lam(~self._mask)
        self._metric, self._growth = self._make_statistics()
        self._importance = SiteImportance(len(self._triplets.sites), schedule.allocation.smoothing)
        self._origin = {site: torch.arange(shape[-1]) for site, shape in self._triplets.shapes.items()}
        self._copies: list[nn.Module] = []
        self._has_followed = False
        self._watch = GradientWatch(adapted)
        self._finite = FiniteGradients(adapted)
        self._loss: float | torch.Tensor | None = None
        self._last_scores: torch.Tensor | None = None
        self._rounds = StepRounds(self._chains, begin=self._begin_step, take=self._take_gradients, end=self._end_step)
        adapted.add_follower(self)

    def __repr__(self) -> str:
        steps = f"step {self.step} of {self.schedule.total_steps}"
        return f"RankBudget({steps}, {self.live_triplets} of {len(self._mask)} triplets live, budget {self.budget:,})"

    def __str__(self) -> str:
        rows = (f"{rank:6}  {name}" for name, rank in self.ranks().items())
        return "\n".join([repr(self), "  live  weight", *rows])

    @property
    def gamma(self) -> float:
        """The weight γ of the regularizer; by default 0.1 if all λ are 0 at the first step, else 0."""
        return _choose_gamma(self._triplets) if self._gamma is None else self._gamma

    @property
    def budget(self) -> int:
        """The budget b(t) at the last optimizer step, in triplets or parameters; before the first step, b0."""
        return self.schedule.budget(self._last_step_number, self._initial, self._target) if self.step else self._initial

    @property
    def live_triplets(self) -> int:
        """The number of triplets that the last masking kept; masked λ that have grown since do not count."""
        return int(self._mask.sum())

    @property
    def live_parameters(self) -> int:
        """The number of parameters in the live triplets."""
        ranks = self.ranks()
        plan = {adapter.site.name: adapter.site for adapter in self._adapted.adapter_set.plans[self._adapter]}
        return sum(rank * (plan[name].out_features + plan[name].in_features + 1) for name, rank in ranks.items())

    @property
    def is_frozen(self) -> bool:
        """Whether the set of live triplets is fixed."""
        return self.step > 0 and self._last_step_number >= self.schedule.freeze_step

    def ranks(self) -> dict[str, int]:
        """The number of live triplets of each site, also of sites that compaction has emptied."""
        counts = [int(part.sum()) for part in self._mask.cpu().split(self._triplets.sizes)]
        return dict(zip(self._triplets.sites, counts, strict=True))

    def note_loss(self, loss: float | torch.Tensor) -> None:
        """Record a loss for :attr:`history`; the value of a tensor is read only at the next masking."""
        self._loss = loss.detach() if isinstance(loss, torch.Tensor) else float(loss)

    def compact(self) -> dict[str, int]:
        """Remove the pruned triplets from memory: from parameters, gradients, optimizer state and statistics.

        Outputs are those of the masked model within rounding, and the optimizer and the loop need no change. λ that has
        grown since the last masking is pruned first. Wrappers that keep the adapters' shapes (DDP) must be made again.

        Returns:
            The remaining rank of each site.

        Raises:
            BudgetError: another adapter is active, a parameter is sharded, or the optimizer keeps a state tensor that
                cannot be cut.
        """
        assert_active(self._adapted, self._adapter)
        self._refresh()
        self._apply_mask()
        none = torch.zeros(0, dtype=torch.long)
        self._resize(dict.fromkeys(self._triplets.sites, none) | {s: c.nonzero()[:, 0] for s, c in self._columns()})
        logger.info("compacted to %d triplets at step %d", self.live_triplets, self.step)
        return self.ranks()

    def report(
        self,
        path: str | Path,
        *,
        losses: Sequence[float] = (),
        search: SizeCurve | None = None,
        export: Exported | None = None,
        realigner: Alignment | None = None,
        title: str = "Rank budget",
    ) -> Path:
        """Write one HTML file with the run in words and pictures; it loads nothing and runs no script.

        It shows ranks by block and role over time, budget and loss, the singular values of ΔW, what was pruned and by
        which score, and the rounding errors of the last ``adapted.fold()``.

        Args:
            path: the file.
            losses: the loss of each optimizer step; by default those given to :meth:`note_loss`, one a masking.
            search: the result of ``find_smallest``, whose curve is shown.
            export: the result of ``export_onnx``, whose errors are shown.
            realigner: a :class:`~adapter_compiler.Realigner` with batches, whose alignments over the steps are shown.
            title: the heading.

        Returns:
            The path.
        """
        self._refresh()
        names, sizes = self._triplets.sites, self._triplets.sizes
        scores = split_scores(names, sizes, self._last_scores, self._mask)
        run = collect_run(self, self._adapted, self._adapter, scores, losses=losses, title=title)
        extras = Extras(curve=search, alignment=realigner, fold=self._adapted.fold_report, export=export)
        return write_page(path, run, extras)

    def shrink(self, kept: Mapping[str, torch.Tensor]) -> None:
        """Keep only these triplets of each site (ascending indices), even if others are live."""
        assert_active(self._adapted, self._adapter)
        self._refresh()
        self._resize(dict(kept))

    def assert_same_run(self, state: Mapping[str, Any], kept: Mapping[str, torch.Tensor] | None = None) -> None:
        """Raise :class:`CheckpointError` unless a state fits this budget.

        Args:
            state: a state from :meth:`state_dict`.
            kept: for each site that will be compacted before the state is loaded, the triplets that it keeps.
        """
        assert_same_run(self, state, kept)

    def detach(self) -> None:
        """Remove the hooks from the optimizer; the adapters do not change."""
        self._rounds.detach()

    def state_dict(self) -> dict[str, Any]:
        """The state that, with those of the model and the optimizer, continues a run bit for bit.

        Raises:
            NonFiniteGradientError: a step on an accelerator had a gradient with inf or nan.
        """
        self._refresh()
        self._finite.ask(self._triplets, self._find_others())
        return dump_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`. Nothing changes if it does not fit.

        Raises:
            CheckpointError: the state has another version, schedule, sites or shapes.
        """
        self._refresh()
        restore_state(self, state)
        self._last_scores = None

    @property
    def _last_step_number(self) -> int:
        return self.step - 1 + self.schedule.first_step

    def apply_mask(self, module: nn.Module | None = None) -> None:
        """Set λ of the pruned triplets to zero, in the model or in a copy of it.

        From the freeze step on, each optimizer step does this. Call it if something else has changed λ since: averaged
        weights (``apply_mask(ema)``), or an optimizer that switches weights (schedule-free's ``optimizer.eval()``).

        Args:
            module: a copy, such as ``AveragedModel(adapted)``, or of the adapters alone, if the model is sharded:
                ``AveragedModel(adapted.adapters)``. If the model was compacted, the copy is compacted first.

        Raises:
            BudgetError: there is no adapted model in ``module``, or one with other sites or ranks.
        """
        self._refresh()
        if module is None:
            self._apply_mask()
        else:
            mask_copies(module, self._adapter, self._pruned_by_site(), self._origin)

    def follow(self, module: Module) -> Module:
        """Call :meth:`apply_mask` on a copy, such as ``AveragedModel(adapted)``, whenever the model is masked.

        Returns:
            The copy.
        """
        self.apply_mask(module)
        self._copies.append(module)
        return module

    def _begin_step(self) -> None:
        assert_active(self._adapted, self._adapter)
        if not self.step:
            warn_of_shifted_starts(self._adapted)
        self._has_followed = False

    @torch.no_grad()
    def _take_gradients(self, scale: float | None) -> None:
        """Add the regularizer's gradient and update scores; with closures, this may run several times a step."""
        self._refresh()
        grad_scale = 1.0 if scale is None else scale
        gradients = self._triplets.gather_gradients()
        if scale is None:
            self._finite.check(self._triplets, gradients, self.step + 1, self._find_others())
        self._watch.check(self._triplets, self.step + 1)
        self._gamma = self.gamma
        if self._gamma > 0:
            add_regularizer_gradient(self._triplets, gradients, self._gamma, self.schedule.semantics, grad_scale)
            self._triplets.scatter_gradients(gradients, names=("P", "Q"))
        if self.schedule.semantics == "paper" and not self.is_frozen and not self._has_followed:
            self._has_followed = True
            self._follow(gradients, grad_scale)

    @torch.no_grad()
    def _end_step(self) -> None:
        self.step += 1
        number = self._last_step_number
        if self.schedule.semantics == "peft" and number < self.schedule.freeze_step:
            self._follow(self._triplets.gather_gradients(), 1.0)
        if self.schedule.is_masking_step(number):
            self._finite.ask(self._triplets, self._find_others())
            self._allocate(number)
        if self.schedule.is_masking_step(number) or number > self.schedule.freeze_step:
            self._apply_mask()
        if number == self.schedule.freeze_step and self.schedule.compact:
            assert_not_replicated(self._adapted)
            self.compact()
        if number == self.schedule.total_steps + self.schedule.first_step:
            logger.warning(
                "the optimizer took more than total_steps=%d steps; ranks do not change any more",
                self.schedule.total_steps,
            )

    def _find_others(self) -> list[torch.Tensor]:
        return find_others(self._triplets, (one for chain in self._chains for one in chain))

    def _follow(self, gradients: Sequence[torch.Tensor], grad_scale: float) -> None:
        self._metric.update(self._triplets, gradients, grad_scale)
        if self._growth is not None:
            self._growth.update(self._triplets, gradients, grad_scale)

    def _allocate(self, number: int) -> None:
        budget = self.schedule.budget(number, self._initial, self._target)
        low, high = self.schedule.allocation.bounds(self._triplets.sites, self._triplets.sizes)
        preferred = None
        if self._growth is not None and number < self.schedule.freeze_step:
            # The number of triplets that this share of the budget pays for at the average cost.
            count = int(self.schedule.allocation.grow * budget * len(self._mask) / max(1, self._spendable()))
            preferred = choose_grown(self._growth.growth, self._mask, count)
        self._last_scores = self._metric.scores(self._triplets)
        request = Request(
            scores=self._last_scores,
            sizes=self._triplets.sizes,
            budget=budget,
            costs=self._costs,
            low=low,
            high=high,
            preferred=preferred,
        )
        if self.schedule.allocation.allocator == "redistribute":
            mask = allocate_by_site(request, self._importance.update(self._triplets, self._adapted.plan))
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
        if self.is_frozen:
            pruned_by_site = self._pruned_by_site()
            lam_of = {site: self._triplets.parameters[site, "lam"] for site in self._triplets.sites}
            mask_second_weights([one for chain in self._chains for one in chain], lam_of, pruned_by_site)
        self._mask_copies()

    def _mask_copies(self) -> None:
        for copy in self._copies:
            mask_copies(copy, self._adapter, self._pruned_by_site(), self._origin)

    def _pruned_by_site(self) -> dict[str, torch.Tensor]:
        return dict(zip(self._triplets.sites, (~self._mask).split(self._triplets.sizes), strict=True))

    def _columns(self) -> list[tuple[str, torch.Tensor]]:
        """By site, the columns of λ [..., r] with a live triplet, [r] of bool."""
        parts = zip(self._triplets.sites, self._mask.split(self._triplets.sizes), strict=True)
        return [(site, part.view(-1, self._triplets.shapes[site][-1]).any(0)) for site, part in parts if part.numel()]

    def _resize(self, kept: Mapping[str, torch.Tensor]) -> None:
        """Keep only these triplets of each site, in the adapters and in the statistics."""
        whole = {site: torch.arange(self._triplets.shapes[site][-1]) for site in self._triplets.sites}
        kept = whole | dict(kept)
        mask = take_triplets(self._mask, self._triplets, kept)
        compact_adapters(self._adapted, kept, *(one for chain in self._chains for one in chain))
        self._origin = {site: index[kept[site]] for site, index in self._origin.items()}
        self._rebind(kept, mask)
        self._mask_copies()

    def _refresh(self) -> None:
        """Make new triplet buffers if the memory of the adapter parameters has changed (``.to()``, sharding)."""
        if not self._triplets.is_current():
            self._rebind(None, self._mask)

    def follow_ranks(self) -> None:
        """Reset the statistics and make every triplet live, because a loaded state dict has changed the ranks.

        The old statistics belong to other triplets. If the budget's own state is loaded next, it has the right ones.
        """
        triplets = TripletBuffers(self._adapted.parameters_of_adapter(self._adapter))
        optimizers = [one for chain in self._chains for one in chain]
        forget_empty(optimizers, triplets.parameters.values())
        if triplets.shapes == self._triplets.shapes:
            return
        forget_other_shapes(optimizers, triplets.parameters.values())
        self._triplets = triplets
        self._metric, self._growth = self._make_statistics()
        self._origin = {site: torch.arange(shape[-1]) for site, shape in triplets.shapes.items()}
        self._set_mask(torch.ones(sum(triplets.sizes), dtype=torch.bool, device=triplets.device))

    def _make_statistics(self) -> tuple[Metric, GrowthTracker | None]:
        allocation = self.schedule.allocation
        metric = make_metric(allocation.metric, self._triplets, self.schedule.beta1, self.schedule.beta2)
        return metric, GrowthTracker(self._triplets, allocation.smoothing) if allocation.grow else None

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
