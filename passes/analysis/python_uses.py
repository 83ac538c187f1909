"""Observe how a model's Python code uses its weights while it runs.

For models whose operators cannot be recorded as a graph. A torch function mode sees every operation; each weight is
followed through transposes, casts and slices to the operation that computes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from passes.analysis.weight_uses import WeightUse
from passes.compat import pytree
from passes.operators import PRODUCT_NAMES

_FOLLOWED = {
    "T", "__get__", "__getitem__", "chunk", "clone", "contiguous", "expand", "flatten", "float", "half", "double",
    "bfloat16", "mT", "movedim", "narrow", "permute", "reshape", "select", "split", "squeeze", "swapaxes", "t", "to",
    "transpose", "type", "type_as", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip
_LINEAR = PRODUCT_NAMES | {"__matmul__", "__rmatmul__", "multi_head_attention_forward"}


class WatchWeights(TorchFunctionMode):
    """Collects the uses of weights by the code that runs inside this context.

    Attributes:
        uses: the uses of each weight, by its first qualified name.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.uses: dict[str, list[WeightUse]] = {}
        # Tensors are kept alive with their names, so that no other tensor can get the same id.
        self._known: dict[int, tuple[torch.Tensor, str]] = {id(w): (w, name) for name, w in weights.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and record the weights among its arguments."""
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
