"""Tensors in and out of onnxruntime, for every dtype that torch and onnxruntime share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy
import onnxruntime
import torch

from adapter_compiler.saving.onnx_files.adapter_tensors import BFLOAT16, from_ort_value, to_ort_value


def run_session(
    session: onnxruntime.InferenceSession,
    outputs: Sequence[str] | None,
    feeds: Mapping[str, torch.Tensor],
    run_options: onnxruntime.RunOptions | None = None,
) -> list[torch.Tensor]:
    """Run a session on torch tensors.

    Args:
        session: the file, opened.
        outputs: names of the wanted outputs; ``None`` for all.
        feeds: the inputs by name; what the file does not take is left out.
        run_options: for onnxruntime.
    """
    wanted = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}
    given = {name: tensor.detach().cpu().contiguous() for name, tensor in feeds.items() if name in wanted}
    names = [value.name for value in session.get_outputs()] if outputs is None else list(outputs)
    if _uses_bfloat16(session):
        values = {name: to_ort_value(tensor) for name, tensor in given.items()}
        found = session.run_with_ort_values(names, values, run_options)
        return [from_ort_value(value) for value in found]
    arrays = session.run(names, {name: tensor.numpy() for name, tensor in given.items()}, run_options)
    return [torch.from_numpy(numpy.array(array)) for array in arrays]


def _uses_bfloat16(session: onnxruntime.InferenceSession) -> bool:
    values = (*session.get_inputs(), *session.get_outputs(), *session.get_overridable_initializers())
    return any(value.type == BFLOAT16 for value in values)
