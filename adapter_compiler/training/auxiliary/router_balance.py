"""Keep the experts of a mixture in use: the load-balancing loss of the Switch Transformer, and what routers choose.

For N experts and the T tokens of a call (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6),

    loss = N Σᵢ fᵢ Pᵢ      fᵢ = 1/T Σₜ 1[token t goes to expert i]      Pᵢ = 1/T Σₜ pᵢ(xₜ)

It is 1 if all experts are used alike. It is never part of the loss that the user computes: its gradient for the routers
is added in a hook on the optimizer step, as the regularizer of a rank budget is. Under top-k routing a token counts
as 1/k at each of its experts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from adapter_compiler.adapters.parameters.sharded import replicate_like
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.budget.stepping.rounds import StepRounds
from adapter_compiler.training.budget.stepping.wrappers import find_optimizers, unwrap_model
from passes.forms.routed import ROUTER, MixtureForm
from passes.planning.json_schema import is_finite


def load_balancing_loss(probabilities: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """N Σᵢ fᵢ Pᵢ, a scalar that is differentiable in the probabilities.

    Args:
        probabilities: p, [..., N], of the router for each token.
        chosen: 1 where a token goes to an expert, else 0, [..., N]; every token has equally many.
    """
    experts = probabilities.shape[-1]
    p, c = probabilities.reshape(-1, experts), chosen.reshape(-1, experts).to(probabilities.dtype)
    return experts * (c.sum(0) / c.sum() * p.mean(0)).sum()


@dataclasses.dataclass
class _Seen:
    """Sums over the calls since the last step, for one router."""

    loss: torch.Tensor
    gradient: torch.Tensor
    shares: torch.Tensor
    calls: int = 1

    def add(self, other: _Seen) -> None:
        self.loss = self.loss + other.loss
        self.gradient = self.gradient + other.gradient
        self.shares = self.shares + other.shares
        self.calls += 1


class RouterBalance:
    """Adds the gradient of the load-balancing loss to the routers before each optimizer step.

    The loss is averaged over the calls since the last step, in a process group those of all processes, and summed over
    the routers. Only routers get its gradient: the inputs of a router count as constants.

    Attributes:
        weight: α, by which the loss is multiplied.
        loss: the loss at the last step, by the name of the router's site, without α; that of this process's calls.
        shares: fᵢ at the last step, by the name of the router's site; that of this process's calls.
    """

    def __init__(self, adapted: nn.Module, optimizer: Any, *, weight: float = 0.01) -> None:
        """Register a hook on the optimizer steps, and record what routers choose in calls with gradients.

        Args:
            adapted: the result of ``compile_with_adapters`` with ``AdapterConfig(mixture=...)``, also inside DDP.
            optimizer: the optimizer that trains it, also inside wrappers, or a list of optimizers.
            weight: α; the paper uses 0.01.

        Raises:
            ConfigError: a value cannot work, or the active adapter has no router.
        """
        if not is_finite(weight) or weight < 0:
            raise ConfigError(f"RouterBalance(weight={weight!r}): expected a finite number of at least 0, such as 0.01")
        self.weight = weight
        found = unwrap_model(adapted, AdaptedModel)
        if not isinstance(found, AdaptedModel):
            raise ConfigError(
                f"RouterBalance(adapted=...) is a {type(found).__name__}, expected AdaptedModel; give what "
                "compile_with_adapters returned"
            )
        self.loss: Mapping[str, float] = {}
        self.shares: Mapping[str, tuple[float, ...]] = {}
        self._seen: dict[str, _Seen] = {}
        self._adapted = found
        self._adapter = found.active_adapter
        self._routers = _find_routers(found, "RouterBalance")
        found.record_routing(self._note)
        self._rounds = StepRounds(
            find_optimizers(optimizer), begin=lambda: None, take=self._add_gradients, end=self._seen.clear
        )

    def detach(self) -> None:
        """Remove the hook, and record nothing any more."""
        self._rounds.detach()
        self._adapted.record_routing(None)

    def _note(
        self, site: str, x: torch.Tensor, router: torch.Tensor, probabilities: torch.Tensor, chosen: torch.Tensor
    ) -> None:
        if not (self._adapted.training and torch.is_grad_enabled()):
            return
        with torch.no_grad():
            seen = _measure(x, router, probabilities, chosen)
        if site in self._seen:
            self._seen[site].add(seen)
        else:
            self._seen[site] = seen

    @torch.no_grad()
    def _add_gradients(self, scale: float | None) -> None:
        """Add α times the mean gradient of the calls; with ``scale``, gradients are multiplied by it."""
        if self._adapted.active_adapter != self._adapter:
            raise ConfigError(
                f"this RouterBalance belongs to the adapter {self._adapter!r}, but {self._adapted.active_adapter!r} is "
                f"active; expected the same; call use({self._adapter!r}) before the step, or detach()"
            )
        factor = self.weight * (1.0 if scale is None else scale)
        self.loss = {site: float(seen.loss) / seen.calls for site, seen in self._seen.items()}
        self.shares = {site: tuple((seen.shares / seen.calls).tolist()) for site, seen in self._seen.items()}
        for site, router in self._routers.items():
            if not router.requires_grad:
                continue
            gradient = self._average(site, router)
            if gradient is None:
                continue
            gradient = replicate_like((gradient * factor).to(router.dtype), router)
            router.grad = gradient if router.grad is None else router.grad.add_(gradient)

    def _average(self, site: str, router: torch.Tensor) -> torch.Tensor | None:
        """The mean gradient of the calls since the last step, of all processes; ``None`` if none has run the router."""
        seen = self._seen.get(site)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None if seen is None else seen.gradient / seen.calls
        dtype = torch.promote_types(router.dtype, torch.float32)
        own = torch.zeros(router.shape, dtype=dtype, device=router.device) if seen is None else seen.gradient.to(dtype)
        # Every process takes part, also one whose calls have not run the router.
        total = torch.cat([own.flatten(), own.new_full((1,), 0 if seen is None else seen.calls)])
        torch.distributed.all_reduce(total)
        calls = float(total[-1])
        return total[:-1].view(own.shape) / calls if calls else None


def _measure(x: torch.Tensor, router: torch.Tensor, probabilities: torch.Tensor, chosen: torch.Tensor) -> _Seen:
    """The loss of one call, its gradient for the router, [N, in], and fᵢ.

    With p = softmax(x Wᵀ), ∂loss/∂logit_tj = N/T p_tj (f_j − Σᵢ fᵢ p_ti).
    """
    experts = probabilities.shape[-1]
    p, c = probabilities.reshape(-1, experts), chosen.reshape(-1, experts)
    shares = c.sum(0) / c.sum()
    slope = p * (shares - (p @ shares).unsqueeze(1)) * (experts / len(p))
    gradient = slope.mT @ x.reshape(-1, x.shape[-1]).to(slope.dtype)
    return _Seen(loss=load_balancing_loss(p, c), gradient=gradient, shares=shares)


def measure_routing(
    adapted: AdaptedModel, batches: Iterable[Any], call: Callable[[Any, Any], Any]
) -> dict[str, tuple[float, ...]]:
    """How much each expert is used: the mean probability of each expert over the tokens of some batches.

    Args:
        adapted: a model whose active adapter is a mixture; it runs in its present training mode, without gradients.
        batches: the batches, in the form that ``call`` takes.
        call: ``call(model, batch)`` runs one batch, such as a loss.

    Returns:
        The means by the name of the site that has the router; they sum to 1, and ``fix_routing`` takes them.

    Raises:
        ConfigError: the active adapter has no router, or there is no batch.
    """
    _find_routers(adapted, "measure_routing")
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def note(site: str, x: Any, router: Any, probabilities: torch.Tensor, chosen: Any) -> None:
        rows = probabilities.detach().reshape(-1, probabilities.shape[-1]).double()
        sums[site] = sums.get(site, torch.zeros_like(rows[0])) + rows.sum(0)
        counts[site] = counts.get(site, 0) + len(rows)

    with _recording(adapted, note), torch.no_grad():
        for batch in batches:
            call(adapted, batch)
    if not sums:
        raise ConfigError("measure_routing: no call ran a router; expected batches, and a call that runs the model")
    return {site: tuple((total / counts[site]).tolist()) for site, total in sums.items()}


@contextlib.contextmanager
def _recording(adapted: AdaptedModel, note: Callable[..., None]) -> Iterator[None]:
    before = adapted.record_routing(note)
    try:
        yield
    finally:
        adapted.record_routing(before)


def _find_routers(adapted: AdaptedModel, function: str) -> dict[str, nn.Parameter]:
    routers = {site: p for (site, name), p in adapted.adapters.keyed_parameters.items() if name == ROUTER}
    if not routers or not any(isinstance(adapter.form, MixtureForm) for adapter in adapted.plan):
        raise ConfigError(
            f"{function}: the adapter {adapted.active_adapter!r} has no router, expected a mixture of experts; compile "
            "with AdapterConfig(mixture=Mixture(...))"
        )
    return routers
