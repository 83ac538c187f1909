"""The methods that the quality benchmark compares, with as many values at the end as LoRA and scale s = alpha / rank.

Only rsLoRA has another scale, alpha / √rank with the alpha of LoRA: it would else be LoRA itself. DoRA trains a
magnitude for each row beside, and peft's AdaLoRA can count ranks only; the number of values that are left is part of
every result.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

import adapter_compiler as ac
from benchmarks.quality_tasks import Examples, Task, draw_batches, loss, measure_accuracy

SCALE = 4.0
#: The peak learning rate of a new head, whatever the adapters' is.
HEAD_RATE = 1e-3
#: Batches that initializers look at.
_LOOKS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One way of training.

    Attributes:
        rates: which learning rates there are to choose from; "strong" ones move the model more at the same rate.
        options: of ``AdapterConfig``; ``None`` for what is not ours.
        start: an initializer that needs data.
        peft: ``"lora"`` or ``"adalora"`` for peft's.
        surplus: the rank at the start over that at the end; above 1 a budget prunes.
        grow: share of the budget for pruned triplets.
    """

    rates: str = "lora"
    options: Mapping[str, Any] | None = None
    start: str | None = None
    peft: str | None = None
    surplus: float = 1.0
    grow: float = 0.0


METHODS: dict[str, Method] = {
    "full": Method(rates="full"),
    "lora": Method(options={"kind": "lora"}),
    "rslora": Method(rates="strong", options={"kind": "lora", "scaling": "rslora"}),
    "dora": Method(options={"kind": "dora"}),
    "pissa": Method(rates="strong", options={"kind": "lora", "init": "pissa"}),
    "lora_ga": Method(rates="gradient", options={"kind": "lora"}, start="lora_ga"),
    "adalora_gaussian": Method(rates="svd", options={"kind": "svd", "init": "gaussian"}, surplus=1.5),
    "adalora": Method(options={"kind": "svd"}, surplus=1.5),
    "adalora_grow": Method(options={"kind": "svd"}, surplus=1.5, grow=0.1),
    "adalora_kaiming": Method(options={"kind": "svd", "init": "kaiming"}, surplus=1.5),
    "adalora_gradient": Method(rates="svd", options={"kind": "svd"}, start="gradient_svd", surplus=1.5),
    "adalora_gradient_grow": Method(rates="svd", options={"kind": "svd"}, start="gradient_svd", surplus=1.5, grow=0.1),
    "peft_lora": Method(peft="lora"),
    "peft_adalora": Method(rates="svd", peft="adalora", surplus=1.5),
}
#: Learning rates by task and by ``Method.rates``.
_RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "digits": {
        "full": (1e-3, 2e-3, 3e-3, 5e-3),
        "lora": (6e-3, 8e-3, 1e-2, 1.4e-2),
        "strong": (3e-3, 6e-3, 1e-2, 1.4e-2),
        "gradient": (3e-3, 6e-3, 1e-2, 1.4e-2),
        "svd": (2e-2, 3e-2, 4e-2, 6e-2),
    },
    "text": {
        "full": (1e-4, 3e-4, 6e-4),
        "lora": (1e-3, 2e-3, 4e-3),
        "strong": (3e-4, 1e-3, 2e-3),
        "gradient": (1e-4, 3e-4, 1e-3),
        "svd": (5e-3, 1e-2, 2e-2),
    },
}


def get_rates(task: str, method: Method) -> tuple[float, ...]:
    """The learning rates that are tried."""
    return _RATES.get(task, _RATES["text"])[method.rates]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """Accuracies, and how many values of the adapters (or of the model) are left in use."""

    validation: float
    test: float
    parameters: int


def run_method(method: Method, task: Task, *, rank: int, rate: float, steps: int, seed: int) -> Outcome:
    """Train once. The batches depend on the seed only."""
    batches = draw_batches(task.train, steps, task.batch_size, seed)
    torch.manual_seed(seed)
    if method.peft is not None:
        model, count = _train_peft(method, task, rank, rate, batches)
    elif method.options is None:
        model = task.copy_model()
        optimizer = _make_optimizer(task, model.named_parameters(), rate)
        _train(model, optimizer, batches)
        count = sum(p.numel() for p in model.parameters())
    else:
        model, count = _train_ours(method, task, rank, rate, batches)
    return Outcome(
        validation=measure_accuracy(model, task.validation), test=measure_accuracy(model, task.test), parameters=count
    )


