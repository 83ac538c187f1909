"""Give a view of a shared buffer a storage of its own without copying it."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

#: Devices on which torch can import its own memory by DLPack.
_EXCHANGING = ("cpu", "cuda")


def separate_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory with a storage that has nothing else, if the tensor is a view of a larger storage.

    A write into the result changes the view, so code that averages weights in a state dict in place reaches the
    parameters. On devices without DLPack, the result is a copy. Parameters and tensors of other classes, such as
    DTensor, are returned unchanged.
    """
    if type(tensor) is not torch.Tensor or tensor.is_meta or tensor.requires_grad:
        return tensor
    size = tensor.numel() * tensor.element_size()
    if size and tensor.untyped_storage().nbytes() == size:
        return tensor
    if not size:
        # Torch's storages without memory all have the address 0, by which some take them for one; numpy's do not.
        memory = torch.from_numpy(np.empty(0, dtype=np.uint8)).untyped_storage()
        return torch.empty(0, dtype=tensor.dtype).set_(memory, 0, tensor.shape)  # type: ignore[call-overload, no-any-return]
    if tensor.device.type not in _EXCHANGING:
        return tensor.clone()
    return from_dlpack(tensor)
