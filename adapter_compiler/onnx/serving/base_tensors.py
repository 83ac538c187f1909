"""Which tensors of a model an adapter file holds, and checksums of the others, which the base file must have.

Training changes more than adapters: parameters that train fully, and buffers such as the running statistics of batch
norms. All of these go into the adapter file, except for integers and for scalars, which onnxruntime's format cannot
hold. Whatever else the model computes with belongs to the base, so that its file and the adapter together give what
``fold()`` gives, or are refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adapter_compiler.adapters.copies import share_unpacked
from adapter_compiler.adapters.named_adapters import find_module_tensors
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.saving.onnx_files.metadata import describe_tensor


def find_trained_tensors(adapted: AdaptedModel, name: str | None = None) -> dict[str, torch.Tensor]:
    """Fully trained parameters and persistent floating-point buffers, as they belong to an adapter.

    Scalars are left out: an adapter with another value of one is refused on the base.

    Args:
        adapted: the model.
        name: which adapter of it; by default the active one.

    Raises:
        ConfigError: a scalar is a parameter that trains fully.
    """
    _assert_no_trained_scalar(adapted)
    inactive = _find_inactive(adapted, name)
    tensors = {key: inactive.get(key, tensor) for key, tensor in find_module_tensors(adapted).items()}
    return {
        key: tensor.detach().cpu() for key, tensor in tensors.items() if tensor.is_floating_point() and tensor.dim()
    }


def _assert_no_trained_scalar(adapted: AdaptedModel) -> None:
    for name, parameter in adapted.module.named_parameters():
        if name in find_module_tensors(adapted) and not parameter.dim():
            raise ConfigError(
                f"{name} is a scalar that trains fully, which onnxruntime's adapter files cannot hold; expected shape "
                "[1]; change its shape, leave it out of trainable=, or export with adapters='merged'"
            )


def describe_base(adapted: AdaptedModel, name: str | None = None) -> dict[str, str]:
    """The dtype, shape and checksum of every parameter and buffer that :func:`find_trained_tensors` leaves out."""
    inactive, trained = _find_inactive(adapted, name), find_trained_tensors(adapted, name)
    parameters = {key: p for key, p in adapted.module.named_parameters() if key not in trained}
    buffers = {key: b for key, b in adapted.module.named_buffers() if key not in trained}
    base = {key: describe_tensor(share_unpacked(parameter)) for key, parameter in parameters.items()}
    return base | {key: describe_tensor(inactive.get(key, buffer)) for key, buffer in buffers.items()}


def find_other_tensor(wanted: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """The name of the first tensor whose checksum is another one or missing."""
    return next((name for name, checksum in wanted.items() if found.get(name) != checksum), None)


def _find_inactive(adapted: AdaptedModel, name: str | None) -> Mapping[str, torch.Tensor]:
    return adapted.adapter_set.find_inactive(adapted.active_adapter if name is None else name) or {}