def _train_ours(method: Method, task: Task, rank: int, rate: float, batches: list[Examples]) -> tuple[nn.Module, int]:
    start = round(method.surplus * rank)
    head = () if task.head is None else (f"{task.head}.*",)
    alpha = SCALE * start
    config = ac.AdapterConfig(rank=start, alpha=alpha, sites=task.sites, trainable=head, **(method.options or {}))
    adapted = ac.compile_with_adapters(task.copy_model(), example_kwargs=batches[0][0], config=config)
    if method.start is not None:
        look = ac.DataStart(method=method.start, at_once=len(adapted.sites))
        ac.initialize_adapters(adapted, look, batches[:_LOOKS], loss)
    optimizer = _make_optimizer(task, [*adapted.module.named_parameters(), *adapted.adapters.named_parameters()], rate)
    count = sum(p.numel() for p in adapted.adapters.parameters() if p.requires_grad)
    budget = None
    if method.surplus > 1:
        values = sum(rank * (a.site.out_features + a.site.in_features) for a in adapted.plan)
        schedule = ac.BudgetSchedule(
            target_parameters=values, total_steps=len(batches), allocation=ac.Allocation(grow=method.grow)
        )
        budget = ac.RankBudget(adapted, optimizer, schedule)
    _train(adapted, optimizer, batches)
    return adapted, count if budget is None else budget.live_parameters


def _train_peft(method: Method, task: Task, rank: int, rate: float, batches: list[Examples]) -> tuple[nn.Module, int]:
    import peft

    start = round(method.surplus * rank)
    common: dict[str, Any] = {"target_modules": task.targets, "lora_alpha": SCALE * start}
    common["modules_to_save"] = None if task.head is None else [task.head]
    if method.peft == "lora":
        config: Any = peft.LoraConfig(r=start, **common)
    else:
        steps = len(batches)
        own: dict[str, Any] = {
            "init_r": start,
            "target_r": rank,
            "tinit": steps // 10,
            "tfinal": 3 * steps // 10,
            "deltaT": 10,
        }
        config = peft.AdaLoraConfig(total_step=steps, **own, **common)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = peft.get_peft_model(task.copy_model(), config)
    names = [(n, p) for n, p in wrapped.named_parameters() if p.requires_grad and "ranknum" not in n]
    optimizer = _make_optimizer(task, names, rate)
    allocate = wrapped.base_model.update_and_allocate if method.peft == "adalora" else None
    _train(wrapped, optimizer, batches, allocate)
    adapters = [(n, p) for n, p in names if "lora_" in n]
    count = sum(p.numel() for _, p in adapters)
    if allocate is not None:
        count = sum(_count_live(wrapped, name, p) for name, p in adapters if "lora_E" in name)
    return wrapped, count


def _count_live(wrapped: nn.Module, name: str, lam: torch.Tensor) -> int:
    """Values of the live triplets of one of peft's layers."""
    parts = dict(wrapped.named_parameters())
    size = parts[name.replace("lora_E", "lora_A")].shape[1] + parts[name.replace("lora_E", "lora_B")].shape[0] + 1
    return int(torch.count_nonzero(lam.detach())) * size


def _make_optimizer(task: Task, named: Iterable[tuple[str, nn.Parameter]], rate: float) -> torch.optim.Optimizer:
    """AdamW, with a learning rate of its own for the head."""
    own: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in named:
        if parameter.requires_grad:
            own[task.head in name.split(".")].append(parameter)
    groups = [{"params": own[is_head], "lr": lr} for is_head, lr in ((False, rate), (True, HEAD_RATE)) if own[is_head]]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Examples], after: Any = None) -> None:
    peaks = [group["lr"] for group in optimizer.param_groups]
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=len(batches), pct_start=0.1)
    for step, batch in enumerate(batches):
        loss(model, batch).backward()
        optimizer.step()
        if after is not None:
            after(step)
        optimizer.zero_grad()
        rates.step()
