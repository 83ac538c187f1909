"""Compare the roles found in a model's graphs with those that its names give."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from adapter_compiler.model.capture.weight_use_analysis import analyze_weight_uses
from passes.analysis.roles import find_roles
from tests.zoo.entry import ZooEntry
from tests.zoo.role_names import find_named_role


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleScore:
    """One architecture: the role of each used weight, and where it is not what the name says."""

    name: str
    roles: Mapping[str, str]
    known: int
    wrong: Mapping[str, tuple[str, str]]

    @property
    def right(self) -> int:
        """Weights whose role is the one that the name gives."""
        return self.known - len(self.wrong)

    @property
    def silent(self) -> int:
        """Weights whose name does not say what they are for."""
        return len(self.roles) - self.known


def score_roles(entry: ZooEntry) -> RoleScore:
    """Build and record an entry in eval mode, and compare."""
    torch.manual_seed(0)
    model = entry.build().eval()
    args, kwargs = entry.example()
    roles = find_roles(analyze_weight_uses(model, args, kwargs))
    named = {name: role for name in roles if (role := find_named_role(name)) is not None}
    wrong = {name: (roles[name], role) for name, role in named.items() if roles[name] != role}
    return RoleScore(name=entry.name, roles=roles, known=len(named), wrong=wrong)
