"""The names of the tensors in a PEFT folder, and what each name means.

    <module>.lora_A.weight, .lora_B.weight               Linear, Conv1D, convolutions (AdaLoRA: lora_A, lora_B, lora_E)
    <module>.lora_embedding_A, .lora_embedding_B         Embedding
    <module>.lora_magnitude_vector                       use_dora
    <module>.lora_B.bias                                 lora_bias
    <attention>.base_layer.out_proj.lora_A.weight, ...   the output projection of an nn.MultiheadAttention
    <module>.base_layer.….lora_A.weight, ...             one of several parameters of a module (target_parameters)
    <module>.token_adapter.trainable_tokens_delta        trainable_token_indices
    <module>.base_layer.weight                           the weight of an adapted embedding, which PEFT saves too
    <module>.base_layer.bias, <module>.bias              bias
    <name>                                               modules_to_save, or an embedding that was resized

A tensor of any other name is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.folders.peft_format.config import PeftConfig
from adapter_compiler.saving.primitives.safetensors_header import SafetensorsHeader

#: What PEFT puts before the names of a wrapped model.
PEFT_PREFIX = "base_model.model."

#: What stands between a module that PEFT wraps and the parts of the wrapped one.
_WRAPPED = ".base_layer"

_PART = re.compile(
    r"^(?P<path>.+)\.lora_(?P<part>A|B|E|embedding_A|embedding_B|magnitude_vector)(?P<suffix>\.weight|\.bias)?$"
)
_TOKENS = ".token_adapter.trainable_tokens_delta"

#: Tensors that act in training only, by the field that explains them.
_TRAINING_ONLY = {"velora_config": ".lora_velora_embed", "monteclora_config": ".lora_monteclora_sampler."}

#: Parts by form, and whether lora_bias may add one.
_EXPECTED = {"svd": {"A", "B", "E"}, "lora": {"A", "B"}, "dora": {"A", "B", "magnitude_vector"}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftUpdate:
    """The tensors of one adapter.

    Attributes:
        module: the name of the module.
        tensors: the keys of A, B, E, ``magnitude_vector`` and ``bias`` in the file.
        is_embedding: they have the names of an embedding's adapter.
        is_output_projection: the adapter is that of ``out_proj`` in the attention ``module``.
        depth: how many other parameters of the module were wrapped after this one.
    """

    module: str
    tensors: Mapping[str, str]
    is_embedding: bool = False
    is_output_projection: bool = False
    depth: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftTensors:
    """The tensors of a folder, sorted by what they mean.

    Attributes:
        updates: the adapters.
        tokens: by module, the rows of an embedding that were trained.
        starts: weight or bias of an adapted module → its saved value, which PEFT puts into the base first.
        replacements: tensors of modules that were trained fully, and biases.
        loose: those of ``replacements`` that no field explains; the base must have a tensor of the same name.
    """

    updates: Sequence[PeftUpdate]
    tokens: Mapping[str, str]
    starts: Mapping[str, str]
    replacements: Mapping[str, str]
    loose: frozenset[str]


def sort_tensors(file: SafetensorsHeader, config: PeftConfig) -> PeftTensors:
    """Sort the tensors of a file.

    Raises:
        CheckpointError: no understood field explains a tensor, or an adapter lacks one of its parts.
    """
    sorter = _Sorter(file, config)
    for key in file.tensors:
        sorter.add(key)
    return sorter.finish()


class _Sorter:
    def __init__(self, file: SafetensorsHeader, config: PeftConfig) -> None:
        self.file = file
        self.config = config
        self.parts: dict[tuple[str, bool, int], dict[str, str]] = {}
        self.embeddings: set[str] = set()
        self.tokens: dict[str, str] = {}
        self.plain: dict[str, str] = {}
        self.wrapped: dict[str, str] = {}
        self.saved: dict[tuple[str, str], str] = {}

    def add(self, key: str) -> None:
        """Note what one tensor is."""
        name = key.removeprefix(PEFT_PREFIX)
        if matched := _PART.match(name):
            self._add_part(key, name, matched)
        elif name.endswith(_TOKENS):
            self._require("trainable_token_indices", name)
            self.tokens[name.removesuffix(_TOKENS)] = key
        elif ".lora_" in name or name.startswith("lora_"):
            self._assert_training_only(name)
        elif f"{_WRAPPED}." in name:
            self.wrapped[name.replace(_WRAPPED, "")] = key
        elif ".original_module." not in name or self.config.values.get("bias") != "all":
            self._add_plain(key, name)

    def _add_plain(self, key: str, name: str) -> None:
        """Older versions of PEFT and bias='all' spell the wrapper of modules_to_save in the name."""
        owner, wrapper, inner = name.partition(".modules_to_save.")
        if wrapper:
            self.saved[owner, inner] = key
        else:
            self.plain[name] = key

    def _unwrap_saved(self) -> None:
        """With bias='all', biases of saved modules stand in the file again, under the name of the adapter."""
        for (owner, inner), key in self.saved.items():
            _, _, rest = inner.partition(".")
            if f"{owner}.{rest}" not in self.plain or self.config.values.get("bias") != "all":
                self.plain.setdefault(f"{owner}.{inner}", key)

    def _add_part(self, key: str, name: str, matched: re.Match[str]) -> None:
        module, is_output, depth = _unwrap(matched["path"])
        if _WRAPPED in module:
            self._refuse(name, "it belongs to a module of a kind that is unknown here")
        part = matched["part"].removeprefix("embedding_")
        if matched["suffix"] == ".bias":
            self._require("lora_bias", name)
            part = "bias" if part == "B" else self._refuse(name, "only lora_B has a bias")
        place = self.file.tensors[key]
        if place.dtype is None or not place.dtype.is_floating_point:
            self._refuse(name, f"it is {place.dtype_name}, expected floating-point numbers")
        if matched["part"].startswith("embedding_"):
            self.embeddings.add(module)
        parts = self.parts.setdefault((module, is_output, depth), {})
        if part in parts:
            self._refuse(name, f"{parts[part]} is the same part of the same adapter")
        parts[part] = key

    def finish(self) -> PeftTensors:
        """All of them."""
        self._unwrap_saved()
        updates = [self._make_update(*place, parts) for place, parts in self.parts.items()]
        adapted = {update.module for update in updates}
        starts = {name: key for name, key in self.wrapped.items() if self._is_start(name, adapted)}
        loose = frozenset(name for name in self.plain if self._is_loose(name, adapted))
        for module in self._find_missing_tokens():
            self.config.fail("trainable_token_indices", f"the file has no rows of {module}", "save the adapters again")
        return PeftTensors(
            updates=updates, tokens=self.tokens, starts=starts, replacements=dict(self.plain), loose=loose
        )

    def _make_update(self, module: str, is_output: bool, depth: int, parts: dict[str, str]) -> PeftUpdate:
        expected = _EXPECTED[self.config.form] | ({"bias"} if self.config.values.get("lora_bias") else set())
        missing = sorted(expected - parts.keys() - {"bias"})
        if missing or (odd := sorted(parts.keys() - expected)):
            problem = f"lacks its lora_{missing[0]}" if missing else f"has lora_{odd[0]}"
            raise CheckpointError(
                f"{self.file.path}: module {module} {problem}, expected the parts {', '.join(sorted(expected))} of the "
                f"adapters that {self.config.path.name} describes; save the adapters again"
            )
        return PeftUpdate(
            module=module,
            tensors=parts,
            is_embedding=module in self.embeddings,
            is_output_projection=is_output,
            depth=depth,
        )

    def _is_start(self, name: str, adapted: set[str]) -> bool:
        """Whether a saved tensor of a wrapped module is its weight or bias; anything else is refused."""
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and self.config.values.get("bias", "none") != "none":
            return True
        if leaf == "weight" and module in adapted:
            return True
        return bool(self._refuse(name, "neither bias nor an adapted embedding explains it"))

    def _is_loose(self, name: str, adapted: set[str]) -> bool:
        """Whether only the base can say if a tensor belongs to the model; one that PEFT would ignore is refused."""
        module, _, leaf = name.rpartition(".")
        if any(ancestor.endswith(tuple(self._saved_modules)) for ancestor in _find_ancestors(module)):
            return False
        if leaf == "bias" and self.config.values.get("bias") == "all":
            return False
        is_matrix = leaf == "weight" and len(self.file.tensors[self.plain[name]].shape) == 2
        if module in adapted or not is_matrix:
            self._refuse(name, "neither modules_to_save nor bias nor any other field explains it")
        return True

    @property
    def _saved_modules(self) -> list[str]:
        return self.config.values.get("modules_to_save") or []

    def _find_missing_tokens(self) -> list[str]:
        indices = self.config.values.get("trainable_token_indices") or {}
        if isinstance(indices, dict):
            missing = [name for name in indices if not any(module.endswith(name) for module in self.tokens)]
            # PEFT saves those of one of the modules that are tied, if they have the same rows.
            present = [rows for name, rows in indices.items() if name not in missing]
            return [name for name in missing if indices[name] not in present]
        return [] if self.tokens else ["the embedding"]

    def _assert_training_only(self, name: str) -> None:
        for field, mark in _TRAINING_ONLY.items():
            if mark in f"{name}." and self.config.values.get(field):
                return
        self._refuse(name, "it is a part of a kind of adapter that is no ΔW (LoRA's A, B and E are)")

    def _require(self, field: str, name: str) -> None:
        if not self.config.values.get(field):
            self._refuse(name, f"{self.config.path.name} has {field}={self.config.values.get(field)!r}")

    def _refuse(self, name: str, problem: str) -> Any:
        raise CheckpointError(
            f"{self.file.path}: tensor {name}: {problem}, expected only tensors that {self.config.path.name} explains; "
            "merge the adapters with PEFT, or remove the tensor"
        )


def _unwrap(path: str) -> tuple[str, bool, int]:
    """The module of a path, whether it is the output projection of that, and how deep it is wrapped."""
    attention = path.removesuffix(f"{_WRAPPED}.out_proj")
    if attention != path:
        return attention, True, 0
    module = path
    while module.endswith(_WRAPPED):
        module = module.removesuffix(_WRAPPED)
    return module, False, (len(path) - len(module)) // len(_WRAPPED)


def _find_ancestors(module: str) -> list[str]:
    """The module and all that contain it."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
