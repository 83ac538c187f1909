"""The adapters' parameters: one set that all captured graphs share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from passes.plan import AdapterPlan, PlannedAdapter


class AdapterStore(nn.Module):
    """Holds the parameters of each planned adapter under ``<weight's name>.<parameter>``.

    The nesting repeats the model's, so state-dict keys read ``encoder.0.query.weight.P``.
    """

    def __init__(self, plan: AdapterPlan, devices: Mapping[str, torch.device]) -> None:
        """Allocate the parameters, uninitialised, on the device of each weight."""
        super().__init__()
        for adapter in plan:
            owner = _make_containers(self, adapter.site.name)
            for name, shape in adapter.parameter_shapes.items():
                values = torch.empty(shape, dtype=adapter.dtype, device=devices[adapter.site.name])
                owner.register_parameter(name, nn.Parameter(values))

    def parameters_of(self, adapter: PlannedAdapter) -> dict[str, nn.Parameter]:
        """The parameters of one adapter by name."""
        owner = self.get_submodule(adapter.site.name)
        return {name: owner.get_parameter(name) for name in adapter.parameter_shapes}


def _make_containers(root: nn.Module, path: str) -> nn.Module:
    for part in path.split("."):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        child = root._modules[part]
        assert child is not None
        root = child
    return root
