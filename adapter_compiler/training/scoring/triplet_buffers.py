"""Triplet buffers: values, gradients and statistics of all triplets of a rank budget.

Elementwise operations are foreach kernels over lists of tensors. If the adapter parameters are views of flat buffers, a
list has one buffer for each dtype and device, so that the number of kernels does not depend on the number of sites.
Otherwise a list has one tensor for each parameter. Reductions run over stacks [n, …] of equal shapes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from adapter_compiler.adapters.parameters.adapter_parameters import TRIPLETS, AdapterParameters
from adapter_compiler.adapters.parameters.flat_buffers import FlatLayout, Key
from adapter_compiler.adapters.parameters.sharded import gather_full
from passes.compat import foreach_copy_, foreach_zero_


class StackView(Protocol):
    """Parameters of one name and shape; see :class:`adapter_compiler.adapters.parameters.flat_buffers.Stack`."""

    @property
    def name(self) -> str:
        """The name of the parameters in their adapters."""

    @property
    def keys(self) -> tuple[Key, ...]:
        """The parameters, in order."""

    def view(self, buffers: Sequence[torch.Tensor]) -> torch.Tensor:
        """A view [n, …] of the stack in these buffers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LooseStack:
    """A parameter with its own memory, as a stack of one."""

    name: str
    buffer: int
    keys: tuple[Key, ...]

    def view(self, buffers: Sequence[torch.Tensor]) -> torch.Tensor:
        """A view [1, …] of the parameter in these buffers."""
        return buffers[self.buffer].unsqueeze(0)


