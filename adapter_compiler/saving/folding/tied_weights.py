"""Adapters of one name of a weight that has two in the base model: a head that is tied to the embedding.

A checkpoint of a tied model holds one tensor for both. Where adapters change one of the two, the folded model has two
weights: the other name gets a tensor of its own, and ``config.json`` says that the two are not tied any more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.folders.base_weights import BaseWeights
from adapter_compiler.saving.folders.saved_adapters import SavedAdapters

#: The field of transformers' ``config.json``.
TIE = "tie_word_embeddings"

#: What the names of embeddings have in them.
_EMBEDDING_NAMES = ("emb", "wte", "shared")

#: How the names of transformers' classes end that have a head over the vocabulary.
_HEADED = (
    "ForCausalLM",
    "LMHeadModel",
    "ForMaskedLM",
    "ForPreTraining",
    "ForConditionalGeneration",
    "DoubleHeadsModel",
)

#: How the names of heads over the vocabulary end.
_HEAD_NAMES = ("head.weight", "embed_out.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ties:
    """What folding does about tied weights.

    Attributes:
        copies: weight that the base lacks → the weight in the base that it was tied to.
        dropped: weights that the base lacks and that change as the weight that they are tied to does.
        also: weight in the base → the weight that it is tied to, whose change it takes.
        unties: whether the result is not tied any more.
    """

    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    also: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unties: bool = False


def resolve_ties(
    saved: SavedAdapters, base: BaseWeights, read: Callable[[str], torch.Tensor], *, can_untie: bool
) -> Ties:
    """Find the tied weights that adapters change.

    Args:
        saved: the adapters, fitted to the base.
        base: the base.
        read: reads a tensor of the base.
        can_untie: whether a ``config.json`` is written with the result.

    Raises:
        CheckpointError: the result cannot say that its weights are not tied.
    """
    copies, dropped = {}, set()
    for name, shape in _find_missing(saved, base):
        embedding = _find_embedding(saved, base, name, shape)
        if embedding is None:
            continue
        if saved.changes_alike(name, embedding):
            dropped.add(name)
        else:
            copies[name] = embedding
    _assert_embeddings_alone(saved, base, dropped | copies.keys())
    also = _find_partners(saved, base, read)
    unties = bool(copies) or (not also and _has_changed_pair(saved, base, read))
    if unties:
        _assert_can_untie(saved, base, next(iter(copies.items()), None), can_untie=can_untie)
    return Ties(copies=copies, dropped=frozenset(dropped), also=also, unties=unties)


def _find_partners(saved: SavedAdapters, base: BaseWeights, read: Callable[[str], torch.Tensor]) -> dict[str, str]:
    """Weights that stand in the base beside the one that they are tied to, with the same values."""
    found = {}
    for name in saved.keeps_ties & base.shapes.keys():
        for other, shape in base.shapes.items():
            is_other = other != name and other not in saved.changed and shape == base.shapes[name]
            if is_other and torch.equal(read(name), read(other)):
                found[other] = name
    return found


def _find_missing(saved: SavedAdapters, base: BaseWeights) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Changed and replaced weights that the base lacks, with their shapes."""
    for name, aliases in saved.changed.items():
        if name in base.shapes or any(alias in base.shapes for alias in aliases):
            continue
        adapters = saved.plan.by_weight.get(name)
        if adapters:
            yield name, adapters[0].site.shape
        elif name in saved.edits:
            yield name, (-1, *saved.file.tensors[saved.edits[name].key].shape[1:])
    for name, key in saved.replacements.items():
        if name not in base.shapes:
            yield name, saved.file.tensors[key].shape


def _find_embedding(saved: SavedAdapters, base: BaseWeights, name: str, shape: tuple[int, ...]) -> str | None:
    """The embedding that a weight is tied to; ``None`` if there is none of its shape."""
    if len(shape) != 2 or not name.endswith(".weight") or not _has_head(base.config):
        return None
    found = [other for other, size in base.shapes.items() if _is_embedding(base, other) and _is_same(size, shape)]
    if len(found) > 1:
        raise CheckpointError(
            f"{base.name}: {name}, which {saved.path} changes, is not there; it may be tied to {found[0]} or to "
            f"{found[1]}, expected one of that shape; save the base with a tensor of its own for {name}"
        )
    return found[0] if found else None


