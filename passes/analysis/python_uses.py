"""How a model's Python uses weights, seen by watching it run.

For what no recording shows. A torch function mode sees every operation of the code; a weight is followed through
transposes, casts and slices to what computes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from passes.analysis.weight_uses import WeightUse

_FOLLOWED = {
    "T", "__get__", "__getitem__", "chunk", "clone", "contiguous", "expand", "flatten", "float", "half", "double",
    "bfloat16", "mT", "movedim", "narrow", "permute", "reshape", "select", "split", "squeeze", "swapaxes", "t", "to",
    "transpose", "type", "type_as", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip
_LINEAR = {
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "addmm", "mv", "bmm", "baddbmm",
    "multi_head_attention_forward",
}  # fmt: skip


class WatchWeights(TorchFunctionMode):
    """Collects the uses of weights by the code that runs while it is entered.

    Attributes:
        uses: what was seen, by the weight's first qualified name.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.uses: dict[str, list[WeightUse]] = {}
        # Tensors are kept alive with their names, so that no other one can take their identity.
        self._known: dict[int, tuple[torch.Tensor, str]] = {id(w): (w, name) for name, w in weights.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and note which weights it was given."""
        result = func(*args, **(kwargs or {}))
        self._note(str(getattr(func, "__name__", func)), (args, kwargs or {}), result)
        return result

    def _note(self, op: str, arguments: Any, result: Any) -> None:
        produced = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        given = (leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor))
        names = dict.fromkeys(self._known[id(t)][1] for t in given if id(t) in self._known)
        for name in names if produced else ():
            if op in _FOLLOWED:
                self._known |= {id(tensor): (tensor, name) for tensor in produced}
            else:
                use = WeightUse(op=op, is_linear=op in _LINEAR, has_gradient=torch.is_grad_enabled())
                self.uses.setdefault(name, []).append(use)
