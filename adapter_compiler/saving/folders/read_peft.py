"""Read PEFT's adapter folders, LoRA and AdaLoRA, without importing PEFT.

PEFT's names for ours: lora_B = B or P [out, r], lora_E = λ [r, 1], lora_A = A or Q [r, in], and with use_dora
lora_magnitude_vector = m [out]. :mod:`~adapter_compiler.saving.folders.peft_format.config` says which fields of the
configuration are understood, and :mod:`~adapter_compiler.saving.folders.peft_format.tensors` which tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.folders.base_weights import BaseWeights
from adapter_compiler.saving.folders.peft_format.config import PEFT_CONFIG, PeftConfig, read_peft_config
from adapter_compiler.saving.folders.peft_format.notes import PEFT_WEIGHTS, PeftNotes, read_notes
from adapter_compiler.saving.folders.peft_format.site_maker import SiteMaker
from adapter_compiler.saving.folders.peft_format.sites import PeftSites
from adapter_compiler.saving.folders.peft_format.tensors import PeftTensors, sort_tensors
from adapter_compiler.saving.folders.saved_adapters import SavedAdapter, SavedAdapters
from adapter_compiler.saving.folders.stored_parameters import Edit
from adapter_compiler.saving.layer_kinds import TrainedNames
from adapter_compiler.saving.primitives.safetensors_header import SafetensorsHeader, read_safetensors

#: The name of the file of tensors where PEFT wrote a pickle.
_PICKLE = "adapter_model.bin"


def read_peft_adapters(folder: Path) -> SavedAdapters:
    """Read the configuration of a PEFT folder, and the names and shapes of its tensors.

    Raises:
        CheckpointError: a file is missing or damaged; or the folder holds something else than one ΔW for each weight,
            rows of embeddings, and tensors that were trained fully. The field or tensor that says so is named.
    """
    config = read_peft_config(folder / PEFT_CONFIG)
    path = folder / PEFT_WEIGHTS
    if not path.exists() and (folder / _PICKLE).exists():
        raise CheckpointError(
            f"{folder} holds {_PICKLE}, a pickle, which can run code when it is read; expected {PEFT_WEIGHTS}; load it "
            "with PEFT and call save_pretrained, which writes safetensors"
        )
    file = read_safetensors(path)
    return _PeftFolder(file=file, config=config, tensors=sort_tensors(file, config), notes=read_notes(file)).fit(None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PeftFolder:
    """The files of a folder, without the values of tensors."""

    file: SafetensorsHeader
    config: PeftConfig
    tensors: PeftTensors
    notes: PeftNotes

    def fit(self, base: BaseWeights | None) -> SavedAdapters:
        """The adapters as this base needs them."""
        maker = SiteMaker(file=self.file, config=self.config)
        sites = PeftSites(maker=maker, layouts=self.notes.transposed, base=base)
        adapters, undecided = sites.make(self.tensors.updates)
        self._assert_rows_of_embeddings(base)
        edits = {**self._find_biases(adapters), **self._find_rows()}
        changed = {adapter.planned.site.weight for adapter in adapters.values()} | edits.keys()
        unchanged = {name: key for name, key in self.tensors.starts.items() if name not in changed}
        self._assert_biases(unchanged)
        return SavedAdapters(
            file=self.file,
            kind=f"peft {self.config.kind.lower()}",
            adapters=adapters,
            replacements={**self.tensors.replacements, **unchanged},
            loose=self.tensors.loose,
            starts={name: key for name, key in self.tensors.starts.items() if name in changed},
            edits=edits,
            undecided=undecided,
            keeps_ties=frozenset(f"{module}.weight" for module in self.tensors.tokens),
            quantized=self.notes.quantized,
            trained=TrainedNames(
                owners={name: self._find_saved_module(name) for name in (*self.tensors.replacements, *unchanged)}
            ),
            refit=self.fit,
        )

    def _find_saved_module(self, name: str) -> str:
        """The outermost module around a tensor that PEFT saves whole, else the one that has the tensor."""
        parts = name.split(".")[:-1]
        around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        saved = tuple(self.config.values.get("modules_to_save") or ())
        return next((module for module in around if saved and module.endswith(saved)), ".".join(parts))

    def _find_biases(self, adapters: Mapping[str, SavedAdapter]) -> dict[str, Edit]:
        """What lora_bias adds: the bias of B, times the scale."""
        found = {}
        for update in self.tensors.updates:
            if "bias" in update.tensors:
                scale = adapters[f"{update.module}.weight"].planned.scale
                key = update.tensors["bias"]
                found[f"{update.module}.bias"] = Edit(field="lora_bias", key=key, scale=scale)
        return found

    def _find_rows(self) -> dict[str, Edit]:
        return {
            f"{module}.weight": Edit(field="trainable_token_indices", key=key, rows=self._find_indices(module))
            for module, key in self.tensors.tokens.items()
        }

    def _assert_rows_of_embeddings(self, base: BaseWeights | None) -> None:
        """PEFT also takes linear layers, but its forward leaves out their bias, and its merging does not."""
        for module in self.tensors.tokens:
            if base is not None and f"{module}.bias" in base.shapes:
                self.config.fail(
                    "trainable_token_indices",
                    f"module {module} has a bias, which PEFT leaves out in its forward but not in merging; expected an "
                    "embedding",
                    "train it fully, with modules_to_save",
                )

    def _find_indices(self, module: str) -> tuple[int, ...]:
        """The rows of a module's weight that were trained."""
        indices = self.config.values["trainable_token_indices"]
        found = (
            [rows for name, rows in indices.items() if module.endswith(name)]
            if isinstance(indices, dict)
            else [indices]
        )
        if not found or any(rows != found[0] for rows in found) or len(set(found[0])) != len(found[0]):
            self.config.fail(
                "trainable_token_indices",
                f"expected one list of different indices for {module}",
                "merge the adapters with PEFT, or save them again",
            )
        return tuple(found[0])

    def _assert_biases(self, starts: Mapping[str, str]) -> None:
        """Raise unless the saved tensors of adapted modules that nothing else changes are biases."""
        for name in starts:
            if not name.endswith(".bias"):
                raise CheckpointError(
                    f"{self.file.path}: tensor {name} is saved for a module whose adapter is that of another weight, "
                    "expected the weight of the adapter; merge the adapters with PEFT, or save them again"
                )
