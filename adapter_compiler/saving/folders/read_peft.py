"""Read PEFT's adapter folders, LoRA and AdaLoRA, without importing PEFT.

PEFT's names for ours: lora_B = B or P [out, r], lora_E = λ [r, 1], lora_A = A or Q [r, in], and with use_dora
lora_magnitude_vector = m [out]. Its scales:

    LoRA      alpha / r, or alpha / √r with use_rslora
    AdaLoRA   alpha / (init_r + 1e-5), whatever rank is left
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.folders.saved_adapters import PEFT_CONFIG, SavedAdapter, SavedAdapters, open_safetensors
from passes.forms import find_form
from passes.forms.dora import MAGNITUDE
from passes.planning.plan import PlannedAdapter
from passes.planning.site import AdapterSite

#: Name of the tensors' file in a PEFT folder.
PEFT_WEIGHTS = "adapter_model.safetensors"

#: What PEFT puts before the names of a wrapped model.
PEFT_PREFIX = "base_model.model."
_KEY = re.compile(r"^(?P<module>.*)\.lora_(?P<part>[ABE])(?:\.weight)?$")
_EMBEDDING_KEY = re.compile(r"^(?P<module>.*)\.lora_embedding_(?P<part>[AB])$")
#: What PEFT adds to the rank before it divides by it.
PEFT_EPSILON = 1e-5
_MAGNITUDE_KEY = re.compile(r"^(?P<module>.*)\.lora_magnitude_vector(?:\.weight)?$")
#: Our names, by form.
_PARAMETERS = {
    "svd": {"A": "Q", "B": "P", "E": "lam"},
    "lora": {"A": "A", "B": "B"},
    "dora": {"A": "A", "B": "B", "m": MAGNITUDE},
}


def read_peft_adapters(folder: Path) -> SavedAdapters:
    """Look into a PEFT folder.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapters are no change of one weight each (biases).
    """
    config = _read_config(folder / PEFT_CONFIG)
    path = folder / PEFT_WEIGHTS
    with open_safetensors(path) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a mapping
    form = "svd" if config["peft_type"] == "ADALORA" else "dora" if config.get("use_dora") else "lora"
    parts: dict[str, dict[str, str]] = {}
    replacements: dict[str, str] = {}
    embeddings = set()
    for key in shapes:
        name = key.removeprefix(PEFT_PREFIX)
        matched = _KEY.match(name) or _EMBEDDING_KEY.match(name) or _MAGNITUDE_KEY.match(name)
        if matched is None:
            replacements[_undo_wrapping(path, name)] = key
            continue
        parameter = _PARAMETERS[form].get(matched.groupdict().get("part", "m"))
        if parameter is None:
            raise CheckpointError(f"{path}: {name} does not belong to the adapters that {PEFT_CONFIG} describes")
        parts.setdefault(matched["module"], {})[parameter] = key
        if "lora_embedding_" in name:
            embeddings.add(matched["module"])
    adapters = {
        f"{module}.weight": _read_site(path, module, tensors, shapes, config, form, is_embedding=module in embeddings)
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
    form: str,
    *,
    is_embedding: bool,
) -> SavedAdapter:
    names = _PARAMETERS[form]
    if missing := set(names.values()) - tensors.keys():
        part = next(part for part, name in names.items() if name in missing)
        raise CheckpointError(f"{path}: module {module} lacks its lora_{part.replace('m', 'magnitude_vector')}")
    left, right = shapes[tensors[names["B"]]], shapes[tensors[names["A"]]]
    if left[1] != right[0] or any(size != 1 for size in left[2:]):
        raise CheckpointError(f"{path}: module {module}: lora_B {list(left)} and lora_A {list(right)} do not multiply")
    is_transposed = is_embedding or bool(config.get("fan_in_fan_out"))
    shape = (right[1], left[0]) if is_transposed else (left[0], *right[1:])
    site = AdapterSite(
        name=f"{module}.weight",
        shape=shape,
        dtype=torch.float32,
        transposed=is_transposed,
        op="convolution" if len(shape) > 2 else "linear",
    )
    planned = PlannedAdapter(
        site=site,
        form=find_form(form),
        rank=max(1, min(right[0], site.largest_rank)),
        scale=_find_scale(module, right[0], config),
        dtype=torch.float32,
    )
    return SavedAdapter(planned=planned, tensors=tensors)


def _find_scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    if config["peft_type"] == "ADALORA":
        initial = config.get("init_r") or 12
        alpha = config.get("lora_alpha") or 0
        return float((alpha if alpha > 0 else float(initial)) / (initial + PEFT_EPSILON))
    alpha = _find_in_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _find_in_pattern(pattern: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)
