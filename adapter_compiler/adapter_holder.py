"""The part of an adapted model that holds adapters by name, of which one is active."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from adapter_compiler import named_adapters
from adapter_compiler.combining import combine_adapters
from adapter_compiler.named_adapters import FIRST_NAME, AdapterSet
from adapter_compiler.store import AdapterStore
from passes.plan import AdapterPlan

if TYPE_CHECKING:
    from adapter_compiler.adapted import AdaptedModel
    from adapter_compiler.config import AdapterConfig


class AdapterHolder(nn.Module):
    """Base of :class:`~adapter_compiler.adapted.AdaptedModel`: add, switch, combine and remove adapters.

    In the state dict the first adapter stands under ``adapters``, the others under ``adapter_set.stores.<name>``,
    whichever is active; fully trained parameters and persistent buffers of resting adapters under
    ``adapter_set.resting.<name>``.

    Attributes:
        module: the user's module.
        adapter_set: the adapters beside the first, and which one is active.
    """

    def __init__(self, module: nn.Module, plan: AdapterPlan, store: AdapterStore) -> None:
        """Hold one adapter, which is active."""
        super().__init__()
        self.module = module
        self._modules["adapters"] = store  # the attribute of this name is the active adapter
        self.adapter_set = AdapterSet(plan)

    @property
    def adapters(self) -> AdapterStore:
        """The active adapter's parameters, ``<weight's name>.{P, lam, Q}``."""
        return self.store_of(self.active_adapter)

    @property
    def plan(self) -> AdapterPlan:
        """Which site has which adapter, in the active one."""
        return self.adapter_set.plans[self.active_adapter]

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that calls run with; ``"default"`` is the one the model was compiled with."""
        return self.adapter_set.active

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of all adapters, in the order in which they came."""
        return tuple(self.adapter_set.plans)

    def store_of(self, name: str) -> AdapterStore:
        """The parameters of the adapter of this name."""
        self.adapter_set.assert_known(name)
        store = self._modules["adapters"] if name == FIRST_NAME else self.adapter_set.stores._modules[name]
        assert isinstance(store, AdapterStore)
        return store

    def add_adapter(self, name: str, *, config: AdapterConfig | None = None, plan: AdapterPlan | None = None) -> None:
        """Add a fresh adapter over the same frozen weights; it rests until :meth:`use` names it.

        Args:
            name: what to call it, without ``.`` and ``/``.
            config: sites, rank and the like; by default those the model was compiled with. What concerns graphs
                and ``trainable`` stays as compiled.
            plan: the adapters themselves, in place of ``config``.

        Raises:
            ConfigError: the name is taken or cannot be one.
            SiteError: nothing is adapted, or the plan does not fit the model.
        """
        named_adapters.add_adapter(self._model, name, config=config, plan=plan)

    def load_adapter(self, name: str, directory: str | Path) -> None:
        """Add an adapter, which rests, from a folder that :meth:`save` or PEFT's ``save_pretrained`` wrote.

        Its ranks, scales and sites may be other than those of the adapters there are.

        Raises:
            ConfigError: the name is taken or cannot be one.
            CheckpointError: the folder cannot be read or belongs to another model.
        """
        named_adapters.load_adapter(self._model, name, directory)

    def use(self, name: str) -> None:
        """Let calls, training, ``fold`` and ``save`` work with the adapter of this name from now on.

        Only the active adapter requires grad. Fully trained parameters and persistent buffers get the values that
        they had when this adapter was last active; their gradients go. Optimizers hold the adapters that they were
        made with: make one for each, from ``trainable_parameters()`` while its adapter is active.

        Raises:
            ConfigError: there is no such adapter.
        """
        named_adapters.use_adapter(self._model, name)

    def remove_adapter(self, name: str) -> None:
        """Forget a resting adapter.

        Raises:
            ConfigError: there is no such adapter, or it is the active one.
        """
        named_adapters.remove_adapter(self._model, name)

    def combine(
        self, weights: Mapping[str, float], *, name: str, rank: int | None = None, rest_from: str | None = None
    ) -> None:
        """Add the adapter Σ w_i ΔW_i, which rests, from adapters there are.

        Args:
            weights: w_i by adapter; they need not sum to 1.
            name: what to call the sum.
            rank: by default the sum is exact, with the triplets of all summands; otherwise each weight gets the best
                approximation of at most this rank.
            rest_from: the adapter whose fully trained parameters and buffers the sum has; needed only if they differ.

        Raises:
            ConfigError: a name or weight cannot be used, or an update depends on the frozen weight (DoRA).
        """
        combine_adapters(self._model, weights, name=name, rank=rank, rest_from=rest_from)

    def _adopt(self, plan: AdapterPlan, store: AdapterStore | None) -> None:
        """Make these the plan and, if given, the parameters of the active adapter."""
        self.adapter_set.plans[self.active_adapter] = plan
        if store is not None and self.active_adapter == FIRST_NAME:
            self._modules["adapters"] = store
        elif store is not None:
            self.adapter_set.stores._modules[self.active_adapter] = store

    @property
    def _model(self) -> AdaptedModel:
        return cast("AdaptedModel", self)
