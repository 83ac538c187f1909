"""How adapted weights compute."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttachOptions:
    """How the adapted weights of a model compute.

    Attributes:
        fused: see :class:`~adapter_compiler.model.dispatch.slots.Slot`.
        recompute: likewise.
        checkpointed: names of the modules whose activations are computed again in backward.
    """

    fused: bool = True
    recompute: bool = True
    checkpointed: tuple[str, ...] = ()
