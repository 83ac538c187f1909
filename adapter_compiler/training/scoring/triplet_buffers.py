"""What a rank budget works on: values, gradients and statistics of all triplets, in few tensors or many.

Everything elementwise is written with foreach kernels over lists of tensors. Where the parameters are flat the lists
hold one buffer a dtype and device, so that the number of kernels does not grow with the number of sites;
where it is not, they hold one tensor a parameter. Reductions run over stacks [n, …] of equal shapes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from adapter_compiler.adapters.parameters.adapter_parameters import TRIPLETS, AdapterParameters
from adapter_compiler.adapters.parameters.flat_buffers import FlatLayout, Key
from adapter_compiler.training.scoring.distributed import gather_full


class StackView(Protocol):
    """Parameters of one name and shape; see :class:`adapter_compiler.adapters.parameters.flat_buffers.Stack`."""

    @property
    def name(self) -> str:
        """The parameters' name."""

    @property
    def keys(self) -> tuple[Key, ...]:
        """Which parameters."""

    def view(self, buffers: Sequence[torch.Tensor]) -> torch.Tensor:
        """The stack [n, …] in these buffers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LooseStack:
    """A parameter that shares its memory with no other, as a stack of one."""

    name: str
    buffer: int
    keys: tuple[Key, ...]

    def view(self, buffers: Sequence[torch.Tensor]) -> torch.Tensor:
        """[1, …]."""
        return buffers[self.buffer].unsqueeze(0)


class TripletBuffers:
    """The parameters P, λ and Q of all sites that a budget prunes.

    Attributes:
        parameters: by site and name, in the plan's order.
        sites: the names of the sites, in order.
        shapes: the shape of λ by site.
        values: the buffers that hold them.
        stacks: what stands where in any list of buffers from :meth:`allocate`.
        is_flat: whether the buffers are shared.
    """

    stacks: tuple[StackView, ...]

    def __init__(self, adapter_parameters: AdapterParameters) -> None:
        """The triplets of the adapter parameters as they are now; see :meth:`is_current`."""
        families = adapter_parameters.families
        self.parameters = {k: p for k, p in adapter_parameters.keyed_parameters.items() if families[k] == TRIPLETS}
        self.sites = tuple(dict.fromkeys(site for site, _ in self.parameters))
        # Compaction changes the parameters under a triplets, which must still be able to say how it was.
        self.shapes = {site: self.parameters[site, "lam"].shape for site in self.sites}
        self._store = adapter_parameters
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
        self._own = layout.select(TRIPLETS)
        self.values = [b for b, described in zip(buffers, layout.buffers, strict=True) if described.family == TRIPLETS]
        self.stacks = self._own.stacks
        self._indices = self._index_stacks()
        self._gradients = self._own.allocate()
        self._gradient_views = self._own.views(self._gradients)

    @property
    def sizes(self) -> list[int]:
        """How many triplets each site has, in the order of :attr:`sites`."""
        return [self.shapes[site].numel() for site in self.sites]

    @property
    def device(self) -> torch.device:
        """Where vectors over all triplets live."""
        return next(iter(self.parameters.values())).device

    def sum_triplets(self, buffers: Sequence[torch.Tensor]) -> torch.Tensor:
        """s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij) from buffers that hold s of every element.

        Returns:
            [n triplets] over all sites in order, in float64 where the device has it.
        """
        lam, columns, rows = self._reduce_triplets(buffers, torch.mean)
        return lam + columns + rows

    def measure_triplets(self) -> torch.Tensor:
        """‖λ_i p_i q_i‖_F = |λ_i| ‖p_i‖ ‖q_i‖ of the present values, [n triplets] like :meth:`sum_triplets`."""
        lam, columns, rows = self._reduce_triplets(self.values, torch.linalg.vector_norm)
        return lam.abs() * columns * rows

    def _reduce_triplets(
        self, buffers: Sequence[torch.Tensor], reduce: Callable[..., torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """What stands for λ_i, and what stands for the columns of P and the rows of Q reduced to numbers."""
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
        """A vector over all triplets as tensors like those of :meth:`lam`."""
        parts = dict(zip(self.sites, vector.split(self.sizes), strict=True))
        joined = [torch.cat([parts[site] for site in sites]) for sites in self.lam_sites]
        lam = self.lam(self.values)
        return [part.to(one.device).reshape(one.shape) for part, one in zip(joined, lam, strict=True)]

    def join_lam(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tensors like those of :meth:`lam` as a vector over all triplets."""
        sizes = dict(zip(self.sites, self.sizes, strict=True))
        parts: dict[str, torch.Tensor] = {}
        for sites, tensor in zip(self.lam_sites, tensors, strict=True):
            whole = gather_full(tensor).reshape(-1)
            parts.update(zip(sites, whole.split([sizes[site] for site in sites]), strict=True))
        return torch.cat([parts[site].to(self.device) for site in self.sites])

    def is_current(self) -> bool:
        """Whether the adapter parameters are still those that the buffers were made of."""
        flat = self._store.flat
        if flat is not None:
            return flat[0] is self._layout
        mine = self.parameters
        same = all(mine.get(k, p) is p for k, p in self._store.keyed_parameters.items())
        return not self.is_flat and same

    def allocate(self) -> list[torch.Tensor]:
        """Buffers of zeros like those of the values, in float32 or better.

        Ī·U has the magnitude of (w · ∂L/∂w)², which half precision would round to zero, and then every triplet ties.
        """
        return [torch.zeros_like(v, dtype=torch.promote_types(v.dtype, torch.float32)) for v in self.values]

    def views(self, buffers: Sequence[torch.Tensor]) -> dict[Key, torch.Tensor]:
        """Each parameter's part of the buffers."""
        if self.is_flat:
            return self._own.views(buffers)
        return dict(zip(self.parameters, buffers, strict=True))

    def lam(self, buffers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The λ parts of the buffers: one tensor a buffer if they are shared, else one a site."""
        if self.is_flat:
            return [b[: described.lam] for b, described in zip(buffers, self._own.buffers, strict=True)]
        return [b for b, key in zip(buffers, self.parameters, strict=True) if key[1] == "lam"]

    @property
    def lam_sites(self) -> list[tuple[str, ...]]:
        """The sites whose λ stand in each tensor of :meth:`lam`, in order."""
        if not self.is_flat:
            return [(site,) for site in self.sites]
        found: list[list[str]] = [[] for _ in self._own.buffers]
        for stack in self._own.stacks:
            if stack.name == "lam":
                found[stack.buffer] += [site for site, _ in stack.keys]
        return [tuple(sites) for sites in found]

    @torch.no_grad()
    def gather_gradients(self) -> list[torch.Tensor]:
        """The gradients as buffers; a parameter without gradient has zeros.

        What is written to them reaches the parameters by :meth:`scatter_gradients`.
        """
        if not self.is_flat:
            parameters = self.parameters.values()
            return [torch.zeros_like(p) if p.grad is None else p.grad.to(p.dtype) for p in parameters]
        found = [(self._gradient_views[k], p.grad) for k, p in self.parameters.items() if p.grad is not None]
        if len(found) < len(self.parameters):
            torch._foreach_zero_(self._gradients)
        if found:
            views, gradients = zip(*found, strict=True)
            torch._foreach_copy_(views, gradients)
        return self._gradients

    @torch.no_grad()
    def scatter_gradients(self, buffers: Sequence[torch.Tensor], names: tuple[str, ...] = ("P", "lam", "Q")) -> None:
        """Write buffers from :meth:`gather_gradients` back to the parameters of these names that have a gradient."""
        views = self._gradient_views if buffers is self._gradients else self.views(buffers)
        found = [(p.grad, views[k]) for k, p in self.parameters.items() if p.grad is not None and k[1] in names]
        if not self.is_flat:
            # Most are the gradients themselves, and DTensors have no foreach copy.
            for gradient, source in found:
                if gradient is not source:
                    gradient.copy_(source)
        elif found:
            gradients, sources = zip(*found, strict=True)
            torch._foreach_copy_(gradients, sources)

    def _index_stacks(self) -> list[torch.Tensor]:
        """For each stack, where its triplets stand in a vector over all triplets."""
        sizes = dict(zip(self.sites, self.sizes, strict=True))
        starts = dict(zip(self.sites, itertools.accumulate([0, *self.sizes]), strict=False))
        return [
            torch.cat([torch.arange(starts[site], starts[site] + sizes[site]) for site, _ in stack.keys]).to(
                self.device
            )
            for stack in self.stacks
        ]
