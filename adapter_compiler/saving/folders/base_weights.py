"""The base weights that saved adapters are put on, as far as reading a folder depends on them.

PEFT's folders do not say everything: whether a layer is a ``Conv1D`` of transformers, whose weight is [in, out], how
many matrices a stack of experts has, or which weight of an attention an adapter belongs to. The base decides it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

#: Model types of transformers that have ``Conv1D`` layers.
_CONV1D_MODELS = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")

#: What these models call their ``Conv1D`` layers; no other layer of theirs has such a name.
_CONV1D_NAMES = ("c_attn", "c_fc", "c_proj", "q_attn")

#: Model types of transformers whose stacks of experts are [experts, in, out] and say so by ``is_transposed``.
_TRANSPOSED_EXPERTS = ("aria", "aria_text", "gpt_oss", "openai_privacy_filter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseWeights:
    """Shapes of the base weights, and what else is known about them.

    Attributes:
        name: what messages call the base: the path of a checkpoint, or ``this model``.
        shapes: the shape of each tensor.
        transposed: whether weights are stored [in, out], where that is known for certain.
        parameters: by module, its parameters in the order of their registration, where that is known.
        config: what ``config.json`` of transformers says, if there is one.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    transposed: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] | None = None

    @property
    def lacks_conv1d(self) -> bool:
        """Whether it is a model of transformers' own, of types without ``Conv1D`` layers."""
        return self._is_of_transformers and not any(kind in _CONV1D_MODELS for kind in _find_model_types(self.config))

    def has_conv1d(self, module: str) -> bool:
        """Whether it is a model of transformers' own, of a type in which a module of this name is a ``Conv1D``."""
        kinds = {kind for kind in _find_model_types(self.config) if kind is not None}
        is_known = self._is_of_transformers and kinds <= set(_CONV1D_MODELS)
        return is_known and module.rpartition(".")[2] in _CONV1D_NAMES

    @property
    def _is_of_transformers(self) -> bool:
        config = self.config or {}
        return isinstance(config.get("model_type"), str) and "auto_map" not in config

    def find_stack_layout(self, name: str) -> bool | None:
        """Whether the matrices of a stack of experts are stored [in, out]; ``None`` if that is not known."""
        kind = (self.config or {}).get("model_type")
        return self.transposed.get(name, kind in _TRANSPOSED_EXPERTS if isinstance(kind, str) else None)


def _find_model_types(config: Any) -> Iterator[Any]:
    """The types of a model and of those that it consists of, such as an encoder and a decoder."""
    if isinstance(config, dict):
        yield config.get("model_type")
        for part in config.values():
            yield from _find_model_types(part)


def find_layouts(
    features: Mapping[str, tuple[int, int]], declared: bool, base: BaseWeights | None
) -> dict[str, bool | None]:
    """Whether the weight of each module is stored [in, out]; ``None`` where nothing tells.

    PEFT's ``fan_in_fan_out`` is the layout of the last of these modules that it wrapped, as it changes the field for
    each. It holds for a folder with one module. Otherwise a module's layout is known if its weight is rectangular, if
    it has no bias (``Conv1D`` always has one), if the model's type has no ``Conv1D`` or has one of this name, or if it
    is the only one that can be the last.

    Args:
        features: output and input features by module; linear layers and Conv1D only.
        declared: the value of ``fan_in_fan_out``.
        base: the base; without it, ``declared`` is taken for all.
    """
    if base is None or len(features) == 1:
        return dict.fromkeys(features, declared)
    known = {module: _find_layout(module, size, declared, base) for module, size in features.items()}
    open_ones = [module for module, layout in known.items() if layout is None]
    if len(open_ones) == 1 and declared not in known.values():
        return {**known, open_ones[0]: declared}
    return dict(known)


def _find_layout(module: str, size: tuple[int, int], declared: bool, base: BaseWeights) -> bool | None:
    weight, shape = f"{module}.weight", base.shapes.get(f"{module}.weight")
    if weight in base.transposed:
        return base.transposed[weight]
    if shape is None:
        return declared
    if size[0] != size[1]:
        return shape == size[::-1]
    if base.has_conv1d(module):
        return True
    return False if base.lacks_conv1d or f"{module}.bias" not in base.shapes else None
