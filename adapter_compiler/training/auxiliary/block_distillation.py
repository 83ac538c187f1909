"""Block-wise distillation: hidden states of chosen tokens become like those of a teacher's blocks (VoRA).

For block pairs b and the n chosen tokens, with a linear head A_b after a normalization, student states h and teacher
states v (Wang et al. 2025, arXiv 2503.20680, block-wise distillation),

    loss = 1/(B n) Σ_b Σ_t (1 - cos(A_b h_bt, v_bt))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapter_compiler.errors import ConfigError


class BlockDistillation(nn.Module):
    """Watches blocks of a student and of a teacher, and compares what they returned last.

    The heads are the parameters of this module: give them to the optimizer, and leave them out after training.

    Attributes:
        heads: a normalization and a linear layer for each pair.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, pairs: Mapping[str, str], *, width: int, teacher_width: int
    ) -> None:
        """Register hooks on the blocks.

        Args:
            student: a module, such as an adapted model.
            teacher: the model to learn from; call it without gradients on the same images.
            pairs: the qualified name of a block of the student (in the user's model, if it is adapted) and that of the
                teacher's block. A block returns a tensor [batch, tokens, width], or a tuple with it in front.
            width: the width of the student's states.
            teacher_width: that of the teacher's.

        Raises:
            ConfigError: there is no pair, or no submodule of a name.
        """
        super().__init__()
        if not pairs:
            raise ConfigError(
                "BlockDistillation(pairs={}): expected a teacher's block for at least one block, by names"
            )
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, teacher_width, bias=False)) for _ in pairs
        )
        self._seen: dict[tuple[str, str], Tensor] = {}
        self._pairs = dict(pairs)
        inner = getattr(student, "module", student)
        watched = {("student", name): _find(inner, name, "student") for name in pairs}
        watched |= {("teacher", name): _find(teacher, name, "teacher") for name in pairs.values()}
        self._handles = [module.register_forward_hook(self._make_hook(key)) for key, module in watched.items()]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _make_hook(self, key: tuple[str, str]) -> Any:
        def note(module: nn.Module, args: Any, result: Any) -> None:
            self._seen[key] = result[0] if isinstance(result, tuple) else result

        return note

    def forward(self, mask: Tensor) -> Tensor:
        """The loss of the last calls of both models, from 0 to 2.

        Args:
            mask: [batch, tokens] of bool, the student's tokens that are compared; in each example as many as the
                teacher has tokens, in the same order.

        Raises:
            ConfigError: a block was not called, or the numbers of tokens differ.
        """
        losses = []
        for head, (name, other) in zip(self.heads, self._pairs.items(), strict=True):
            own, wanted = self._seen.get(("student", name)), self._seen.get(("teacher", other))
            if own is None or wanted is None:
                missing = f"the student's {name}" if own is None else f"the teacher's {other}"
                raise ConfigError(
                    f"BlockDistillation: {missing} was not called, expected a call; call both models first"
                )
            chosen, target = own[mask.bool()], wanted.detach().flatten(0, 1)
            if len(chosen) != len(target):
                raise ConfigError(
                    f"BlockDistillation: the mask chooses {len(chosen)} tokens of {name}, {other} of the teacher has "
                    f"{len(target)}; expected as many; mask the image tokens only"
                )
            losses.append(1 - functional.cosine_similarity(head(chosen), target, dim=-1).mean())
        self._seen.clear()
        return torch.stack(losses).mean()


def _find(module: nn.Module, name: str, whose: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(
            f"BlockDistillation(pairs=...): the {whose} has no submodule {name!r}, expected the qualified name of a "
            "block; see its named_modules()"
        ) from error
