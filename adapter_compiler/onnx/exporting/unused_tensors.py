"""Find the parameters and buffers of a model that no output of a call depends on, by changing them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from adapter_compiler.onnx.translation.exportable import NamedOutputs
from passes.capture.calls import ModuleCall
from passes.capture.module_state import restored_state
from passes.capture.self_check import is_identical


def find_folded_tensors(
    exporter: NamedOutputs, call: ModuleCall, whole: Collection[str]
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The tensors that a file was computed with but does not have as a whole, and the names of unused ones.

    Args:
        exporter: the model.
        call: the example.
        whole: names of the tensors that are in the file as a whole.
    """
    tensors = {**dict(exporter.module.named_parameters()), **dict(exporter.module.named_buffers())}
    missing = {name: tensor for name, tensor in tensors.items() if name not in whole}
    unused = find_unused_tensors(exporter, call, missing) if missing else set()
    return {name: tensor for name, tensor in missing.items() if name not in unused}, unused


def find_unused_tensors(exporter: NamedOutputs, call: ModuleCall, names: Collection[str]) -> set[str]:
    """Those of ``names``, parameters and buffers of the model, whose values change no output of a call.

    A tensor whose change makes the call fail counts as used.
    """
    tensors = {**dict(exporter.module.named_parameters()), **dict(exporter.module.named_buffers())}
    expected = _run(exporter, call, {})
    assert expected is not None
    changed = {name: change_tensor(tensors[name]) for name in names}

    def are_unused(some: Mapping[str, torch.Tensor]) -> bool:
        found = _run(exporter, call, some)
        if found is None or len(found) != len(expected):
            return False
        return all(is_identical(a, b) for a, b in zip(expected, found, strict=True))

    if are_unused(changed):
        return set(names)
    return {name for name, tensor in changed.items() if are_unused({name: tensor})}


def change_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and dtype with other values; positive ones stay positive."""
    if tensor.dtype is torch.bool:
        return ~tensor
    return tensor.detach() * 1.125 + 0.25 if tensor.is_floating_point() or tensor.is_complex() else tensor + 1


def _run(
    exporter: NamedOutputs, call: ModuleCall, changed: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, ...] | None:
    """The outputs with other values of some tensors, or ``None`` if the call fails; the model stays as it was."""
    args, kwargs = call.rebuild(call.tensors)
    tensors = {f"module.{name}": tensor for name, tensor in changed.items()}
    with restored_state(exporter.module):
        torch.manual_seed(0)
        try:
            outputs: tuple[torch.Tensor, ...] = torch.func.functional_call(exporter, tensors, args, kwargs)
        except Exception:  # the model's own code raises what it likes
            if not changed:
                raise
            return None
    return outputs
