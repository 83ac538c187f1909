"""Run a reference call in each run time that is installed, with an exchanged adapter."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapter_compiler.onnx.serving.session import OnnxAdapters
from adapter_compiler.onnx.verification.inputs import name_leaves

#: A run time has outputs, or says why it is not run.
Outcome = Mapping[str, torch.Tensor] | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """What a run time needs.

    Attributes:
        adapter: the folder or the file.
        target: its format.
        component: the part of a pipeline, for diffusers.
        updates: ΔW of each weight, as our reader of the format computes it.
        adds_only: whether ΔW is all that the adapter changes.
        base: the base model's folder or file.
        model: the base model.
        inputs: keyword arguments of the reference call.
    """

    adapter: Path
    target: str
    component: str | None
    updates: Mapping[str, torch.Tensor]
    adds_only: bool
    base: Path | None
    model: nn.Module | None
    inputs: Mapping[str, torch.Tensor]


def run_torch(replay: Replay) -> Outcome:
    """PyTorch, with ΔW added to the base model's weights."""
    if replay.model is None:
        return "no base model is given as FILE.py:FUNCTION"
    if not replay.adds_only:
        return "the adapter changes more than ΔW"
    model = copy.deepcopy(replay.model).eval()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, delta in replay.updates.items():
            weight = parameters[name]
            rows = delta if _has_rows(weight, delta) else delta.t()
            weight.add_(rows.reshape(weight.shape).to(weight.dtype))
        return _flatten(model(**replay.inputs))


def run_peft(replay: Replay) -> Outcome:
    """peft's ``PeftModel.from_pretrained``."""
    if not replay.target.startswith(("peft", "lora", "vllm")):
        return "peft does not read this format"
    if replay.model is None:
        return "no base model is given as FILE.py:FUNCTION"
    if importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    import peft

    model = peft.PeftModel.from_pretrained(copy.deepcopy(replay.model), replay.adapter).eval()
    with torch.no_grad():
        return _flatten(model(**replay.inputs))


def run_diffusers(replay: Replay) -> Outcome:
    """diffusers' ``load_lora_adapter`` of the base model."""
    if replay.target != "diffusers":
        return "diffusers does not read this format"
    if not hasattr(replay.model, "load_lora_adapter"):
        return "no base model of diffusers is given as FILE.py:FUNCTION"
    model: Any = copy.deepcopy(replay.model)
    model.load_lora_adapter(replay.adapter, prefix=replay.component, weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        return _flatten(model.eval()(**replay.inputs))


def run_onnxruntime(replay: Replay) -> Outcome:
    """onnxruntime, with the base file and the adapter as its inputs."""
    if replay.target != "ort":
        return "onnxruntime does not read this format"
    if replay.base is None or replay.base.suffix != ".onnx":
        return "no base is given that was exported with adapters='runtime'"
    served = OnnxAdapters(replay.base)
    served.load("adapter", replay.adapter)
    found = served.run({name: value.numpy() for name, value in replay.inputs.items()}, adapter="adapter")
    return {name.removeprefix("output."): torch.from_numpy(value) for name, value in found.items()}


def run_mlx(replay: Replay) -> Outcome:
    """mlx-lm's ``load_adapters`` on the model that it loads from the base folder."""
    if replay.target != "mlx":
        return "mlx-lm does not read this format"
    if replay.base is None or not (replay.base / "config.json").is_file():
        return "no folder of the base model is given"
    if importlib.util.find_spec("mlx_lm") is None:
        return "mlx-lm is not installed"
    core, utils = importlib.import_module("mlx.core"), importlib.import_module("mlx_lm.utils")
    tuner = importlib.import_module("mlx_lm.tuner.utils")
    core.set_default_device(core.cpu)
    model, *_ = utils.load_model(replay.base)
    model = tuner.load_adapters(model, str(replay.adapter))
    model.eval()
    logits = model(core.array(replay.inputs["input_ids"].numpy()))
    return {"logits": torch.tensor(logits.astype(core.float32).tolist())}


#: By what reports call them.
RUN_TIMES = {
    "PyTorch": run_torch,
    "peft": run_peft,
    "diffusers": run_diffusers,
    "onnxruntime": run_onnxruntime,
    "mlx-lm": run_mlx,
}


def _has_rows(weight: torch.Tensor, delta: torch.Tensor) -> bool:
    """Whether a weight is stored as [out, in], the layout of ΔW."""
    return weight.dim() != 2 or weight.shape == delta.shape


def _flatten(result: Any) -> dict[str, torch.Tensor]:
    return {name: leaf for name, leaf in name_leaves(result) if isinstance(leaf, torch.Tensor)}
