"""Starting values of adapters.

A new initializer that needs no data is one file here that gives :class:`StartingFactors`, and one entry in
:data:`INITIALIZERS`. Those that look at data give the same; see
:mod:`adapter_compiler.training.calibration.start_from_data`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from adapter_compiler.adapters.initializers.base import Initializer, StartingFactors, widen, write_start
from adapter_compiler.adapters.initializers.gaussian import draw_gaussian
from adapter_compiler.adapters.initializers.kaiming import draw_kaiming
from adapter_compiler.adapters.initializers.orthogonal import draw_orthogonal
from adapter_compiler.adapters.initializers.pissa import draw_pissa
from adapter_compiler.config.start_options import PISSA_NAME, StartOptions
from passes.forms import with_offset
from passes.planning.plan import AdapterPlan, PlannedAdapter

#: The initializers that need no data, by the names that ``AdapterConfig(init=...)`` takes.
INITIALIZERS: Mapping[str, Initializer] = {
    "gaussian": Initializer(draw=draw_gaussian),
    "kaiming": Initializer(draw=draw_kaiming),
    "orthogonal": Initializer(draw=draw_orthogonal),
    "pissa": Initializer(draw=draw_pissa, is_shifted=True),
}


def prepare_start(plan: AdapterPlan, options: StartOptions) -> AdapterPlan:
    """The plan with forms that keep where they started, if the initializer does not start at ΔW = 0."""
    adapters = [
        dataclasses.replace(adapter, form=with_offset(adapter.form, adapter.rank))
        if adapter.rank and _find(adapter, options).is_shifted
        else adapter
        for adapter in plan
    ]
    return AdapterPlan(adapters=tuple(adapters))


def start_adapter(
    adapter: PlannedAdapter, parameters: Mapping[str, torch.Tensor], weight: torch.Tensor, options: StartOptions
) -> None:
    """Give an adapter its starting values.

    Args:
        adapter: the plan for the site, after :func:`prepare_start`.
        parameters: its parameters by name.
        weight: the frozen weight.
        options: which initializer.
    """
    factors = _find(adapter, options).draw(adapter, widen(weight, adapter), options) if adapter.rank else None
    write_start(adapter, parameters, weight, factors)


def _find(adapter: PlannedAdapter, options: StartOptions) -> Initializer:
    """The initializer by name, or the one that is best for the form."""
    if options.name is None:
        has_lam = "lam" in adapter.form.parameter_shapes(1, 1, 1)
        return INITIALIZERS["orthogonal" if has_lam else "kaiming"]
    return INITIALIZERS["pissa" if PISSA_NAME.match(options.name) else options.name]


__all__ = [
    "INITIALIZERS",
    "Initializer",
    "StartingFactors",
    "prepare_start",
    "start_adapter",
    "widen",
    "write_start",
]
