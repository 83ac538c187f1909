"""A model with the adapters of a folder, which says all that is needed for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from adapter_compiler.adapters.named_adapters import fill_parameters, find_module_tensors, write_module_tensors
from adapter_compiler.compile import compile_with_adapters
from adapter_compiler.config.adapter_config import AdapterConfig
from adapter_compiler.errors import CheckpointError, ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.saving.adapters import load_adapters
from adapter_compiler.saving.fit_tensors import cast_exactly
from adapter_compiler.saving.folders.live_models import fit_to_model
from adapter_compiler.saving.folders.read_folder import read_saved_adapters
from adapter_compiler.saving.folders.saved_adapters import SavedAdapters
from adapter_compiler.saving.primitives.adapter_file import ADAPTERS, FILE_NAME
from adapter_compiler.saving.primitives.file_format import open_own_file
from passes.base import SiteError
from passes.planning.plan import AdapterPlan


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    config: AdapterConfig | None = None,
) -> AdaptedModel:
    """Compile a model with the adapters of a folder and load them.

    Args:
        model: the model that the adapters were trained on, without adapters; it keeps its weights.
        folder: what :meth:`AdaptedModel.save`, a Trainer's checkpoint or PEFT's ``save_pretrained`` wrote.
        example_args: of one call, if sites without adapter are to be found too.
        example_kwargs: likewise.
        config: options that are other than those that the folder says.

    Returns:
        The adapted model, which can be called, trained, folded and exported.

    Raises:
        CheckpointError: the folder cannot be read, or belongs to another model.
    """
    saved = fit_to_model(read_saved_adapters(folder), model)
    saved.assert_plain("a model's adapter")
    own = Path(folder) / FILE_NAME
    header = open_own_file(own, ADAPTERS)[0] if own.is_file() else {}
    config = _read_config(own, saved, header, model) if config is None else config
    try:
        plan = _read_plan(saved, header)
        adapted = compile_with_adapters(model, example_args, example_kwargs, config=config, plan=plan)
    except SiteError as error:
        raise CheckpointError(f"{saved.path}: {error}; it belongs to another model") from error
    if own.is_file():
        load_adapters(adapted, folder)
    else:
        _fill(adapted, saved)
    return adapted


def _read_plan(saved: SavedAdapters, header: Mapping[str, Any]) -> AdapterPlan:
    """The plan in the ranks of the file; starting values come with its tensors."""
    if "plan" in header:
        plan = AdapterPlan.from_json(header["plan"])
    else:
        plan = AdapterPlan(adapters=tuple(one.planned for one in saved.adapters.values()))
    adapters = []
    for adapter in plan:
        dtype = next(iter(saved.parameters_of(adapter.site.name).values())).dtype
        adapters.append(dataclasses.replace(adapter, form=adapter.form.core, dtype=dtype))
    return AdapterPlan(adapters=tuple(adapters))


def _read_config(path: Path, saved: SavedAdapters, header: Mapping[str, Any], model: nn.Module) -> AdapterConfig:
    """The options of the file, with what was trained fully by its names."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    trainable = tuple(name for name in saved.replacements if name in parameters)
    options: dict[str, Any] = {}
    for name, value in header.get("options", {}).items():
        options[name] = tuple(value) if isinstance(value, list) else value
    # The plan says where adapters stand and the file how they start; globs for that may match nothing here.
    for name in ("sites", "exclude", "init", "kind"):
        options.pop(name, None)
    try:
        return AdapterConfig(**(options | {"trainable": trainable}))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(
            f"{path}: its options cannot be used ({error}), expected those that AdaptedModel.save writes; give others: "
            "load(..., config=AdapterConfig(...))"
        ) from error


def _fill(adapted: AdaptedModel, saved: SavedAdapters) -> None:
    """Put in the tensors of a folder that PEFT wrote."""
    values = {site: saved.parameters_of(site) for site in saved.adapters}
    fill_parameters(adapted.adapters, adapted.plan, values)
    live = find_module_tensors(adapted)
    tensors = {}
    for name, key in saved.replacements.items():
        if name not in live:
            raise CheckpointError(f"{saved.path}: {name} was trained fully, this model has no such parameter")
        tensors[name] = cast_exactly(saved.path, name, saved.tensor(key), live[name].dtype)
    write_module_tensors(adapted, tensors)
