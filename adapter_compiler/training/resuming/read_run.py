"""A training state's file as the data of a report, without the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adapter_compiler.adapters.combine import compress_triplets
from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.adapters import explained
from adapter_compiler.saving.primitives.adapter_file import read_sites
from adapter_compiler.saving.primitives.file_format import read_file
from adapter_compiler.saving.primitives.plain_data import decode
from adapter_compiler.training.budget.report_data import find_block
from adapter_compiler.training.resuming.state_file import FORMAT, TRAINING_FILE, VALUES
from adapter_compiler.training.run_report.run_data import MaskingData, RunData, SiteData

_NOTE = "Read from a saved state: it has no roles, and no scores of the last masking."


def read_run(directory: str | Path) -> RunData:
    """The run in a file of ``save_training_state``: ranks and budget over time, and the singular values of ΔW.

    Args:
        directory: the folder.

    Raises:
        CheckpointError: the file is missing or damaged, or the run has no budget.
    """
    path = Path(directory) / TRAINING_FILE
    header, tensors = read_file(path, FORMAT)
    sites = read_sites(path, header)
    with explained(path, "what was saved as 'budget'"):
        budget = decode(header["state"].get("budget"), tensors)
    if not isinstance(budget, dict):
        raise CheckpointError(
            f"{path} was saved without a budget, expected one, whose history a report shows; save it with "
            "save_training_state(..., budget=budget)"
        )
    with explained(path, "the state of the budget"):
        return _make_run(path, sites, budget, tensors)


def _make_run(
    path: Path, sites: Mapping[str, Mapping[str, Any]], budget: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> RunData:
    masks = {name: state["mask"] for name, state in budget["sites"].items()}
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    history = [
        MaskingData(step=one["step"], budget=one["budget"], live=one["live"], ranks=one["ranks"], loss=one["loss"])
        for one in budget["history"]
    ]
    schedule = budget["schedule"]
    found = []
    for name, entry in sites.items():
        block, rank = find_block(name), int(entry["rank"])
        earlier = max((masking.ranks.get(name, 0) for masking in history), default=rank)
        found.append(
            SiteData(
                name=name,
                block=block,
                role=name.removeprefix(block).strip(".").removesuffix(".weight"),
                shape=tuple(entry["shape"]),
                before=max(rank, earlier),
                after=counts.get(name, rank),
                singular_values=_find_values(name, float(entry["scale"]), tensors),
            )
        )
    return RunData(
        title=f"Rank budget of {path.parent.name}",
        sites=found,
        maskings=history,
        step=budget["step"],
        total_steps=schedule["total_steps"],
        metric=schedule["allocation"]["metric"],
        unit="triplets" if schedule["target_parameters"] is None else "parameters",
        parameters=sum(counts.get(s.name, 0) * (s.shape[-2] + s.shape[-1] + 1) for s in found),
        is_frozen=bool(history) and history[-1].step >= schedule["total_steps"] - schedule["final_steps"],
        notes=(_NOTE,),
    )


def _find_values(name: str, scale: float, tensors: Mapping[str, torch.Tensor]) -> tuple[float, ...]:
    parts = [tensors.get(f"{VALUES}adapters.{name}.{letter}") for letter in ("P", "lam", "Q")]
    if any(part is None or part.dim() > 2 or not part.numel() for part in parts):
        return ()
    P, lam, Q = (part.double() for part in parts if part is not None)
    values: tuple[float, ...] = tuple(compress_triplets((P, lam * scale, Q), len(lam))[1].tolist())
    return values
