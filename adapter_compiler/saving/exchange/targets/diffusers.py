"""Adapters for diffusers: ``pytorch_lora_weights.safetensors`` with PEFT's names below that of a component.

Its rule (``get_peft_kwargs`` in ``diffusers/utils/peft_utils.py``): ranks are read from the tensors; without alphas in
the file, the scale is 1 at modules of the most frequent rank, and at the others only in versions since August 2026
(before, that rank by the module's). So all modules have one rank, padded with zeros, and the scale 1 in every version.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.exchange.updates import Abilities, WeightUpdate, pad_to_one_rank
from adapter_compiler.saving.layer_kinds import LINEAR

ABILITIES = Abilities(
    name="diffusers",
    layers=(LINEAR, "Conv2d"),
    taken="weights of nn.Linear and nn.Conv2d without groups and dilation",
    rescales=True,
)

WEIGHTS = "pytorch_lora_weights.safetensors"


def write_diffusers(updates: Sequence[WeightUpdate], folder: Path, component: str | None) -> None:
    """Write the file into a folder.

    Raises:
        ConfigError: the name of the component is missing, or is none.
    """
    if not component or not component.isidentifier():
        raise ConfigError(
            f"component={component!r}: diffusers finds adapters by the name of the pipeline's part that they belong "
            "to, and loads nothing otherwise; expected its name, such as unet, transformer or text_encoder; give it "
            "with --component (component= in Python)"
        )
    padded, _ = pad_to_one_rank(updates)
    tensors: dict[str, torch.Tensor] = {}
    for update in padded:
        tensors |= {f"{component}.{update.module}.{name}": value for name, value in _spell(update).items()}
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / WEIGHTS)


def read_diffusers(folder: Path, component: str) -> dict[str, torch.Tensor]:
    """ΔW [out, in] of each weight in float64, by diffusers' rule; trailing dimensions of kernels are flattened.

    DoRA's ΔW is that before rescaling.
    """
    tensors = load_file(folder / WEIGHTS)
    prefix, found = f"{component}.", {}
    for name, left in tensors.items():
        if name.startswith(prefix) and name.endswith(".lora_B.weight"):
            right = tensors[name.replace(".lora_B.", ".lora_A.")]
            module = name.removeprefix(prefix).removesuffix(".lora_B.weight")
            found[f"{module}.weight"] = left.flatten(1).double() @ right.flatten(1).double()
    return found


def _spell(update: WeightUpdate) -> dict[str, torch.Tensor]:
    ones = (1,) * (len(update.shape) - 2)
    found = {
        "lora_A.weight": update.right.reshape(-1, *update.shape[1:]) if ones else update.right,
        "lora_B.weight": update.left.reshape(*update.left.shape, *ones),
    }
    if update.magnitude is not None:
        found["lora_magnitude_vector"] = update.magnitude.reshape(1, -1, *ones) if ones else update.magnitude
    return found
