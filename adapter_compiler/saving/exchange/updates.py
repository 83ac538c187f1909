"""The adapters of each weight as two factors that hold λ and the scale, which every run time can multiply."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch.nn import functional

from adapter_compiler.adapters.parameters.factors import factor_weight
from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.folders.saved_adapters import SavedAdapters
from adapter_compiler.saving.layer_kinds import EMBEDDING
from passes.forms.dora import MAGNITUDE
from passes.planning.plan import PlannedAdapter

_FOLD = "fold the adapters into the base with fold_files, or convert to peft"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightUpdate:
    """ΔW = L R of one weight, in float32.

    Attributes:
        weight: the weight's qualified name.
        layer: the kind of module, see :mod:`adapter_compiler.saving.layer_kinds`.
        shape: the weight's shape.
        left: L [out, r]; of an embedding [entries, r].
        right: R [r, in]; of an embedding [r, features].
        magnitude: [out], of DoRA: each row of W + ΔW is scaled to this norm.
    """

    weight: str
    layer: str
    shape: tuple[int, ...]
    left: torch.Tensor
    right: torch.Tensor
    magnitude: torch.Tensor | None = None

    @property
    def module(self) -> str:
        """The name of the module that the weight belongs to."""
        return self.weight.removesuffix(".weight")

    @property
    def rank(self) -> int:
        """r, the number of columns of L."""
        return self.left.shape[1]

    def pad(self, rank: int) -> WeightUpdate:
        """The same ΔW with more columns of L and rows of R, which are zero."""
        more = rank - self.rank
        left, right = functional.pad(self.left, (0, more)), functional.pad(self.right, (0, 0, 0, more))
        return dataclasses.replace(self, left=left, right=right)

    def delta(self) -> torch.Tensor:
        """ΔW [out, in] in float64; of an embedding [entries, features]."""
        return self.left.double() @ self.right.double()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a format can express besides ΔW of linear layers.

    Attributes:
        name: what messages call it.
        layers: the kinds of modules whose weights it takes, see :mod:`adapter_compiler.saving.layer_kinds`; ``None``
            for all.
        taken: the same in words.
        rescales: whether it has DoRA.
        ties: whether one adapter may belong to several names of a tied weight.
        trains: whether it takes what was trained besides adapters.
    """

    name: str
    layers: tuple[str, ...] | None
    taken: str
    rescales: bool = False
    ties: bool = False
    trains: bool = False


#: Those of a manifest, which can describe every adapter.
EVERYTHING = Abilities(name="a manifest", layers=None, taken="all", rescales=True, ties=True, trains=True)


def find_updates(saved: SavedAdapters, abilities: Abilities) -> list[WeightUpdate]:
    """The updates of all adapted weights, without those of rank 0.

    Raises:
        ConfigError: the format cannot express a weight's adapter, or something was trained besides; it is named.
        CheckpointError: the folder holds what is no adapter, such as single rows of an embedding.
    """
    saved.assert_plain(f"adapters for {abilities.name}")
    if not abilities.trains:
        _assert_nothing_trained_besides(saved, abilities)
    layers = {one.planned.site.weight: one.layer for one in saved.adapters.values()}
    made = []
    for weight, adapters in saved.plan.by_weight.items():
        _assert_expressible(adapters[0], layers[weight], abilities)
        made.append(_make_update(saved, adapters, layers[weight]))
    _assert_one_kind(made, abilities)
    _assert_finite(saved.path, made)
    found = [update for update in made if update.rank or update.magnitude is not None]
    if not found:
        raise ConfigError(f"{saved.path}: no triplet is alive at any site, so there is nothing to write")
    return found


def pad_to_one_rank(updates: Sequence[WeightUpdate]) -> tuple[list[WeightUpdate], int]:
    """The updates with the largest of their ranks, and that rank, which is at least 1."""
    rank = max(1, *(update.rank for update in updates))
    return [update.pad(rank) for update in updates], rank


def _assert_nothing_trained_besides(saved: SavedAdapters, abilities: Abilities) -> None:
    """Raise :class:`ConfigError` if the folder holds trained parameters or moved statistics besides adapters."""
    names = saved.trained
    known = None if names is None or names.moved is None else {*names.owners, *names.moved}
    for name, key in saved.replacements.items():
        if name in known if known is not None else saved.tensor(key).is_floating_point():
            raise ConfigError(
                f"{saved.path}: {name} was trained fully or is a statistic that moves in training, {abilities.name} "
                f"takes adapters only; {_FOLD}"
            )


def _assert_expressible(adapter: PlannedAdapter, layer: str, abilities: Abilities) -> None:
    site = adapter.site
    if site.aliases and not abilities.ties:
        raise ConfigError(
            f"site {site.name} is also {', '.join(site.aliases)}: one adapter for all names of a tied weight, but "
            f"{abilities.name} has one for each module; {_FOLD}"
        )
    if abilities.layers is not None and layer not in abilities.layers:
        raise ConfigError(
            f"site {site.name} is a weight of the kind {layer or 'unknown'!r}; {abilities.name} takes "
            f"{abilities.taken}; exclude it in training, or {_FOLD}"
        )
    if adapter.form.rescales and not abilities.rescales:
        raise ConfigError(
            f"site {site.name} has the form {adapter.form.name!r}, which rescales the weight; {abilities.name} has no "
            f"DoRA; {_FOLD}"
        )


def _make_update(saved: SavedAdapters, adapters: Sequence[PlannedAdapter], layer: str) -> WeightUpdate:
    def parameters_of(adapter: PlannedAdapter) -> Mapping[str, torch.Tensor]:
        return saved.parameters_of(adapter.site.name)

    site = adapters[0].site
    left, right = factor_weight(adapters, parameters_of)
    magnitude = parameters_of(adapters[0]).get(MAGNITUDE)
    if layer == EMBEDDING and site.transposed:
        left, right = right.t(), left.t()
    elif layer == EMBEDDING and magnitude is not None:
        raise ConfigError(
            f"site {site.name} is an embedding with a magnitude for each entry, other run times have one for each "
            f"feature; {_FOLD}"
        )
    return WeightUpdate(
        weight=site.weight,
        layer=layer,
        shape=site.shape,
        left=left.float().contiguous(),
        right=right.float().contiguous(),
        magnitude=None if magnitude is None else magnitude.detach().cpu().float(),
    )


def _assert_one_kind(updates: Iterable[WeightUpdate], abilities: Abilities) -> None:
    """A file says once for all weights whether it is DoRA."""
    by_kind = {update.magnitude is not None: update.weight for update in updates}
    if len(by_kind) > 1:
        raise ConfigError(
            f"{by_kind[True]} has DoRA and {by_kind[False]} has not; {abilities.name} has one setting for all; "
            "expected DoRA at all sites or at none"
        )


def _assert_finite(path: Path, updates: Iterable[WeightUpdate]) -> None:
    for update in updates:
        if not bool(torch.isfinite(update.left).all() and torch.isfinite(update.right).all()):
            raise ConfigError(
                f"{path}: the adapter of {update.weight} has inf or nan in float32, expected finite values; look for a "
                "learning rate that was too high, or take an earlier adapter"
            )
