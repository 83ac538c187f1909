"""How training changed weights, as lengths and directions of their rows (Liu et al., DoRA, section 3.2).

Full fine-tuning changes lengths and directions in opposite measure (few rows turn far and keep their length, and the
other way round), LoRA changes both together, and DoRA is near full fine-tuning; see https://arxiv.org/abs/2402.09353.
The changes are measured from the weights alone, so they compare any two states: adapters of every form, and modules
that were trained fully.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from adapter_compiler.adapters.copies import share_unpacked
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.saving.primitives.files import written_beside
from passes.adapt.fold_adapters import merge_weight
from passes.planning.plan import PlannedAdapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightChange:
    """The change of one weight, averaged over its rows, which are one for each output.

    Attributes:
        magnitude: ΔM, the mean of abs(‖w'ₙ‖ − ‖wₙ‖) over the rows n (equation 3).
        direction: ΔD, the mean of 1 − cos(w'ₙ, wₙ), from 0 to 2 (equation 4). A row of zeros, before or after, counts
            as turned by nothing.
    """

    magnitude: float
    direction: float


def measure_weight_changes(
    trained: nn.Module, base: nn.Module | None = None, *, weights: tuple[str, ...] | None = None
) -> dict[str, WeightChange]:
    """The change of each weight, by name.

    Args:
        trained: an adapted model, or a module that was trained fully.
        base: the module as it was before; needed unless ``trained`` is an adapted model, which has its frozen weights.
        weights: the names of the weights; by default those with an adapter, and in a module all parameters of two and
            more dimensions. Weights of more dimensions count as matrices of one row for each output.

    Raises:
        ConfigError: the base is missing, does not have one of the weights or has it in another shape.
    """
    if base is None and not isinstance(trained, AdaptedModel):
        raise ConfigError(
            f"measure_weight_changes(trained=...) is a {type(trained).__name__}, expected an AdaptedModel, or the "
            "module as it was before training as base="
        )
    transposed: set[str] = set()
    before: dict[str, torch.Tensor] = {} if base is None else dict(base.named_parameters())
    if isinstance(trained, AdaptedModel):
        planned = trained.plan.by_weight
        transposed = {weight for weight, (adapter, *_) in planned.items() if adapter.site.transposed}
        names = tuple(planned) if weights is None else weights
        own = dict(trained.module.named_parameters())
        frozen = {name: share_unpacked(own[name]) for name in names if name in own}
        after = {name: _merge(trained, weight, planned.get(name, ())) for name, weight in frozen.items()}
        before = before or dict(frozen)
    else:
        after = dict(trained.named_parameters())
        names = tuple(name for name, p in after.items() if p.dim() >= 2) if weights is None else weights
    return {name: _compare(name, before, after, is_transposed=name in transposed) for name in names}


def plot_weight_changes(
    changes: Mapping[str, Mapping[str, WeightChange]], path: str | Path, *, title: str = ""
) -> Path:
    """Draw ΔM against ΔD, a point for each weight and a color for each method or checkpoint.

    Args:
        changes: results of :func:`measure_weight_changes` by label, such as ``{"lora": ..., "dora": ...}``.
        path: the file to write; its suffix determines the format (png, svg, pdf). The picture is written to a
            temporary file, which is then renamed.
        title: heading of the picture.

    Raises:
        ConfigError: there is nothing to draw, or the format is unknown.
    """
    if not any(changes.values()):
        raise ConfigError(
            "plot_weight_changes got no changes, expected results of measure_weight_changes by label, as in "
            "{'lora': measure_weight_changes(adapted)}"
        )
    from adapter_compiler.report.change_figure import draw_changes
    from adapter_compiler.report.rank_figure import assert_known_format

    path = Path(path)
    assert_known_format(path)
    points = {
        label: [(change.direction, change.magnitude) for change in found.values()] for label, found in changes.items()
    }
    figure = draw_changes(points, title)
    with written_beside(path) as draft:
        figure.savefig(draft)
    return path


def _merge(adapted: AdaptedModel, weight: torch.Tensor, adapters: Sequence[PlannedAdapter]) -> torch.Tensor:
    """W + ΔW, as in the folded model."""
    for adapter in adapters:
        weight = merge_weight(weight, adapter, adapted.adapters.parameters_of(adapter)).weight
    return weight


def _compare(
    name: str, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], *, is_transposed: bool
) -> WeightChange:
    if name not in before or name not in after:
        owner = "the base" if name in before else "the trained module" if name in after else "neither module"
        raise ConfigError(
            f"measure_weight_changes: {name} is a parameter of {owner}, expected one of both; give its "
            "name in the model as weights="
        )
    if before[name].shape != after[name].shape:
        raise ConfigError(
            f"measure_weight_changes: {name} has shape {tuple(after[name].shape)}, {tuple(before[name].shape)} before, "
            "expected the same; give the module that was trained as base"
        )
    old, new = (_as_rows(tensors[name], is_transposed) for tensors in (before, after))
    lengths = old.norm(dim=1), new.norm(dim=1)
    product = lengths[0] * lengths[1]
    cosine = torch.where(product > 0, (old * new).sum(1) / product.clamp_min(torch.finfo(product.dtype).tiny), 1.0)
    return WeightChange(
        magnitude=float((lengths[1] - lengths[0]).abs().mean()), direction=float((1 - cosine).clamp_min(0).mean())
    )


def _as_rows(weight: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    wide = weight.detach().to("cpu", torch.float64)
    wide = wide.reshape(1, -1) if wide.dim() < 2 else wide
    return wide.t() if is_transposed and wide.dim() == 2 else wide.flatten(1)
