"""PEFT's adapter folders: read LoRA and AdaLoRA, and write either, without importing PEFT.

PEFT's names for ours: lora_B = P [out, r], lora_E = λ [r, 1], lora_A = Q [r, in]. Its scales:

    LoRA      alpha / r, or alpha / √r with use_rslora
    AdaLoRA   alpha / (init_r + 1e-5), whatever rank is left
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapter_compiler.adapted import AdaptedModel
from adapter_compiler.errors import CheckpointError, ConfigError
from adapter_compiler.files import written_beside
from adapter_compiler.interop.saved_adapters import PEFT_CONFIG, SavedAdapter, SavedAdapters, open_safetensors
from adapter_compiler.onnx.factors import factor_update
from passes.forms import SvdForm
from passes.plan import PlannedAdapter
from passes.sites import AdapterSite

#: Name of the tensors' file in a PEFT folder.
PEFT_WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_KEY = re.compile(r"^(?P<module>.*)\.lora_(?P<part>[ABE])(?:\.weight)?$")
_EMBEDDING_KEY = re.compile(r"^(?P<module>.*)\.lora_embedding_(?P<part>[AB])$")
_EPSILON = 1e-5
_PARAMETER = {"A": "Q", "B": "P", "E": "lam"}


def read_peft_adapters(folder: Path) -> SavedAdapters:
    """Look into a PEFT folder.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapters are not one ΔW a weight (DoRA, biases).
    """
    config = _read_config(folder / PEFT_CONFIG)
    path = folder / PEFT_WEIGHTS
    with open_safetensors(path) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a mapping
    parts: dict[str, dict[str, str]] = {}
    replacements: dict[str, str] = {}
    embeddings = set()
    for key in shapes:
        name = key.removeprefix(_PREFIX)
        matched = _KEY.match(name) or _EMBEDDING_KEY.match(name)
        if matched is None:
            replacements[_undo_wrapping(path, name)] = key
            continue
        parts.setdefault(matched["module"], {})[_PARAMETER[matched["part"]]] = key
        if "lora_embedding_" in name:
            embeddings.add(matched["module"])
    adapters = {
        f"{module}.weight": _read_site(path, module, tensors, shapes, config, is_embedding=module in embeddings)
        for module, tensors in parts.items()
    }
    kind = f"peft {config['peft_type'].lower()}"
    return SavedAdapters(path=path, kind=kind, adapters=adapters, replacements=replacements)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as PEFT's configuration: {error}") from error
    if kind not in ("LORA", "ADALORA"):
        raise CheckpointError(f"{path}: peft_type is {kind}, expected LORA or ADALORA")
    if config.get("use_dora"):
        raise CheckpointError(f"{path}: use_dora changes the norm of the weight, which is no ΔW; merge it with PEFT")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias={config['bias']!r} trains biases too; expected 'none'; merge it with PEFT")
    return dict(config)


def _undo_wrapping(path: Path, name: str) -> str:
    """The weight that a tensor of ``modules_to_save`` replaces."""
    if ".lora_" in name or name.startswith("lora_"):
        raise CheckpointError(f"{path}: {name} is of a kind of adapter that is no ΔW (LoRA's A, B and E are)")
    return name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def _read_site(
    path: Path,
    module: str,
    tensors: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    *,
    is_embedding: bool,
) -> SavedAdapter:
    if not {"P", "Q"} <= tensors.keys():
        raise CheckpointError(f"{path}: module {module} lacks its lora_A or lora_B")
    left, right = shapes[tensors["P"]], shapes[tensors["Q"]]
    if left[1] != right[0] or any(size != 1 for size in left[2:]):
        raise CheckpointError(f"{path}: module {module}: lora_B {list(left)} and lora_A {list(right)} do not multiply")
    is_transposed = is_embedding or bool(config.get("fan_in_fan_out"))
    shape = (right[1], left[0]) if is_transposed else (left[0], *right[1:])
    site = AdapterSite(name=f"{module}.weight", shape=shape, dtype=torch.float32, transposed=is_transposed)
    planned = PlannedAdapter(
        site=site,
        form=SvdForm(),
        rank=max(1, min(right[0], site.largest_rank)),
        scale=_find_scale(module, right[0], config),
        dtype=torch.float32,
    )
    return SavedAdapter(planned=planned, tensors=tensors)


def _find_scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    if config["peft_type"] == "ADALORA":
        initial = config.get("init_r") or 12
        alpha = config.get("lora_alpha") or 0
        return float((alpha if alpha > 0 else float(initial)) / (initial + _EPSILON))
    alpha = _find_in_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _find_in_pattern(pattern: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PeftSite:
    """One module as PEFT wants it: P [out, r], λ [r] and Q [r, in]."""

    module: str
    P: torch.Tensor
    lam: torch.Tensor
    Q: torch.Tensor


def save_peft_adapters(adapted: AdaptedModel, folder: str | Path, *, kind: str = "lora") -> Path:
    """Write the adapters as a folder that ``PeftModel.from_pretrained`` loads.

    Args:
        adapted: the model; every site must be the ``weight`` of an ``nn.Linear`` or a transformers ``Conv1D``.
        folder: where to write.
        kind: ``"lora"`` writes the live triplets of each site as LoRA of exactly that rank, with λ and the
            scale folded in; ``"adalora"`` keeps P, λ and Q, padded to one rank.

    Returns:
        The folder.

    Raises:
        ConfigError: ``kind`` is unknown, or a site is no such weight; it is named.
    """
    if kind not in ("lora", "adalora"):
        raise ConfigError(f"save_peft_adapters(kind={kind!r}): expected 'lora' or 'adalora'")
    folder = Path(folder)
    sites = [_as_lora(adapted, a) if kind == "lora" else _as_adalora(adapted, a) for a in adapted.plan]
    sites = [site for site in sites if site.P.shape[1]]
    if not sites:
        raise ConfigError("no triplet is alive at any site, so there is nothing to write")
    rank = max(site.P.shape[1] for site in sites)
    if kind == "lora":
        config = _lora_config(sites, rank)
    else:
        sites = [_pad(site, rank) for site in sites]
        config = _adalora_config(sites, rank, _common_scale(adapted))
    heads = sorted({n.rpartition(".")[0] for n, p in adapted.module.named_parameters() if p.requires_grad})
    config |= {"modules_to_save": heads or None, "fan_in_fan_out": _is_transposed(adapted)}
    tensors = dict(_spell_tensors(sites, kind))
    for name, parameter in adapted.module.state_dict(keep_vars=True).items():
        if name.rpartition(".")[0] in heads:
            tensors[_PREFIX + name] = parameter.detach().cpu().contiguous().clone()
    with written_beside(folder / PEFT_WEIGHTS) as draft:
        save_file(tensors, draft, metadata={"format": "pt"})
        draft.with_name(PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _as_lora(adapted: AdaptedModel, adapter: PlannedAdapter) -> _PeftSite:
    left, right = factor_update(adapter, adapted.adapters.parameters_of(adapter))
    return _PeftSite(
        module=_find_module(adapted, adapter), P=left.float(), lam=torch.ones(left.shape[1]), Q=right.float()
    )


def _as_adalora(adapted: AdaptedModel, adapter: PlannedAdapter) -> _PeftSite:
    parameters = {name: p.detach().cpu() for name, p in adapted.adapters.parameters_of(adapter).items()}
    if parameters.keys() != {"P", "lam", "Q"}:
        raise ConfigError(f"site {adapter.site.name} has the form {adapter.form.name!r}, AdaLoRA is 'svd'; write LoRA")
    return _PeftSite(module=_find_module(adapted, adapter), **parameters)


def _find_module(adapted: AdaptedModel, adapter: PlannedAdapter) -> str:
    module, _, leaf = adapter.site.name.rpartition(".")
    kind = type(adapted.module.get_submodule(module)).__name__
    if leaf != "weight" or kind not in ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear"):
        raise ConfigError(
            f"site {adapter.site.name} belongs to a {kind}; PEFT's LoRA takes the weight of a Linear or Conv1D only"
        )
    return module


def _is_transposed(adapted: AdaptedModel) -> bool:
    kinds = {adapter.site.transposed for adapter in adapted.plan}
    if len(kinds) > 1:
        raise ConfigError("some sites are stored [in, out] and others [out, in]; PEFT has one fan_in_fan_out for all")
    return kinds == {True}


def _pad(site: _PeftSite, rank: int) -> _PeftSite:
    """More triplets with λ = 0: PEFT's AdaLoRA has one rank for all modules."""
    more = rank - len(site.lam)
    return _PeftSite(
        module=site.module,
        P=torch.nn.functional.pad(site.P, (0, more)),
        lam=torch.nn.functional.pad(site.lam, (0, more)),
        Q=torch.nn.functional.pad(site.Q, (0, 0, 0, more)),
    )


