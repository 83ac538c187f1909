"""One adapter of a PEFT folder as a site: its factors are checked, and its rank, scale and parameters are named."""

from __future__ import annotations

import dataclasses
import math
from typing import NoReturn

import torch

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.folders.peft_format.config import PeftConfig
from adapter_compiler.saving.folders.peft_format.tensors import PeftUpdate
from adapter_compiler.saving.folders.saved_adapters import SavedAdapter
from adapter_compiler.saving.folders.stored_parameters import Expert
from adapter_compiler.saving.primitives.safetensors_header import SafetensorsHeader
from passes.forms import find_form
from passes.forms.dora import MAGNITUDE
from passes.planning.plan import PlannedAdapter
from passes.planning.site import AdapterSite

#: Our names of PEFT's parts, by form.
_PARAMETERS = {
    "svd": {"A": "Q", "B": "P", "E": "lam"},
    "lora": {"A": "A", "B": "B"},
    "dora": {"A": "A", "B": "B", "magnitude_vector": MAGNITUDE},
}

#: What to do where the folder leaves open what the adapter is.
LOAD_OR_MERGE = "load the adapters into the model with load_adapter, or merge them with PEFT"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteMaker:
    """Makes sites of adapters.

    Attributes:
        file: the tensors.
        config: the configuration.
    """

    file: SafetensorsHeader
    config: PeftConfig

    def make(
        self,
        update: PeftUpdate,
        name: str,
        shape: tuple[int, ...],
        layer: str,
        *,
        transposed: bool = False,
        op: str = "linear",
        times: int = 1,
        pattern: str | None = None,
        rows: tuple[int, int] | None = None,
        expert: Expert | None = None,
        is_transposed: bool = False,
    ) -> SavedAdapter:
        """The adapter of a weight of this name and shape; see :class:`SavedAdapter` and :class:`AdapterSite`.

        Args:
            update: the tensors.
            name: the name of the site.
            shape: the shape of the weight.
            layer: the kind of module.
            transposed: the weight is stored [in, out].
            op: the operator of the site.
            times: how often PEFT adds the update.
            pattern: the name that patterns are compared with, by default that of the module.
            rows: the rows that the site covers.
            expert: which matrix of a stack it is.
            is_transposed: the tensors are those of the transposed ΔW.
        """
        rank = self.shapes(update)[1][0] // (1 if expert is None else expert.count)
        scale = times * self.config.find_scale(update.module if pattern is None else pattern, rank)
        site = AdapterSite(name=name, shape=shape, dtype=torch.float32, transposed=transposed, op=op, rows=rows)
        names = _PARAMETERS[self.config.form]
        planned = PlannedAdapter(
            site=site,
            form=find_form(self.config.form),
            rank=min(rank, site.largest_rank),
            scale=scale,
            dtype=torch.float32,
        )
        tensors = {names[part]: key for part, key in update.tensors.items() if part in names}
        return SavedAdapter(planned=planned, tensors=tensors, layer=layer, expert=expert, is_transposed=is_transposed)

    def features(self, update: PeftUpdate) -> tuple[int, int]:
        """Rows of B and columns of A; those of a kernel count as one."""
        left, right = self.shapes(update)
        return left[0], math.prod(right[1:])

    def shapes(self, update: PeftUpdate) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of B and A, which can be multiplied."""
        shapes = {part: self.file.tensors[key].shape for part, key in update.tensors.items()}
        left, right = shapes["B"], shapes["A"]
        if len(left) < 2 or len(right) < 2 or any(size != 1 for size in left[2:]) or 0 in (left[0], *right[1:]):
            self.refuse(update.module, f"lora_B {list(left)} and lora_A {list(right)} are no two factors of a ΔW")
        if left[1] != right[0] and len(right) > 2 and left[1] and right[0] % left[1] == 0:
            self.refuse(
                update.module,
                f"lora_B {list(left)} has {right[0] // left[1]} groups: in a grouped convolution PEFT's update acts "
                "across the groups, so it is no change of the weight",
                "run the model with PEFT",
            )
        if left[1] != right[0]:
            self.refuse(update.module, f"lora_B {list(left)} and lora_A {list(right)} do not multiply")
        expected = {"E": right[0], "magnitude_vector": left[0], "bias": left[0]}
        for part, size in expected.items():
            if part in shapes and math.prod(shapes[part]) != size:
                self.refuse(update.module, f"lora_{part} has shape {list(shapes[part])}, expected {size} values")
        return left, right

    def refuse(
        self, module: str, problem: str, advice: str = "merge the adapters with PEFT, or save them again"
    ) -> NoReturn:
        """Raise :class:`CheckpointError` about a module."""
        raise CheckpointError(f"{self.file.path}: module {module}: {problem}; {advice}")
