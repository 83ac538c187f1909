"""Write PEFT's adapter folders, as LoRA of the pruned ranks or as AdaLoRA, without importing PEFT."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.adapters.named_adapters import find_moved_buffers
from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.folders.peft_format.config import PEFT_CONFIG, PEFT_EPSILON
from adapter_compiler.saving.folders.peft_format.layers import ParametersOf, PeftSite, assert_expressible, make_site
from adapter_compiler.saving.folders.peft_format.notes import PEFT_WEIGHTS, PeftNotes, make_metadata
from adapter_compiler.saving.folders.peft_format.tensors import PEFT_PREFIX
from adapter_compiler.saving.folders.peft_format.trained_modules import TrainedTensors, find_trained, group_trained
from adapter_compiler.saving.folders.saved_adapters import SavedAdapters
from adapter_compiler.saving.layer_kinds import LINEAR, LINEAR_OR_CONV1D, find_layer_kind
from adapter_compiler.saving.primitives.files import written_beside
from adapter_compiler.saving.quantized_formats import QuantizedFormat, find_formats
from passes.planning.plan import AdapterPlan, PlannedAdapter

#: What a folder may be written as.
PEFT_KINDS = ("lora", "adalora")

#: Whether each module has a rank of its own, or all have the largest, for readers that know no patterns.
Ranks = Literal["own", "one"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Contents:
    """What is to be written.

    Attributes:
        plan: the adapters.
        parameters_of: returns the parameters of each.
        layers: the kind of module of each weight.
        trained: what was trained fully.
        quantized: the format of each quantized weight.
    """

    plan: AdapterPlan
    parameters_of: ParametersOf
    layers: Mapping[str, str]
    trained: TrainedTensors
    quantized: Mapping[str, QuantizedFormat]


def save_peft_adapters(adapted: AdapterState, folder: str | Path, *, kind: str = "lora") -> Path:
    """Write the adapters as a folder that ``PeftModel.from_pretrained`` loads.

    Args:
        adapted: the model. Sites may be weights of ``nn.Linear``, transformers' ``Conv1D``, ``nn.Embedding``,
            convolutions without groups and dilation, and ``in_proj_weight`` of ``nn.MultiheadAttention``; of the
            first two and ``nn.Conv2d`` for AdaLoRA.
        folder: where to write.
        kind: ``"lora"`` writes the live triplets of each site as LoRA of exactly that rank, with λ and the
            scale folded in, and DoRA as PEFT's ``use_dora``; ``"adalora"`` keeps P, λ and Q, padded to one rank.

    Returns:
        The folder.

    Raises:
        ConfigError: ``kind`` is unknown, or PEFT cannot express a site or what was trained besides; it is named.
    """
    _assert_kind(kind)
    plan = adapted.plan
    layers = {weight: find_layer_kind(adapted.module, weight) for weight in plan.by_weight}
    for adapter in plan:
        assert_expressible(adapter, layers[adapter.site.weight], kind)
    contents = _Contents(
        plan=plan,
        parameters_of=adapted.adapters.parameters_of,
        layers=layers,
        trained=find_trained(
            adapted.module, {weight.rpartition(".")[0] for weight in layers}, find_moved_buffers(adapted)
        ),
        quantized=find_formats(adapted.module),
    )
    return _write(contents, Path(folder), kind)


def convert_to_peft(saved: SavedAdapters, folder: str | Path, *, kind: str = "lora", ranks: Ranks = "own") -> Path:
    """Write the adapters of another folder in the same way, without the model's code.

    Args:
        saved: the adapters.
        folder: where to write.
        kind: as for :func:`save_peft_adapters`.
        ranks: ``"one"`` writes LoRA without patterns: all modules have the largest rank, padded with zeros.

    Raises:
        CheckpointError: the folder holds what is no adapter, such as single rows of an embedding.
        ConfigError: as for :func:`save_peft_adapters`; or the folder does not say what kind of module a site is in.
    """
    _assert_kind(kind)
    saved.assert_plain("a converted folder")
    layers = {one.planned.site.weight: one.layer for one in saved.adapters.values()}
    if unknown := sorted(weight for weight, layer in layers.items() if not layer):
        raise ConfigError(
            f"{saved.path} does not say what kind of module {unknown[0]} belongs to, which PEFT's names of tensors "
            "depend on; save the adapters again with this version"
        )
    trained = {name: saved.tensor(key) for name, key in saved.replacements.items()}
    contents = _Contents(
        plan=saved.plan,
        parameters_of=lambda adapter: saved.parameters_of(adapter.site.name),
        layers=layers,
        trained=group_trained(trained, {weight.rpartition(".")[0] for weight in layers}, saved.trained, saved.path),
        quantized=saved.quantized,
    )
    return _write(contents, Path(folder), kind, ranks)


def _write(contents: _Contents, folder: Path, kind: str, ranks: Ranks = "own") -> Path:
    """Write the two files of a PEFT folder, both or none."""
    weights = contents.plan.by_weight
    made = [make_site(group, contents.parameters_of, contents.layers[name], kind) for name, group in weights.items()]
    sites = [site for site in made if site.rank]
    _assert_all_or_none_rescale(contents.plan)
    if not sites:
        raise ConfigError("no triplet is alive at any site, so there is nothing to write")
    rank = max(site.rank for site in sites)
    if kind == "adalora" or ranks == "one":
        sites = [site.pad(rank) for site in sites]
    if kind == "lora":
        config = _lora_config(sites, rank, ranks)
    else:
        config = _adalora_config(sites, rank, _find_common_scale(contents.plan))
    notes = _find_notes(contents)
    config |= {
        "modules_to_save": list(contents.trained.modules) or None,
        "bias": "lora_only" if contents.trained.biases else "none",
        "fan_in_fan_out": _is_transposed(contents),
    }
    tensors = _spell_tensors(sites, contents.trained, kind)
    _assert_finite(tensors)
    with written_beside(folder / PEFT_WEIGHTS) as draft:
        save_file(tensors, draft, metadata=make_metadata(notes))
        draft.with_name(PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _assert_kind(kind: str) -> None:
    if kind not in PEFT_KINDS:
        raise ConfigError(f"PEFT adapters of the kind {kind!r}: expected 'lora' or 'adalora'")


def _assert_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise if a tensor has no numbers, as those have that exceed float32, in which PEFT's adapters are written."""
    odd = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if odd:
        raise ConfigError(
            f"{odd[0]} would have inf or nan in {tensors[odd[0]].dtype}, expected finite values, because PEFT's "
            "adapters are written in float32; save the adapters with save(), or look for a learning rate that was too "
            "high"
        )


