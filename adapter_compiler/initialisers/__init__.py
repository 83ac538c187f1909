"""Starting values of adapters.

A new initialiser that needs no data is one file here that gives :class:`StartingFactors`, and one entry in
:data:`INITIALISERS`. Those that look at data give the same and are found in :mod:`adapter_compiler.initialise`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from adapter_compiler.errors import ConfigError
from adapter_compiler.initialisers.base import Initialiser, StartingFactors, StartOptions, widen, write_start
from adapter_compiler.initialisers.gaussian import draw_gaussian
from adapter_compiler.initialisers.kaiming import draw_kaiming
from adapter_compiler.initialisers.orthogonal import draw_orthogonal
from adapter_compiler.initialisers.pissa import PISSA_NAME, draw_pissa
from passes.forms import with_offset
from passes.plan import AdapterPlan, PlannedAdapter

#: The initialisers that need no data, by the names that ``AdapterConfig(init=...)`` takes.
INITIALISERS: Mapping[str, Initialiser] = {
    "gaussian": Initialiser(draw=draw_gaussian),
    "kaiming": Initialiser(draw=draw_kaiming),
    "orthogonal": Initialiser(draw=draw_orthogonal),
    "pissa": Initialiser(draw=draw_pissa, is_shifted=True),
}

#: Those that need batches.
DATA_INITIALISERS = ("lora_ga", "gradient_svd", "eva")


def assert_known_start(name: object) -> None:
    """Raise :class:`ConfigError` unless ``AdapterConfig(init=name)`` can be done without data."""
    known = ", ".join(map(repr, INITIALISERS))
    if isinstance(name, str) and name in DATA_INITIALISERS:
        raise ConfigError(
            f"AdapterConfig(init={name!r}) needs batches, expected one of {known}; leave it out and call "
            f"initialise_adapters(adapted, {name!r}, batches, loss) on the compiled model"
        )
    if name is not None and not (isinstance(name, str) and (name in INITIALISERS or PISSA_NAME.match(name))):
        raise ConfigError(f"AdapterConfig(init={name!r}): expected one of {known}, or 'pissa_niter_4' and the like")


def prepare_start(plan: AdapterPlan, options: StartOptions) -> AdapterPlan:
    """The plan with forms that keep where they started, if the initialiser does not start at ΔW = 0."""
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
        options: which initialiser.
    """
    factors = _find(adapter, options).draw(adapter, widen(weight, adapter), options) if adapter.rank else None
    write_start(adapter, parameters, weight, factors)


def _find(adapter: PlannedAdapter, options: StartOptions) -> Initialiser:
    """The initialiser by name, or the one that is best for the form."""
    if options.name is None:
        has_lam = "lam" in adapter.form.parameter_shapes(1, 1, 1)
        return INITIALISERS["orthogonal" if has_lam else "kaiming"]
    return INITIALISERS["pissa" if PISSA_NAME.match(options.name) else options.name]


__all__ = [
    "DATA_INITIALISERS",
    "INITIALISERS",
    "Initialiser",
    "StartOptions",
    "StartingFactors",
    "assert_known_start",
    "prepare_start",
    "start_adapter",
    "widen",
    "write_start",
]