def _is_same(size: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return shape[1] == size[1] and shape[0] in (size[0], -1)


def _is_embedding(base: BaseWeights, name: str) -> bool:
    """Whether a tensor of the base is an embedding of tokens, by its name and size."""
    module, _, leaf = name.rpartition(".")
    shape, size = base.shapes.get(name, ()), (base.config or {}).get("vocab_size")
    is_named = leaf == "weight" and any(part in module.rpartition(".")[2].lower() for part in _EMBEDDING_NAMES)
    return is_named and len(shape) == 2 and (not isinstance(size, int) or shape[0] == size)


def _has_head(config: Mapping[str, Any] | None) -> bool:
    """Whether the model may have a head over the vocabulary, as far as its configuration says."""
    names = (config or {}).get("architectures")
    classes = [one for one in names if isinstance(one, str)] if isinstance(names, list) else []
    return not classes or any(one.endswith(_HEADED) for one in classes)


def _assert_embeddings_alone(saved: SavedAdapters, base: BaseWeights, heads: set[str]) -> None:
    """Raise if PEFT changed an embedding alone whose head, of an unknown name, would change with it."""
    if not saved.kind.startswith("peft") or heads:
        return
    for name in (*saved.changed, *saved.replacements):
        if name not in saved.keeps_ties and _is_embedding(base, name) and _is_tied(base, name):
            raise CheckpointError(
                f"{base.name}: {name} is tied to the head of the model, and {saved.path} changes it alone, as PEFT's "
                "adapters of an embedding do not act on the head; expected a change of both (ensure_weight_tying) or "
                "a base that is not tied; save the base with a tensor of its own for the head"
            )


def _is_tied(base: BaseWeights, name: str) -> bool:
    """Whether transformers uses this embedding as the head as well."""
    shape = base.shapes[name]
    if base.config is None or any(size == shape and other != name for other, size in base.shapes.items()):
        return False
    is_default = bool(base.config.get("architectures"))
    return _has_head(base.config) and base.config.get(TIE, is_default) is True


def _has_changed_pair(saved: SavedAdapters, base: BaseWeights, read: Callable[[str], torch.Tensor]) -> bool:
    """Whether the base holds both tensors of a tied pair, and they do not change alike.

    Without a configuration, equal tensors are taken for tied where PEFT's adapters change one of them: the code of the
    model would tie them again. Our own adapters change one of them only if the user has untied them.
    """
    embeddings = [name for name in base.shapes if _is_embedding(base, name)]
    heads = [name for name in base.shapes if name.endswith(_HEAD_NAMES)]
    pairs = [(e, h) for e in embeddings for h in heads if e != h and base.shapes[e] == base.shapes[h]]
    changed = saved.changed.keys() | saved.replacements.keys()
    found = [pair for pair in pairs if {*pair} & changed and not saved.changes_alike(*pair)]
    if base.config is not None:
        return bool(found) and base.config.get(TIE) is True and _has_head(base.config)
    return saved.kind.startswith("peft") and any(torch.equal(*map(read, pair)) for pair in found)


def _assert_can_untie(
    saved: SavedAdapters, base: BaseWeights, example: tuple[str, str] | None, *, can_untie: bool
) -> None:
    pair = "the head and the embedding" if example is None else f"{example[0]} and {example[1]}"
    config = base.config or {}
    nested = [key for key, value in config.items() if isinstance(value, dict) and value.get(TIE)]
    problem = advice = ""
    if not can_untie or base.config is None:
        problem = "no config.json is written beside the result, which could say that they are not tied any more"
        advice = "fold into the model's folder, or save the base with a tensor of its own for each of them"
    elif config.get("is_encoder_decoder") or nested:
        where = f" ({nested[0]})" if nested else ""
        problem = f"this kind of model{where} computes something else if they are not tied"
        advice = "merge the adapters with PEFT"
    if problem:
        raise CheckpointError(
            f"{base.name}: {pair} are tied, {saved.path} changes them differently, and {problem}; {advice}"
        )