def _assert_all_or_none_rescale(plan: Iterable[PlannedAdapter]) -> None:
    """PEFT's use_dora holds for all modules of a folder."""
    by_kind = {adapter.form.rescales: adapter for adapter in plan}
    if len(by_kind) > 1:
        dora, other = by_kind[True], by_kind[False]
        raise ConfigError(
            f"site {dora.site.name} has the form {dora.form.name!r} and site {other.site.name} {other.form.name!r}; "
            "PEFT has one use_dora for all; expected DoRA at all sites or at none"
        )


def _find_common_scale(plan: Iterable[PlannedAdapter]) -> float:
    scales = {adapter.scale for adapter in plan}
    if len(scales) > 1 or min(scales) <= 0:
        raise ConfigError(f"sites have the scales {sorted(scales)}, PEFT's AdaLoRA has one above 0; write kind='lora'")
    return scales.pop()


def _find_notes(contents: _Contents) -> PeftNotes:
    """What PEFT's files do not say: the layout of linear layers, and what the base weights were."""
    transposed = {
        adapter.site.weight.rpartition(".")[0]: adapter.site.transposed
        for adapter in contents.plan
        if contents.layers[adapter.site.weight] == LINEAR
    }
    return PeftNotes(transposed=transposed, quantized=contents.quantized)


def _is_transposed(contents: _Contents) -> bool:
    """PEFT's fan_in_fan_out, which it corrects for each module; of a converted folder the value that it had."""
    layouts: dict[str, set[bool]] = {LINEAR: set(), LINEAR_OR_CONV1D: set()}
    for adapter in contents.plan:
        if (layer := contents.layers[adapter.site.weight]) in layouts:
            layouts[layer].add(adapter.site.transposed)
    return (layouts[LINEAR_OR_CONV1D] or layouts[LINEAR]) == {True}


def _lora_config(sites: Sequence[PeftSite], rank: int, ranks: Ranks) -> dict[str, Any]:
    own = {f"^{re.escape(site.module)}": site.rank for site in sites} if ranks == "own" else {}
    common: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    common |= {"rank_pattern": own, "alpha_pattern": own}
    common["use_dora"] = any(site.magnitude is not None for site in sites)
    return {**_common_config(sites), **common}


def _adalora_config(sites: Iterable[PeftSite], rank: int, scale: float) -> dict[str, Any]:
    own = {"peft_type": "ADALORA", "init_r": rank, "target_r": rank, "lora_alpha": scale * (rank + PEFT_EPSILON)}
    # PEFT wants a schedule with a budgeting phase even for adapters that have had theirs.
    schedule = {"tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1, "rank_pattern": None}
    return {**_common_config(sites), **own, **schedule}


def _common_config(sites: Iterable[PeftSite]) -> dict[str, Any]:
    modules = "|".join(re.escape(site.module) for site in sites)
    return {
        "target_modules": f"(?:{modules})",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": None,
    }


def _spell_tensors(sites: Iterable[PeftSite], trained: TrainedTensors, kind: str) -> dict[str, torch.Tensor]:
    found = {name: tensor for site in sites for name, tensor in site.spell(kind)}
    names = {PEFT_PREFIX + name: tensor for name, tensor in trained.tensors.items()}
    for name, tensor in trained.biases.items():
        names[f"{PEFT_PREFIX}{name.removesuffix('.bias')}.base_layer.bias"] = tensor
    return found | {name: tensor.detach().cpu().contiguous().clone() for name, tensor in names.items()}
