"""The representation of an adapted model in an interpreter."""

from __future__ import annotations

from torch import nn

from adapter_compiler.adapters.adapter_state import AdapterState


def describe_briefly(adapted: AdapterState) -> str:
    """A few lines about the adapters, followed by the representation of the user's module."""
    plan = adapted.plan
    ranks = sorted(adapter.rank for adapter in plan)
    kinds = ", ".join(sorted({adapter.form.name for adapter in plan}))
    span = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    trained = sum(p.numel() for p in adapted.trainable_parameters())
    total = sum(p.numel() for p in adapted.module.parameters())
    others = [name for name in adapted.adapter_names if name != adapted.active_adapter]
    lines = [
        f"{len(plan)} sites: {kinds}, rank {span}",
        f"adapter: {adapted.active_adapter!r}" + (f" (inactive: {', '.join(map(repr, others))})" if others else ""),
        f"trains {trained:,} values, {trained / max(1, total):.2%} of the module's {total:,}",
        f"(module): {_indent(adapted.module)}",
    ]
    return "AdaptedModel(\n" + "".join(f"  {line}\n" for line in lines) + ")"


def _indent(module: nn.Module) -> str:
    first, *rest = repr(module).splitlines()
    return "\n".join([first, *(f"  {line}" for line in rest)])
