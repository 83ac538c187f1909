"""Write PEFT's adapter folders, as LoRA of the pruned ranks or as AdaLoRA, without importing PEFT."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.adapters.parameters.factors import factor_update, factor_weight
from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.folders.read_peft import PEFT_EPSILON, PEFT_PREFIX, PEFT_WEIGHTS
from adapter_compiler.saving.folders.saved_adapters import PEFT_CONFIG, SavedAdapters
from adapter_compiler.saving.primitives.files import written_beside
from passes.forms.dora import MAGNITUDE
from passes.planning.plan import AdapterPlan, PlannedAdapter

#: What a folder may be written as.
PEFT_KINDS = ("lora", "adalora")

_ParametersOf = Callable[[PlannedAdapter], Mapping[str, torch.Tensor]]

_LAYERS = ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftSite:
    """One module as PEFT wants it: P [out, r], λ [r] and Q [r, in], and the magnitude [out] of DoRA."""

    module: str
    P: torch.Tensor
    lam: torch.Tensor
    Q: torch.Tensor
    magnitude: torch.Tensor | None = None


def save_peft_adapters(adapted: AdapterState, folder: str | Path, *, kind: str = "lora") -> Path:
    """Write the adapters as a folder that ``PeftModel.from_pretrained`` loads.

    Args:
        adapted: the model; every site must be the ``weight`` of an ``nn.Linear`` or a transformers ``Conv1D``.
        folder: where to write.
        kind: ``"lora"`` writes the live triplets of each site as LoRA of exactly that rank, with λ and the
            scale folded in, and DoRA as PEFT's ``use_dora``; ``"adalora"`` keeps P, λ and Q, padded to one rank.

    Returns:
        The folder.

    Raises:
        ConfigError: ``kind`` is unknown, or a site is no such weight; it is named.
    """
    _assert_kind(kind)
    for adapter in adapted.plan:
        _assert_is_layer(adapted, adapter)
    heads = {n.rpartition(".")[0] for n, p in adapted.module.named_parameters() if p.requires_grad}
    state = adapted.module.state_dict(keep_vars=True)
    trained = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] in heads}
    return write_peft_folder(list(adapted.plan), adapted.adapters.parameters_of, trained, Path(folder), kind=kind)


def convert_to_peft(saved: SavedAdapters, folder: str | Path, *, kind: str = "lora") -> Path:
    """The same for adapters that lie in a folder, without the model's code.

    Buffers that moved in training (running statistics) have no place in PEFT's format and are left out, unless
    they belong to a module whose parameters were trained fully.
    """
    heads = {n.rpartition(".")[0] for n in saved.replacements if n.rpartition(".")[2] in ("weight", "bias")}
    chosen = {name: key for name, key in saved.replacements.items() if name.rpartition(".")[0] in heads}
    trained = {name: saved.tensor(key) for name, key in chosen.items()}
    plan = [adapter.planned for adapter in saved.adapters.values()]
    return write_peft_folder(plan, lambda a: saved.parameters_of(a.site.name), trained, Path(folder), kind=kind)


def write_peft_folder(
    plan: Sequence[PlannedAdapter],
    parameters_of: _ParametersOf,
    trained: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    kind: str,
) -> Path:
    """Write the two files of a PEFT folder, both or none.

    Args:
        plan: the adapters.
        parameters_of: gives the parameters of each.
        trained: tensors of the modules that were trained fully, by qualified name.
        folder: where to write.
        kind: one of :data:`PEFT_KINDS`.

    Raises:
        ConfigError: PEFT has no way to say what the adapters are.
    """
    _assert_kind(kind)
    make = _as_lora if kind == "lora" else _as_adalora
    weights = AdapterPlan(adapters=tuple(plan)).by_weight.values()
    sites = [site for adapters in weights if (site := make(adapters, parameters_of)).P.shape[1]]
    _assert_all_or_none_rescale(plan)
    if not sites:
        raise ConfigError("no triplet is alive at any site, so there is nothing to write")
    rank = max(site.P.shape[1] for site in sites)
    if kind == "lora":
        config = _lora_config(sites, rank)
    else:
        sites = [_pad(site, rank) for site in sites]
        config = _adalora_config(sites, rank, _common_scale(plan))
    heads = sorted({name.rpartition(".")[0] for name in trained})
    config |= {"modules_to_save": heads or None, "fan_in_fan_out": _is_transposed(plan)}
    tensors = dict(_spell_tensors(sites, kind))
    tensors |= {PEFT_PREFIX + name: tensor.detach().cpu().contiguous().clone() for name, tensor in trained.items()}
    with written_beside(folder / PEFT_WEIGHTS) as draft:
        save_file(tensors, draft, metadata={"format": "pt"})
        draft.with_name(PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _assert_kind(kind: str) -> None:
    if kind not in PEFT_KINDS:
        raise ConfigError(f"PEFT adapters of the kind {kind!r}: expected 'lora' or 'adalora'")


def _assert_is_layer(adapted: AdapterState, adapter: PlannedAdapter) -> None:
    module, _, leaf = adapter.site.weight.rpartition(".")
    kind = type(adapted.module.get_submodule(module)).__name__
    if leaf != "weight" or kind not in _LAYERS:
        raise ConfigError(
            f"site {adapter.site.name} belongs to a {kind}; PEFT's LoRA takes the weight of a Linear or Conv1D only"
        )


def _as_lora(adapters: Sequence[PlannedAdapter], parameters_of: _ParametersOf) -> PeftSite:
    left, right = factor_weight(adapters, parameters_of)
    magnitude = parameters_of(adapters[0]).get(MAGNITUDE)
    if magnitude is not None and not left.shape[1]:
        left, right = left.new_zeros(len(left), 1), right.new_zeros(1, right.shape[1])
    return PeftSite(
        module=_find_module(adapters[0]),
        P=left.float(),
        lam=torch.ones(left.shape[1]),
        Q=right.float(),
        magnitude=None if magnitude is None else magnitude.detach().cpu().float(),
    )


def _as_adalora(adapters: Sequence[PlannedAdapter], parameters_of: _ParametersOf) -> PeftSite:
    adapter = adapters[0]
    parameters = parameters_of(adapter)
    if adapter.site.rows is not None:
        raise ConfigError(f"site {adapter.site.name} covers some rows of its weight, AdaLoRA all; write LoRA")
    if adapter.form.name == "lora":
        left, right = factor_update(dataclasses.replace(adapter, scale=1.0), parameters)
        return PeftSite(module=_find_module(adapter), P=left.float(), lam=torch.ones(left.shape[1]), Q=right.float())
    if parameters.keys() != {"P", "lam", "Q"}:
        raise ConfigError(f"site {adapter.site.name} has the form {adapter.form.name!r}, AdaLoRA is 'svd'; write LoRA")
    own = {name: tensor.detach().cpu() for name, tensor in parameters.items()}
    return PeftSite(module=_find_module(adapter), **own)


def _find_module(adapter: PlannedAdapter) -> str:
    module, _, leaf = adapter.site.weight.rpartition(".")
    if leaf != "weight" or len(adapter.site.shape) != 2:
        raise ConfigError(
            f"site {adapter.site.name} of shape {list(adapter.site.shape)} is not the weight of a linear layer, and "
            "PEFT's LoRA takes no other here"
        )
    return module


def _assert_all_or_none_rescale(plan: Iterable[PlannedAdapter]) -> None:
    """PEFT's use_dora holds for all modules of a folder."""
    by_kind = {adapter.form.rescales: adapter for adapter in plan}
    if len(by_kind) > 1:
        dora, other = by_kind[True], by_kind[False]
        raise ConfigError(
            f"site {dora.site.name} has the form {dora.form.name!r} and site {other.site.name} {other.form.name!r}; "
            "PEFT has one use_dora for all; expected DoRA at all sites or at none"
        )