def _common_scale(adapted: AdaptedModel) -> float:
    scales = {adapter.scale for adapter in adapted.plan}
    if len(scales) > 1:
        raise ConfigError(f"sites have {len(scales)} different scales, PEFT's AdaLoRA has one; write kind='lora'")
    return scales.pop()


def _lora_config(sites: Iterable[_PeftSite], rank: int) -> dict[str, Any]:
    ranks = {f"^{re.escape(site.module)}": site.P.shape[1] for site in sites}
    common = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "rank_pattern": ranks, "alpha_pattern": ranks}
    return {**_common_config(sites), **common}


def _adalora_config(sites: Iterable[_PeftSite], rank: int, scale: float) -> dict[str, Any]:
    own = {"peft_type": "ADALORA", "init_r": rank, "target_r": rank, "lora_alpha": scale * (rank + _EPSILON)}
    # PEFT wants a schedule with a budgeting phase even for adapters that have had theirs.
    schedule = {"tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1, "rank_pattern": None}
    return {**_common_config(sites), **own, **schedule}


def _common_config(sites: Iterable[_PeftSite]) -> dict[str, Any]:
    modules = "|".join(re.escape(site.module) for site in sites)
    return {
        "target_modules": f"(?:{modules})",
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": None,
    }


def _spell_tensors(sites: Iterable[_PeftSite], kind: str) -> Iterable[tuple[str, torch.Tensor]]:
    suffix = ".weight" if kind == "lora" else ""
    for site in sites:
        prefix = f"{_PREFIX}{site.module}.lora_"
        yield f"{prefix}A{suffix}", site.Q.contiguous().clone()
        yield f"{prefix}B{suffix}", site.P.contiguous().clone()
        if kind == "adalora":
            yield f"{prefix}E", site.lam.reshape(-1, 1).contiguous().clone()