class TripletBuffers:
    """The parameters P, λ and Q of all sites that a budget prunes.

    Attributes:
        parameters: the parameters by site and name, in the plan's order.
        sites: the names of the sites, in order.
        shapes: the shape of λ by site.
        values: the buffers with the values of the parameters.
        stacks: the positions of the parameters in ``values`` and in every list from :meth:`allocate`.
        is_flat: whether several parameters share a buffer.
    """

    stacks: tuple[StackView, ...]

    def __init__(self, adapter_parameters: AdapterParameters) -> None:
        """Use the present memory of the adapter parameters; :meth:`is_current` tells whether it has changed since."""
        families = adapter_parameters.families
        self.parameters = {k: p for k, p in adapter_parameters.keyed_parameters.items() if families[k] == TRIPLETS}
        self.sites = tuple(dict.fromkeys(site for site, _ in self.parameters))
        # Compaction changes the shapes of the parameters, and the old ones are still needed afterwards.
        self.shapes = {site: self.parameters[site, "lam"].shape for site in self.sites}
        self._adapter_parameters = adapter_parameters
        flat = adapter_parameters.flat
        self._layout: FlatLayout | None = flat[0] if flat else None
        self.is_flat = flat is not None
        if flat is None:
            self.values = [p.detach() for p in self.parameters.values()]
            self.stacks = tuple(LooseStack(name=key[1], buffer=i, keys=(key,)) for i, key in enumerate(self.parameters))
            self._indices = self._index_stacks()
            self._gradients, self._gradient_views = [], {}
            return
        layout, buffers = flat
        self._triplet_layout = layout.select(TRIPLETS)
        self.values = [b for b, described in zip(buffers, layout.buffers, strict=True) if described.family == TRIPLETS]
        self.stacks = self._triplet_layout.stacks
        self._indices = self._index_stacks()
        self._gradients = self._triplet_layout.allocate()
        self._gradient_views = self._triplet_layout.views(self._gradients)

    @property
    def sizes(self) -> list[int]:
        """The number of triplets of each site, in the order of :attr:`sites`."""
        return [self.shapes[site].numel() for site in self.sites]

    @property
    def device(self) -> torch.device:
        """The device of vectors over all triplets."""
        return next(iter(self.parameters.values())).device

    def sum_triplets(self, buffers: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sums s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij) (AdaLoRA, eq. 8).

        Args:
            buffers: s of every element.

        Returns:
            [n], over the triplets of all sites in order, in float64 if the device supports it.
        """
        lam, columns, rows = self._reduce_triplets(buffers, torch.mean)
        return lam + columns + rows

    def measure_triplets(self) -> torch.Tensor:
        """The norms ‖λ_i p_i q_i‖_F = |λ_i| ‖p_i‖ ‖q_i‖ of the present values, [n], as in :meth:`sum_triplets`."""
        lam, columns, rows = self._reduce_triplets(self.values, torch.linalg.vector_norm)
        return lam.abs() * columns * rows

    def _reduce_triplets(
        self, buffers: Sequence[torch.Tensor], reduce: Callable[..., torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """For each triplet: the element of λ, and the reductions of its column of P and of its row of Q; each [n]."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        found = {name: torch.zeros(sum(self.sizes), dtype=dtype, device=self.device) for name in ("lam", "P", "Q")}
        for stack, index in zip(self.stacks, self._indices, strict=True):
            part = stack.view(buffers)
            if stack.name != "lam":
                part = reduce(
                    part, dim=-2 if stack.name == "P" else -1, dtype=torch.promote_types(part.dtype, torch.float32)
                )
            found[stack.name].index_add_(0, index, gather_full(part).reshape(-1).to(dtype))
        return tuple(found.values())

    def split_lam(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """Split a vector over all triplets into tensors with the shapes of those of :meth:`lam`."""
        parts = dict(zip(self.sites, vector.split(self.sizes), strict=True))
        joined = [torch.cat([parts[site] for site in sites]) for sites in self.lam_sites]
        lam = self.lam(self.values)
        return [part.to(one.device).reshape(one.shape) for part, one in zip(joined, lam, strict=True)]

    def join_lam(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join tensors with the shapes of those of :meth:`lam` to a vector over all triplets."""
        sizes = dict(zip(self.sites, self.sizes, strict=True))
        parts: dict[str, torch.Tensor] = {}
        for sites, tensor in zip(self.lam_sites, tensors, strict=True):
            whole = gather_full(tensor).reshape(-1)
            parts.update(zip(sites, whole.split([sizes[site] for site in sites]), strict=True))
        return torch.cat([parts[site].to(self.device) for site in self.sites])

    def is_current(self) -> bool:
        """Whether the adapter parameters still have the memory that they had when this object was made."""
        flat = self._adapter_parameters.flat
        if flat is not None:
            return flat[0] is self._layout
        present = self._adapter_parameters.keyed_parameters
        return not self.is_flat and all(self.parameters.get(key, p) is p for key, p in present.items())

    def allocate(self) -> list[torch.Tensor]:
        """Buffers of zeros with the layout of :attr:`values`, in at least float32.

        Ī·Ū has the magnitude of (w · ∂L/∂w)², which half precision would round to zero, and then all scores would be
        equal.
        """
        return [torch.zeros_like(v, dtype=torch.promote_types(v.dtype, torch.float32)) for v in self.values]

    def views(self, buffers: Sequence[torch.Tensor]) -> dict[Key, torch.Tensor]:
        """A view of the buffers for each parameter."""
        if self.is_flat:
            return self._triplet_layout.views(buffers)
        return dict(zip(self.parameters, buffers, strict=True))

    def lam(self, buffers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The λ parts of the buffers: one tensor for each buffer if they are flat, else one for each site."""
        if self.is_flat:
            return [b[: described.lam] for b, described in zip(buffers, self._triplet_layout.buffers, strict=True)]
        return [b for b, key in zip(buffers, self.parameters, strict=True) if key[1] == "lam"]

    @property
    def lam_sites(self) -> list[tuple[str, ...]]:
        """The sites whose λ are in each tensor of :meth:`lam`, in order."""
        if not self.is_flat:
            return [(site,) for site in self.sites]
        found: list[list[str]] = [[] for _ in self._triplet_layout.buffers]
        for stack in self._triplet_layout.stacks:
            if stack.name == "lam":
                found[stack.buffer] += [site for site, _ in stack.keys]
        return [tuple(sites) for sites in found]

    @torch.no_grad()
    def gather_gradients(self) -> list[torch.Tensor]:
        """The gradients as buffers, with zeros for a parameter without gradient.

        Call :meth:`scatter_gradients` to write changes of the buffers back to the gradients.
        """
        if not self.is_flat:
            parameters = self.parameters.values()
            return [torch.zeros_like(p) if p.grad is None else p.grad.to(p.dtype) for p in parameters]
        found = [(self._gradient_views[k], p.grad) for k, p in self.parameters.items() if p.grad is not None]
        if len(found) < len(self.parameters):
            foreach_zero_(self._gradients)
        if found:
            views, gradients = zip(*found, strict=True)
            foreach_copy_(views, gradients)
        return self._gradients

    @torch.no_grad()
    def scatter_gradients(self, buffers: Sequence[torch.Tensor], names: tuple[str, ...] = ("P", "lam", "Q")) -> None:
        """Write buffers from :meth:`gather_gradients` back to the parameters of these names that have a gradient."""
        views = self._gradient_views if buffers is self._gradients else self.views(buffers)
        found = [(p.grad, views[k]) for k, p in self.parameters.items() if p.grad is not None and k[1] in names]
        if not self.is_flat:
            # Most sources are the gradients themselves, and DTensors have no foreach copy.
            for gradient, source in found:
                if gradient is not source:
                    gradient.copy_(source)
        elif found:
            gradients, sources = zip(*found, strict=True)
            foreach_copy_(gradients, sources)

    def _index_stacks(self) -> list[torch.Tensor]:
        """For each stack, the indices of its triplets in a vector over all triplets."""
        sizes = dict(zip(self.sites, self.sizes, strict=True))
        starts = dict(zip(self.sites, itertools.accumulate([0, *self.sizes]), strict=False))
        return [
            torch.cat([torch.arange(starts[site], starts[site] + sizes[site]) for site, _ in stack.keys]).to(
                self.device
            )
            for stack in self.stacks
        ]
