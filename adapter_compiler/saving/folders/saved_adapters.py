"""Trained adapters as they lie in a folder: ours or PEFT's, read one site at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import passes.forms
from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.folders.base_weights import BaseWeights
from adapter_compiler.saving.folders.merge_blocks import is_finite, merge_into
from adapter_compiler.saving.folders.stored_parameters import Edit, Expert, limit_rank, transpose_update
from adapter_compiler.saving.layer_kinds import TrainedNames
from adapter_compiler.saving.primitives.safetensors_header import SafetensorsHeader
from adapter_compiler.saving.quantized_formats import QuantizedFormat
from passes.base import SiteError
from passes.forms import AdapterForm
from passes.planning.json_schema import show
from passes.planning.plan import AdapterPlan, PlannedAdapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """One adapter in a file.

    Attributes:
        planned: its site, form and scale; the site's dtype is that of the adapter, the weight's is not known.
        tensors: name of each parameter → the tensor's name in the file.
        layer: the kind of module, see :mod:`adapter_compiler.saving.layer_kinds`; ``""`` if unknown.
        expert: which matrix of a stack the adapter belongs to, where the tensors hold those of all.
        is_transposed: the tensors are those of the transposed ΔW.
    """

    planned: PlannedAdapter
    tensors: Mapping[str, str]
    layer: str = ""
    expert: Expert | None = None
    is_transposed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedAdapters:
    """All adapters of a folder.

    Attributes:
        file: the safetensors file.
        kind: ``"adapter-compiler"``, ``"peft lora"`` or ``"peft adalora"``.
        adapters: by site.
        replacements: weight or buffer of the model that was trained fully → the tensor's name in the file.
        loose: those of ``replacements`` that must be in the base already.
        starts: weight or bias that is changed → the tensor that stands in for the base's value of it.
        edits: other changes, by the name of the tensor.
        undecided: by module, what only the base can say about it; :meth:`fit` decides it.
        keeps_ties: embeddings whose change also holds for the weights that are tied to them.
        quantized: the format that each quantized weight had while the adapters were trained.
        trained: which of ``replacements`` are parameters and not buffers; ``None`` if the file does not say.
        refit: makes the adapters anew for a base.
    """

    file: SafetensorsHeader
    kind: str
    adapters: Mapping[str, SavedAdapter]
    replacements: Mapping[str, str]
    loose: frozenset[str] = frozenset()
    starts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    edits: Mapping[str, Edit] = dataclasses.field(default_factory=dict)
    undecided: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keeps_ties: frozenset[str] = frozenset()
    quantized: Mapping[str, QuantizedFormat] = dataclasses.field(default_factory=dict)
    trained: TrainedNames | None = None
    refit: Callable[[BaseWeights], SavedAdapters] | None = None

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.file.path

    def fit(self, base: BaseWeights) -> SavedAdapters:
        """The adapters as this base needs them.

        Raises:
            CheckpointError: the base does not decide what an adapter is, or the adapters belong to another model.
        """
        return self if self.refit is None else self.refit(base)

    def without_formats(self) -> SavedAdapters:
        """The same adapters for weights as they are, whatever format those had in training."""
        refit = None if self.refit is None else functools.partial(_fit_without_formats, self.refit)
        return dataclasses.replace(self, quantized={}, refit=refit)

    def assert_plain(self, purpose: str) -> None:
        """Raise :class:`CheckpointError` unless there are only adapters and tensors that were trained fully.

        Args:
            purpose: what they are needed for, for messages.
        """
        found = next(((edit.field, name) for name, edit in self.edits.items()), None)
        found = found or next(((reason, module) for module, reason in self.undecided.items()), None)
        found = found or next((("the saved base value", name) for name in self.starts), None)
        if found is not None:
            raise CheckpointError(
                f"{self.path}: {found[0]} at {found[1]} has no place in {purpose}, expected adapters and modules that "
                "were trained fully; fold the adapters into the base with fold_files, or merge them with PEFT"
            )

    def parameters_of(self, site: str) -> dict[str, torch.Tensor]:
        """The parameters of one adapter, in the shapes that its form expects."""
        saved = self.adapters[site]
        shapes = _natural_shapes(saved)
        found = {}
        for name, key in saved.tensors.items():
            tensor = self.tensor(key) if saved.expert is None else self._read_shared(key)
            found[name] = tensor.reshape(-1) if shapes[name] == 1 else tensor.flatten(1)
        if saved.expert is not None:
            found = saved.expert.select(found)
        if saved.is_transposed:
            found = transpose_update(found)
        return limit_rank(found, saved.planned.site.largest_rank)

    def _read_shared(self, key: str) -> torch.Tensor:
        """A tensor that the adapters of one stack share, which are asked for one after another."""
        if key not in self._recent:
            if len(self._recent) > 1:
                self._recent.pop(next(iter(self._recent)))
            self._recent[key] = self.tensor(key)
        return self._recent[key]

    @functools.cached_property
    def _recent(self) -> dict[str, torch.Tensor]:
        return {}

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor of the file."""
        return self.file.read(key)

    @functools.cached_property
    def plan(self) -> AdapterPlan:
        """The adapters in the file's order."""
        return AdapterPlan(adapters=tuple(adapter.planned for adapter in self.adapters.values()))

    @functools.cached_property
    def changed(self) -> dict[str, tuple[str, ...]]:
        """The tensors of the base that change but are not replaced, each with its further names."""
        found = {name: adapters[0].site.aliases for name, adapters in self.plan.by_weight.items()}
        others = (*self.edits, *self.starts, *self.quantized)
        return found | {name: () for name in others if name not in found and name not in self.replacements}

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The value of a changed tensor, given that of the base; see :meth:`merge_one`."""
        if name in self.starts:
            weight = self._take_start(name, weight)
        if name in self.quantized:
            weight = self.quantized[name].round_trip(weight)
        adapters = self.plan.by_weight.get(name, ())
        was_finite = bool(adapters) and is_finite(weight)
        for planned in adapters:
            weight = self.merge_one(planned.site.name, weight)
        if was_finite and not is_finite(weight):
            raise CheckpointError(
                f"{self.path}: the adapter of site {name} has inf or nan, or values whose product has, expected finite "
                "values; look for a learning rate that was too high, or take an earlier adapter"
            )
        if name in self.edits:
            weight = self._edit(name, weight)
        return weight

    def changes_alike(self, name: str, other: str) -> bool:
        """Whether two tensors that are equal are equal after their changes too."""
        if name in self.replacements and other in self.replacements:
            return torch.equal(self.tensor(self.replacements[name]), self.tensor(self.replacements[other]))
        if name in self.edits and other in self.edits:
            one, two = self.edits[name], self.edits[other]
            return one.rows == two.rows and torch.equal(self.tensor(one.key), self.tensor(two.key))
        plans = [self.plan.by_weight.get(weight, ()) for weight in (name, other)]
        if (
            any(len(plan) != 1 or plan[0].form.name != "lora" for plan in plans)
            or plans[0][0].scale != plans[1][0].scale
        ):
            return False
        first, second = (self.parameters_of(plan[0].site.name) for plan in plans)
        if plans[0][0].site.transposed != plans[1][0].site.transposed:
            second = transpose_update(second)
        return all(torch.equal(first[key], second[key]) for key in first)

    def _take_start(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        start = self.tensor(self.starts[name])
        if start.shape != weight.shape:
            raise CheckpointError(
                f"{self.path}: {name} was saved with shape {list(start.shape)}, the base has {list(weight.shape)}, "
                "expected the same; resize the base as the model was when it was trained"
            )
        return start.to(weight.dtype)

    def _edit(self, name: str, value: torch.Tensor) -> torch.Tensor:
        edit = self.edits[name]
        tensor = self.tensor(edit.key)
        expected = tuple(value.shape) if edit.rows is None else (len(edit.rows), *value.shape[1:])
        if tuple(tensor.shape) != expected or any(row >= len(value) for row in edit.rows or ()):
            raise CheckpointError(
                f"{self.path}: {edit.field}: the tensor for {name} has shape {list(tensor.shape)}, expected "
                f"{list(expected)} for the base's {list(value.shape)}; it belongs to another model"
            )
        changed = edit.apply(value, tensor)
        if not bool(torch.isfinite(changed).all()):
            raise CheckpointError(
                f"{self.path}: {edit.field}: {name} would have inf or nan in {value.dtype}, expected finite values; "
                "fold into a base of a wider dtype"
            )
        return changed

    def merge_one(self, site: str, weight: torch.Tensor) -> torch.Tensor:
        """W + ΔW, bit for bit what :meth:`AdaptedModel.fold` gives; a large weight is overwritten by rows.

        Each value of P diag(λ) Q or B A is the same sum over the rank, whichever rows are computed together.

        Raises:
            CheckpointError: the weight has not the shape that the adapter was trained on, or the sum is not finite in
                the weight's dtype.
        """
        planned = self.adapters[site].planned
        if tuple(weight.shape) != planned.site.shape:
            raise CheckpointError(
                f"{self.path}: site {site} was trained on a weight of shape {list(planned.site.shape)}, the base has "
                f"{list(weight.shape)}; it belongs to another model"
            )
        try:
            return merge_into(weight, planned, self.parameters_of(site))
        except SiteError as error:
            raise CheckpointError(f"{self.path}: {error}") from error


def _fit_without_formats(refit: Callable[[BaseWeights], SavedAdapters], base: BaseWeights) -> SavedAdapters:
    return refit(base).without_formats()


def _natural_shapes(saved: SavedAdapter) -> dict[str, int]:
    """How many dimensions each parameter has in its form."""
    site = saved.planned.site
    shapes = saved.planned.form.parameter_shapes(site.out_features, site.in_features, saved.planned.rank)
    return {name: len(shape) for name, shape in shapes.items()}


def find_form(path: Path, name: str) -> AdapterForm:
    """The form of this name.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return passes.forms.find_form(name)
    except (KeyError, ValueError):
        known = ", ".join(passes.forms.FORMS)
        raise CheckpointError(
            f"{path}: adapters of the form {show(name)} are unknown, expected one of {known}; save the adapters again, "
            "or update adapter-compiler"
        ) from None
