"""From the tensors of a PEFT folder to sites: which weight each adapter belongs to, and with what shape and scale.

    module            weight                    shape                            ΔW
    Linear            <module>.weight           [out, in]                        s B A
    Conv1D            <module>.weight           [in, out]                        s (B A)ᵀ
    Embedding         <module>.weight           [entries, features]              s (B A)ᵀ
    convolution       <module>.weight           [out, in, kernel…]               s B A, kernel flattened
    attention         <module>.in_proj_weight   [3 · features, features]         s B A
                      <module>.out_proj.weight  [features, features]             2 s B A
    parameter         <module>.<parameter>      [out, in]                        s B A
    stack of experts  <module>.<parameter>      [experts, out, in]               s Bₑ Aₑ for each
                                                [experts, in, out]               s (Bₑ Aₑ)ᵀ for each, if is_transposed

PEFT adds the update of an attention's output projection twice, in its forward as well as in merging. The adapters were
trained with that, so it is applied twice here too, for the versions of PEFT that are known to do so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from adapter_compiler.saving.folders.base_weights import BaseWeights, find_layouts
from adapter_compiler.saving.folders.peft_format.config import find_targets, parse_version
from adapter_compiler.saving.folders.peft_format.parameters import make_parameters
from adapter_compiler.saving.folders.peft_format.site_maker import LOAD_OR_MERGE, SiteMaker
from adapter_compiler.saving.folders.peft_format.tensors import PeftUpdate
from adapter_compiler.saving.folders.saved_adapters import SavedAdapter
from adapter_compiler.saving.layer_kinds import ATTENTION, CONVOLUTIONS, EMBEDDING, LINEAR, LINEAR_OR_CONV1D

#: The last version of PEFT that is known to add the update of out_proj twice.
_LAST_DOUBLING = (0, 21, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftSites:
    """Makes sites of the adapters in a folder.

    Attributes:
        maker: makes each of them.
        layouts: by module, whether its weight is stored [in, out], where the folder says so.
        base: the base, if it is known.
    """

    maker: SiteMaker
    layouts: Mapping[str, bool]
    base: BaseWeights | None

    def make(self, updates: Sequence[PeftUpdate]) -> tuple[dict[str, SavedAdapter], dict[str, str]]:
        """The adapters by site, and what only the base can decide by module.

        Raises:
            CheckpointError: the tensors are no ΔW of one weight each, or the base leaves open which.
        """
        adapters: dict[str, SavedAdapter] = {}
        undecided: dict[str, str] = {}
        rest = []
        attentions = {update.module for update in updates if update.is_output_projection}
        for module, group in _group(updates):
            if module in attentions:
                adapters |= self._make_attention(module, group)
            elif parameters := find_targets(self.maker.config.values.get("target_parameters") or (), module):
                if self.base is None:
                    undecided[module] = "target_parameters"
                else:
                    adapters |= make_parameters(self.maker, self.base, module, parameters, group)
            else:
                rest += group
        adapters |= self._make_modules(rest)
        has_conv1d = any(saved.layer == LINEAR and saved.planned.site.transposed for saved in adapters.values())
        if attentions and (has_conv1d or self._declared):
            self.maker.refuse(
                min(attentions),
                "fan_in_fan_out is true or was, as it is for Conv1D layers, and PEFT then transposes the update of the "
                "out_proj of this nn.MultiheadAttention, whose weight it is added to as it is",
            )
        return adapters, undecided

    def _make_modules(self, updates: Sequence[PeftUpdate]) -> dict[str, SavedAdapter]:
        """Modules with one weight."""
        for update in updates:
            if update.depth:
                self.maker.refuse(
                    update.module,
                    "its tensors are those of several parameters, but target_parameters names none of this module",
                )
            self._assert_is_no_output_projection(update)
        matrices = [one for one in updates if not one.is_embedding and not self._is_convolution(one)]
        linear = {update.module: self.maker.features(update) for update in matrices}
        noted = {module: layout for module, layout in self.layouts.items() if module in linear}
        layouts = {**find_layouts(linear, self._declared, self.base), **noted}
        return {f"{update.module}.weight": self._make_module(update, layouts) for update in updates}

    def _make_module(self, update: PeftUpdate, layouts: Mapping[str, bool | None]) -> SavedAdapter:
        out, columns = self.maker.features(update)
        if update.is_embedding:
            return self._make_embedding(update)
        if self._is_convolution(update):
            return self._make_convolution(update)
        layout = layouts[update.module]
        if layout is None:
            self.maker.refuse(
                update.module,
                f"its weight [{out}, {columns}] may be that of a Linear or of a Conv1D, which is transposed, and "
                f"fan_in_fan_out={self._declared} holds only for the last module that PEFT wrapped",
                LOAD_OR_MERGE,
            )
        shape = (columns, out) if layout else (out, columns)
        is_known = self.base is not None or update.module in self.layouts
        layer = LINEAR if is_known else LINEAR_OR_CONV1D
        return self.maker.make(update, f"{update.module}.weight", shape, layer, transposed=layout)

    @property
    def _declared(self) -> bool:
        return bool(self.maker.config.values.get("fan_in_fan_out"))

    def _make_embedding(self, update: PeftUpdate) -> SavedAdapter:
        """A model in memory has its embeddings as [out, in], where only forms without magnitude can be transposed."""
        out, columns = self.maker.features(update)
        name = f"{update.module}.weight"
        stays = self.base is None or self.base.transposed.get(name) is not False or self.maker.config.form == "dora"
        return self.maker.make(update, name, (columns, out), EMBEDDING, transposed=stays, is_transposed=not stays)

    def _make_convolution(self, update: PeftUpdate) -> SavedAdapter:
        left, right = self.maker.shapes(update)
        name = f"{update.module}.weight"
        shape = (left[0], *right[1:])
        if len(right) == 2:  # AdaLoRA flattens the kernel
            assert self.base is not None
            shape = self.base.shapes[name]
        return self.maker.make(update, name, shape, CONVOLUTIONS.get(len(shape), ""), op="convolution")

    def _make_attention(self, module: str, group: Sequence[PeftUpdate]) -> dict[str, SavedAdapter]:
        inputs = [update for update in group if not update.is_output_projection]
        outputs = [update for update in group if update.is_output_projection]
        version = parse_version(self.maker.config.values.get("peft_version"))
        if version is not None and version > _LAST_DOUBLING:
            self.maker.refuse(
                module,
                f"this nn.MultiheadAttention was trained with PEFT {version}; up to "
                f"{_LAST_DOUBLING} PEFT adds the update of out_proj twice, and later versions are unknown",
            )
        if len(inputs) != 1 or self.maker.config.form != "lora" or self.maker.config.values.get("lora_bias"):
            self.maker.refuse(
                module,
                "PEFT adapts in_proj and out_proj of an nn.MultiheadAttention together, by LoRA "
                "without lora_bias and use_dora, but the folder says otherwise",
            )
        sites = {}
        for update in (inputs[0], outputs[0]):
            weight = f"{module}.out_proj.weight" if update.is_output_projection else f"{module}.in_proj_weight"
            sites[weight] = self.maker.make(
                update, weight, self.maker.features(update), ATTENTION, times=2 if update.is_output_projection else 1
            )
        return sites

    def _is_convolution(self, update: PeftUpdate) -> bool:
        left, right = self.maker.shapes(update)
        if len(right) > 2:
            return True
        shape = () if self.base is None else self.base.shapes.get(f"{update.module}.weight", ())
        return (
            len(shape) == 4
            and self.maker.config.form == "svd"
            and (shape[0], math.prod(shape[1:])) == (left[0], right[1])
        )

    def _assert_is_no_output_projection(self, update: PeftUpdate) -> None:
        """PEFT wraps ``out_proj`` by itself too, but the attention does not call it, so the adapter has no effect."""
        attention, _, leaf = update.module.rpartition(".")
        beside = [f"{attention}.{name}" for name in ("in_proj_weight", "q_proj_weight")]
        if leaf == "out_proj" and self.base is not None and any(name in self.base.shapes for name in beside):
            self.maker.refuse(
                update.module,
                "it is the out_proj of an nn.MultiheadAttention, which does not call it, so that the adapter has no "
                "effect in PEFT until it is merged",
                "target the nn.MultiheadAttention itself",
            )


def _group(updates: Sequence[PeftUpdate]) -> Iterator[tuple[str, list[PeftUpdate]]]:
    """The adapters of each module."""
    found: dict[str, list[PeftUpdate]] = {}
    for update in updates:
        found.setdefault(update.module, []).append(update)
    yield from found.items()
