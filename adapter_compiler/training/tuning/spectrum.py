"""The spectrum of ΔW over all weights, and adapters that are cut to its largest parts.

With P = U_P R_P and Qᵀ = U_Q R_Q, the singular values of P diag(λ) Q are those of the r × r matrix R_P diag(λ) R_Qᵀ,
so no matrix of a weight's size is made. By Eckart and Young, the cut that changes ΔW least keeps the largest singular
values. Weights have different sizes, so parts are ranked by σ² / (d1 + d2): what a part adds to ‖ΔW‖² for each value
that it takes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import torch

from adapter_compiler.adapters.combine import Triplets, compress_triplets
from adapter_compiler.adapters.named_adapters import add_inactive, fill_parameters, find_module_tensors
from adapter_compiler.adapters.parameters.factors import factor_triplets
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from passes.forms import LoraForm, SvdForm
from passes.planning.plan import AdapterPlan, PlannedAdapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectrum:
    """ΔW of every site as a singular value decomposition.

    Attributes:
        triplets: by site, U [out, r], the singular values of ΔW [r] in descending order (the scale is in them), and
            Vᵀ [r, in]; in float64.
        order: pairs of site and position, the part that adds most for its size first. Parts without size are left out.
    """

    triplets: Mapping[str, Triplets]
    order: tuple[tuple[str, int], ...]

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """The singular values of ΔW by site, in descending order."""
        return {site: found[1] for site, found in self.triplets.items()}

    def ranks(self, count: int) -> dict[str, int]:
        """The rank of each site if only the first ``count`` parts are kept."""
        found = dict.fromkeys(self.triplets, 0)
        for site, _ in self.order[:count]:
            found[site] += 1
        return found


def find_spectrum(adapted: AdaptedModel) -> Spectrum:
    """The spectrum of the active adapter.

    Raises:
        ConfigError: a site has a form whose update is not a product of two matrices that are added to the weight.
    """
    triplets: dict[str, Triplets] = {}
    found: list[tuple[float, str, int]] = []
    for adapter in adapted.plan:
        name = adapter.site.name
        P, lam, Q = factor_triplets(_assert_can_cut(adapter), adapted.adapters.parameters_of(adapter))
        U, values, Vh = compress_triplets((P, lam * adapter.scale, Q), len(lam))
        triplets[name] = (U, values, Vh)
        cost = adapter.site.out_features + adapter.site.in_features
        least = torch.finfo(adapter.dtype).eps * float(values[:1].sum())
        found += [(float(v) ** 2 / cost, name, i) for i, v in enumerate(values.tolist()) if v > least]
    found.sort(key=lambda part: -part[0])
    return Spectrum(triplets=triplets, order=tuple((name, i) for _, name, i in found))


def add_cut_adapter(adapted: AdaptedModel, name: str, spectrum: Spectrum, ranks: Mapping[str, int]) -> None:
    """Add an inactive adapter with the largest singular triplets of each site; sites of rank 0 get none.

    The left factor carries the singular values, λ = 1, and the right factor is orthonormal, as in a default start.
    Fully trained parameters and buffers are those of the active adapter.

    Args:
        adapted: the model.
        name: the name of the new adapter, which must be free.
        spectrum: the spectrum of the active adapter.
        ranks: the rank of each site.

    Raises:
        ConfigError: no site has a rank.
    """
    plan = AdapterPlan(adapters=tuple(_cut(a, ranks[a.site.name]) for a in adapted.plan if ranks[a.site.name]))
    if not plan.adapters:
        raise ConfigError(f"adapter {name!r} would have no site, expected a rank of at least 1 at one of them")
    values = {adapter.site.name: _fill(adapter, spectrum.triplets[adapter.site.name]) for adapter in plan}
    fill_parameters(add_inactive(adapted, name, plan, find_module_tensors(adapted)), plan, values)


def count_values(plan: AdapterPlan) -> int:
    """The number of values of all adapters in a plan."""
    sites = [(adapter, adapter.site) for adapter in plan]
    shapes = [a.form.parameter_shapes(s.out_features, s.in_features, a.rank).values() for a, s in sites]
    return sum(torch.Size(shape).numel() for shape in itertools.chain.from_iterable(shapes))


def _assert_can_cut(adapter: PlannedAdapter) -> PlannedAdapter:
    shapes = adapter.form.parameter_shapes(adapter.site.out_features, adapter.site.in_features, 1).values()
    if adapter.form.rescales or adapter.form.is_routed or any(len(shape) > 2 for shape in shapes):
        raise ConfigError(
            f"site {adapter.site.name} has the form {adapter.form.name!r}, whose update cannot be cut by its singular "
            "values; expected a form that adds a product of two matrices to the weight (svd, lora)"
        )
    return adapter


def _cut(adapter: PlannedAdapter, rank: int) -> PlannedAdapter:
    form = adapter.form if type(adapter.form) is LoraForm else SvdForm()
    return dataclasses.replace(adapter, form=form, rank=rank)


def _fill(adapter: PlannedAdapter, triplets: Triplets) -> dict[str, torch.Tensor]:
    rank = adapter.rank
    P, Q = triplets[0][:, :rank] * (triplets[1][:rank] / adapter.scale), triplets[2][:rank]
    return {"B": P, "A": Q} if type(adapter.form) is LoraForm else {"P": P, "lam": torch.ones(rank), "Q": Q}
