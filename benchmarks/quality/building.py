"""Make the model, the optimizer and the budget of one run of a method."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import adapter_compiler as ac
from benchmarks.quality.methods import Method
from benchmarks.quality.tasks.base import Examples, Task

SCALE = 4.0
#: The peak learning rate of a new head, whatever the adapters' is.
HEAD_RATE = 1e-3
#: Batches that initializers look at.
_LOOKS = 8
#: peft's default weight of AdaLoRA's regularizer, which models that return no loss do not get by themselves.
_PEFT_GAMMA = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a method.

    Attributes:
        model: what trains.
        optimizer: over all that trains; its groups have their peak rates.
        count: the number of values of the adapters (or of the model) that are left in use, when called.
        after_step: called with the number of each step after it, from 0.
        penalty: what is added to the loss, from the trained tensors by name; ``None`` for nothing.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    count: Callable[[], int]
    after_step: Callable[[int], None] = lambda step: None
    penalty: Callable[[dict[str, Tensor]], Tensor] | None = None


def build_run(method: Method, task: Task, batches: list[Examples], *, rank: int, rate: float, seed: int) -> Run:
    """A run that has not begun; the start depends on the seed."""
    torch.manual_seed(seed)
    if method.peft is not None:
        return _build_peft(method, task, rank, rate, len(batches))
    if method.options is None:
        model = task.copy_model()
        size = sum(p.numel() for p in model.parameters())
        optimizer = make_adamw(method, task, model.named_parameters(), rate)
        return Run(model=model, optimizer=optimizer, count=lambda: size)
    return _build_ours(method, task, batches, rank, rate)


def _build_ours(method: Method, task: Task, batches: list[Examples], rank: int, rate: float) -> Run:
    start = round(method.surplus * rank)
    head = () if task.head is None else (f"{task.head}.*",)
    config = ac.AdapterConfig(
        rank=start, alpha=SCALE * start, sites=task.sites, trainable=head, **(method.options or {})
    )  # fmt: skip
    adapted = ac.compile_with_adapters(task.copy_model(), example_kwargs=batches[0][0], config=config)
    if method.start is not None:
        look = ac.DataStart(method=method.start, at_once=len(adapted.sites))
        batch_loss = lambda model, batch: task.loss(model(**batch[0]), batch[1])  # noqa: E731
        ac.initialize_adapters(adapted, look, batches[:_LOOKS], batch_loss)
    if method.rule is not None:
        other_rate = rate if task.head is None else HEAD_RATE
        optimizer: torch.optim.Optimizer = adapted.make_optimizer(rate, rule=method.rule, other_lr=other_rate)
    else:
        named = [*adapted.module.named_parameters(), *adapted.adapters.named_parameters()]
        optimizer = make_adamw(method, task, named, rate)
    if method.surplus == 1:
        size = sum(p.numel() for p in adapted.adapters.parameters() if p.requires_grad)
        return Run(model=adapted, optimizer=optimizer, count=lambda: size)
    values = sum(rank * (a.site.out_features + a.site.in_features) for a in adapted.plan)
    allocation = ac.Allocation(metric=method.metric)
    schedule = ac.BudgetSchedule(target_parameters=values, total_steps=len(batches), allocation=allocation)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    return Run(model=adapted, optimizer=optimizer, count=lambda: budget.live_parameters)


def _build_peft(method: Method, task: Task, rank: int, rate: float, steps: int) -> Run:
    import peft

    start = round(method.surplus * rank)
    common: dict[str, Any] = {"target_modules": task.targets, "lora_alpha": SCALE * start}
    common["modules_to_save"] = None if task.head is None else [task.head]
    if method.peft == "lora":
        config: Any = peft.LoraConfig(r=start, **common)
    else:
        times = {"tinit": steps // 10, "tfinal": 3 * steps // 10, "deltaT": 10}
        config = peft.AdaLoraConfig(init_r=start, target_r=rank, total_step=steps, **times, **common)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = peft.get_peft_model(task.copy_model(), config)
    names = [(n, p) for n, p in wrapped.named_parameters() if p.requires_grad and "ranknum" not in n]
    optimizer = make_adamw(method, task, names, rate)
    adapters = [(n, p) for n, p in names if "lora_" in n]
    if method.peft == "lora":
        return Run(model=wrapped, optimizer=optimizer, count=lambda: sum(p.numel() for _, p in adapters))
    return Run(
        model=wrapped,
        optimizer=optimizer,
        count=lambda: sum(_count_live(wrapped, name, p) for name, p in adapters if "lora_E" in name),
        after_step=wrapped.base_model.update_and_allocate,
        penalty=_find_peft_penalty,
    )


def _find_peft_penalty(trained: dict[str, Tensor]) -> Tensor:
    """peft's regularizer: the mean of ‖P PᵀP − I‖ over its A and B, times its default weight."""
    norms = []
    for name, p in trained.items():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append((gram - torch.eye(len(gram))).norm())
    return _PEFT_GAMMA * torch.stack(norms).mean()


def _count_live(wrapped: nn.Module, name: str, lam: Tensor) -> int:
    """Values of the live triplets of one of peft's layers."""
    parts = dict(wrapped.named_parameters())
    size = parts[name.replace("lora_E", "lora_A")].shape[1] + parts[name.replace("lora_E", "lora_B")].shape[0] + 1
    return int(torch.count_nonzero(lam.detach())) * size


def make_adamw(
    method: Method, task: Task, named: Iterable[tuple[str, nn.Parameter]], rate: float
) -> torch.optim.Optimizer:
    """AdamW over what trains, with the betas of the method; λ and a new head have rates of their own."""
    rates = {"": rate, "lam": rate * method.lam_times, "head": HEAD_RATE}
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    for name, parameter in named:
        if parameter.requires_grad:
            groups[_find_kind(task, name)].append(parameter)
    given: list[dict[str, Any]] = [{"params": group, "lr": rates[kind]} for kind, group in groups.items() if group]
    return torch.optim.AdamW(given, betas=method.betas, weight_decay=0.0, fused=True)


def _find_kind(task: Task, name: str) -> str:
    """Which learning rate a parameter has."""
    if task.head is not None and f"{task.head}." in name:
        return "head"
    return "lam" if name.endswith("lam") else ""
