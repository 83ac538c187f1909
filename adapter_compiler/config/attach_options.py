"""The options of attaching adapters: how adapted weights compute."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttachOptions:
    """How the adapted weights of a model compute.

    Attributes:
        fused: whether an adapter and its base layer may run as one autograd function.
        recompute: whether these functions may recompute cheap activations in backward.
        regions: qualified names of the blocks of the model, or ``("",)`` for the whole model if it has none.
        checkpointed: qualified names of the modules whose activations are recomputed in backward.
    """

    fused: bool = True
    recompute: bool = True
    regions: tuple[str, ...] = ("",)
    checkpointed: tuple[str, ...] = ()
