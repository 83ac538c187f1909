"""Initial values of adapters.

To add an initializer that needs no data, write one file here with a function that returns :class:`StartingFactors`,
and add one entry to :data:`INITIALIZERS`. Initializers that need data return the same class; see
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

#: The initializers that need no data, by their name in ``AdapterConfig(init=...)``.
INITIALIZERS: Mapping[str, Initializer] = {
    "gaussian": Initializer(draw=draw_gaussian),
    "kaiming": Initializer(draw=draw_kaiming),
    "orthogonal": Initializer(draw=draw_orthogonal),
    "pissa": Initializer(draw=draw_pissa, is_shifted=True),
}


def prepare_start(plan: AdapterPlan, options: StartOptions) -> AdapterPlan:
    """The plan; where the initializer does not start at ΔW = 0, with forms that subtract the start again.

    Such a form keeps the initial factors as frozen parameters (:class:`passes.forms.OffsetForm`).
    """
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
    """Write the initial values into an adapter's parameters.

    Args:
        adapter: the plan for the site, after :func:`prepare_start`.
        parameters: the adapter's parameters by name.
        weight: the frozen weight, in its own shape.
        options: the initializer's name and options.
    """
    factors = _find(adapter, options).draw(adapter, widen(weight, adapter), options) if adapter.rank else None
    write_start(adapter, parameters, weight, factors)


def _find(adapter: PlannedAdapter, options: StartOptions) -> Initializer:
    """The initializer that the options name, or the form's default."""
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
