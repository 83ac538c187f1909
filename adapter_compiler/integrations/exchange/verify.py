"""Verify an exchanged adapter against the manifest that was written with it."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapter_compiler.errors import CheckpointError, VerificationError
from adapter_compiler.integrations.exchange.reference import Reference, read_reference
from adapter_compiler.integrations.exchange.run_times import RUN_TIMES, Replay
from adapter_compiler.saving.exchange.base_config import BaseConfig, read_base_config
from adapter_compiler.saving.exchange.manifest import find_manifest, project, read_manifest
from adapter_compiler.saving.exchange.read_back import read_back

_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterCheck:
    """One comparison.

    Attributes:
        run_time: who read the adapter.
        subject: the weight or the output.
        error: the relative difference of ‖ΔW‖ and of its projection, or the largest absolute one of an output.
    """

    run_time: str
    subject: str
    error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterVerification:
    """What an adapter was compared with.

    Attributes:
        adapter: the folder or the file.
        target: its format.
        checks: the comparisons that it has passed.
        not_run: by run time that could have read it, why it was not run.
    """

    adapter: Path
    target: str
    checks: tuple[AdapterCheck, ...]
    not_run: Mapping[str, str]


def verify_adapter(
    adapter: str | Path, *, base: str | Path | None = None, model: nn.Module | None = None
) -> AdapterVerification:
    """Read an exchanged adapter by its reader's rule, and replay its reference call wherever that can be done.

    Args:
        adapter: what ``convert_adapters`` wrote.
        base: the base model's folder with its ``config.json``; for onnxruntime the file that was exported with
            ``adapters="runtime"``.
        model: the base model, for PyTorch, peft and diffusers; it is not changed.

    Raises:
        CheckpointError: the adapter or its manifest is missing or damaged.
        ConfigError: GGUF without a base.
        VerificationError: ΔW of a weight or an output is not what the manifest or the reference says.
    """
    adapter = Path(adapter)
    base = None if base is None else Path(base)
    manifest = read_manifest(find_manifest(adapter))
    updates = read_back(adapter, manifest, _find_config(manifest["target"], base, model))
    checks = list(_check_updates(adapter, manifest, updates))
    not_run: dict[str, str] = {}
    reference = read_reference(adapter)
    if reference is None:
        not_run["all run times"] = "the adapter has no reference call; write one with convert --reference"
    else:
        replay = Replay(
            adapter=adapter,
            target=manifest["target"],
            component=manifest["component"],
            updates=updates,
            adds_only=manifest["adds_only"],
            base=base,
            model=model,
            inputs=reference.inputs,
        )
        checks += _replay(replay, reference, not_run)
    return AdapterVerification(adapter=adapter, target=manifest["target"], checks=tuple(checks), not_run=not_run)


def _find_config(target: str, base: Path | None, model: nn.Module | None) -> BaseConfig | None:
    """The configuration that GGUF needs: that of the folder, or of a model of transformers."""
    if target != "gguf":
        return None
    config: Any = getattr(model, "config", None)
    if base is None and hasattr(config, "to_json_string"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(json.loads(config.to_json_string(use_diff=False))), encoding="utf-8")
            return read_base_config(path, "llama.cpp")
    return None if base is None else read_base_config(base, "llama.cpp")


def _check_updates(
    adapter: Path, manifest: Mapping[str, Any], updates: Mapping[str, torch.Tensor]
) -> Iterator[AdapterCheck]:
    if odd := sorted(updates.keys() ^ manifest["weights"].keys()):
        side = "the adapter" if odd[0] in updates else "the manifest"
        raise CheckpointError(
            f"{adapter}: {odd[0]} is in {side} only, expected the same weights in both; convert the adapters again"
        )
    for name, weight in manifest["weights"].items():
        found = (float(updates[name].norm()), project(updates[name]))
        differences = (abs(found[0] - weight["norm"]), abs(found[1] - weight["projection"]))
        error = max(differences) / max(weight["norm"], 1e-30) if any(differences) else 0.0
        if not error <= manifest["tolerance"]:
            raise VerificationError(
                f"{adapter}: ΔW of {name} has the norm {found[0]:.6g} and the projection {found[1]:.6g} by the rule of "
                f"{manifest['target']}, the manifest says {weight['norm']:.6g} and {weight['projection']:.6g}; the "
                "adapter was changed, or its base is another one; convert the adapters again"
            )
        yield AdapterCheck(run_time="our reader", subject=name, error=error)


def _replay(replay: Replay, reference: Reference, not_run: dict[str, str]) -> list[AdapterCheck]:
    checks = []
    for name, run in RUN_TIMES.items():
        outcome = run(replay)
        if isinstance(outcome, str):
            if "does not read this format" not in outcome:
                not_run[name] = outcome
            continue
        checks += [_compare(replay.adapter, name, key, reference, outcome) for key in reference.outputs]
    if replay.target in ("gguf", "vllm"):
        not_run["llama.cpp" if replay.target == "gguf" else "vLLM"] = "it is not run from here"
    return checks


def _compare(
    adapter: Path, run_time: str, key: str, reference: Reference, outcome: Mapping[str, torch.Tensor]
) -> AdapterCheck:
    expected = reference.outputs[key]
    if key not in outcome or outcome[key].shape != expected.shape:
        found = list(outcome[key].shape) if key in outcome else f"only {', '.join(outcome)}"
        raise VerificationError(
            f"{adapter} in {run_time}: the output {key} has the shape {list(expected.shape)} in the reference, found "
            f"{found}; give the base model that the adapters were trained on"
        )
    error = float((outcome[key].double() - expected.double()).abs().max())
    largest = float(expected.double().abs().max())
    if not error <= 10 * _TOLERANCE * max(1.0, largest):
        raise VerificationError(
            f"{adapter} in {run_time}: the output {key} differs by up to {error:.3g} from the reference, whose largest "
            f"value is {largest:.3g}; expected at most {10 * _TOLERANCE * max(1.0, largest):.3g}; the adapter or the "
            "base model is another one"
        )
    return AdapterCheck(run_time=run_time, subject=key, error=error)