def _is_transposed(plan: Iterable[PlannedAdapter]) -> bool:
    kinds = {adapter.site.transposed for adapter in plan}
    if len(kinds) > 1:
        raise ConfigError("some sites are stored [in, out] and others [out, in]; PEFT has one fan_in_fan_out for all")
    return kinds == {True}


def _pad(site: PeftSite, rank: int) -> PeftSite:
    """More triplets with λ = 0: PEFT's AdaLoRA has one rank for all modules."""
    more = rank - len(site.lam)
    return PeftSite(
        module=site.module,
        P=torch.nn.functional.pad(site.P, (0, more)),
        lam=torch.nn.functional.pad(site.lam, (0, more)),
        Q=torch.nn.functional.pad(site.Q, (0, 0, 0, more)),
    )


def _common_scale(plan: Iterable[PlannedAdapter]) -> float:
    scales = {adapter.scale for adapter in plan}
    if len(scales) > 1:
        raise ConfigError(f"sites have {len(scales)} different scales, PEFT's AdaLoRA has one; write kind='lora'")
    return scales.pop()


def _lora_config(sites: Sequence[PeftSite], rank: int) -> dict[str, Any]:
    ranks = {f"^{re.escape(site.module)}": site.P.shape[1] for site in sites}
    common = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "rank_pattern": ranks, "alpha_pattern": ranks}
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
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": None,
    }


def _spell_tensors(sites: Iterable[PeftSite], kind: str) -> Iterable[tuple[str, torch.Tensor]]:
    suffix = ".weight" if kind == "lora" else ""
    for site in sites:
        prefix = f"{PEFT_PREFIX}{site.module}.lora_"
        yield f"{prefix}A{suffix}", site.Q.contiguous().clone()
        yield f"{prefix}B{suffix}", site.P.contiguous().clone()
        if site.magnitude is not None:
            yield f"{PEFT_PREFIX}{site.module}.lora_magnitude_vector", site.magnitude.contiguous().clone()
        if kind == "adalora":
            yield f"{prefix}E", site.lam.reshape(-1, 1).contiguous().clone()
