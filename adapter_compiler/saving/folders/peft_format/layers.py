"""From an adapter of ours to the tensors that PEFT has for a module of its kind.

    linear, Conv1D      lora_A [r, in], lora_B [out, r]; AdaLoRA also lora_E [r, 1]
    embedding           lora_embedding_A [r, entries], lora_embedding_B [features, r]
    convolution         lora_A [r, in, kernel…], lora_B [out, r, 1…]; AdaLoRA (Conv2d only) as a linear layer
    attention           lora_A and lora_B of in_proj, and those of out_proj, which are zero

PEFT adapts ``in_proj`` and ``out_proj`` of an attention together, and up to version 0.21.2 adds the update of
``out_proj`` twice. An update of ``out_proj`` would mean something else in a version that adds it once, so only those
of ``in_proj`` are written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from adapter_compiler.adapters.parameters.factors import factor_update, factor_weight
from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.folders.peft_format.tensors import PEFT_PREFIX
from adapter_compiler.saving.layer_kinds import ATTENTION, CONVOLUTIONS, EMBEDDING, LINEAR, LINEAR_OR_CONV1D
from passes.forms.dora import MAGNITUDE
from passes.planning.plan import PlannedAdapter

ParametersOf = Callable[[PlannedAdapter], Mapping[str, torch.Tensor]]

_LINEAR = (LINEAR, LINEAR_OR_CONV1D)
_CONVOLUTIONS = tuple(CONVOLUTIONS.values())
#: Kinds that PEFT's LoRA and its AdaLoRA take.
_KINDS = {
    "lora": (*_LINEAR, EMBEDDING, *_CONVOLUTIONS, ATTENTION),
    "adalora": (*_LINEAR, "Conv2d"),
}
#: The same in words.
_TAKEN = {
    "lora": "LoRA takes weights of nn.Linear, transformers' Conv1D, nn.Embedding, convolutions without groups and "
    "dilation, and in_proj_weight of nn.MultiheadAttention",
    "adalora": "AdaLoRA takes weights of nn.Linear, transformers' Conv1D and nn.Conv2d without groups and dilation",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftSite:
    """One adapter as PEFT has it.

    Attributes:
        module: the name of the module.
        layer: its kind.
        shape: the shape of the weight.
        P: [out, r].
        lam: [r].
        Q: [r, in].
        magnitude: [out], of DoRA.
    """

    module: str
    layer: str
    shape: tuple[int, ...]
    P: torch.Tensor
    lam: torch.Tensor
    Q: torch.Tensor
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of triplets."""
        return len(self.lam)

    def pad(self, rank: int) -> PeftSite:
        """The same with more triplets, whose λ is 0: PEFT's AdaLoRA has one rank for all modules."""
        more = rank - self.rank
        return dataclasses.replace(
            self,
            P=torch.nn.functional.pad(self.P, (0, more)),
            lam=torch.nn.functional.pad(self.lam, (0, more)),
            Q=torch.nn.functional.pad(self.Q, (0, 0, 0, more)),
        )

    def spell(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors in a file of ``"lora"`` or ``"adalora"``, by name."""
        prefix = f"{PEFT_PREFIX}{self.module}"
        for name, tensor in self._spell(kind):
            yield f"{prefix}.{name}", tensor.contiguous().clone()

    def _spell(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        if kind == "adalora":
            yield from (("lora_A", self.Q), ("lora_B", self.P), ("lora_E", self.lam.reshape(-1, 1)))
            return
        if self.layer == EMBEDDING:
            yield from (("lora_embedding_A", self.Q), ("lora_embedding_B", self.P))
        else:
            ones = (1,) * (len(self.shape) - 2)
            yield "lora_A.weight", self.Q.reshape(-1, *self.shape[1:]) if ones else self.Q
            yield "lora_B.weight", self.P.reshape(*self.P.shape, *ones)
        if self.layer == ATTENTION:
            features = self.Q.shape[1]
            yield "base_layer.out_proj.lora_A.weight", self.Q.new_zeros(self.rank, features)
            yield "base_layer.out_proj.lora_B.weight", self.Q.new_zeros(features, self.rank)
        if self.magnitude is not None:
            ones = (1,) * (len(self.shape) - 2)
            yield "lora_magnitude_vector", self.magnitude.reshape(1, -1, *ones) if ones else self.magnitude


def make_site(adapters: Sequence[PlannedAdapter], parameters_of: ParametersOf, layer: str, kind: str) -> PeftSite:
    """The adapters of one weight as PEFT has them.

    Raises:
        ConfigError: PEFT cannot express them for a module of this kind.
    """
    adapter = adapters[0]
    weight = adapter.site.weight
    assert_expressible(adapter, layer, kind)
    make = _make_lora if kind == "lora" else _make_adalora
    module = weight.removesuffix(".in_proj_weight" if layer == ATTENTION else ".weight")
    made = make(adapters, parameters_of, module, layer)
    if layer != EMBEDDING or adapter.site.transposed:
        return made
    if made.magnitude is not None:
        raise ConfigError(
            f"site {weight} is an embedding with a magnitude for each entry, PEFT's DoRA has one for each feature; "
            "expected a form that only adds, as 'svd' or 'lora'; choose one, or leave the embedding out"
        )
    return dataclasses.replace(made, P=made.Q.t(), Q=made.P.t())


def assert_expressible(adapter: PlannedAdapter, layer: str, kind: str) -> None:
    """Raise :class:`ConfigError` unless PEFT has adapters for a weight of this kind."""
    site = adapter.site
    if site.aliases:
        raise ConfigError(
            f"site {site.name} is also {', '.join(site.aliases)}: one adapter for all names of a tied weight, but PEFT "
            "has one for each module; expected a weight of one module; compile with untie=, or save with save()"
        )
    if layer == ATTENTION and not site.weight.endswith(".in_proj_weight"):
        raise ConfigError(
            f"site {site.name} is a weight of an nn.MultiheadAttention other than in_proj_weight: PEFT has no file for "
            "it that means the same in all of its versions; exclude it, or save with save()"
        )
    if layer not in _KINDS[kind]:
        raise ConfigError(
            f"site {site.name} is a weight of the kind {layer!r}; PEFT's {_TAKEN[kind]}; exclude it, or save with "
            "save()"
        )
    if layer == ATTENTION and adapter.form.rescales:
        raise ConfigError(
            f"site {site.name} has the form {adapter.form.name!r}, PEFT has no DoRA for an nn.MultiheadAttention; "
            "expected a form that only adds, as 'svd' or 'lora'"
        )


def _make_lora(adapters: Sequence[PlannedAdapter], parameters_of: ParametersOf, module: str, layer: str) -> PeftSite:
    left, right = factor_weight(adapters, parameters_of)
    magnitude = parameters_of(adapters[0]).get(MAGNITUDE)
    if magnitude is not None and not left.shape[1]:
        left, right = left.new_zeros(len(left), 1), right.new_zeros(1, right.shape[1])
    return PeftSite(
        module=module,
        layer=layer,
        shape=adapters[0].site.shape,
        P=left.float(),
        lam=torch.ones(left.shape[1]),
        Q=right.float(),
        magnitude=None if magnitude is None else magnitude.detach().cpu().float(),
    )


def _make_adalora(adapters: Sequence[PlannedAdapter], parameters_of: ParametersOf, module: str, layer: str) -> PeftSite:
    adapter = adapters[0]
    adapter.assert_matrix()
    parameters = parameters_of(adapter)
    if adapter.site.rows is not None:
        raise ConfigError(f"site {adapter.site.name} covers some rows of its weight, AdaLoRA all; write LoRA")
    if adapter.form.name == "lora":
        left, right = factor_update(dataclasses.replace(adapter, scale=1.0), parameters)
        own = {"P": left.float(), "lam": torch.ones(left.shape[1]), "Q": right.float()}
        return PeftSite(module=module, layer=layer, shape=adapter.site.shape, **own)
    if parameters.keys() != {"P", "lam", "Q"}:
        raise ConfigError(f"site {adapter.site.name} has the form {adapter.form.name!r}, AdaLoRA is 'svd'; write LoRA")
    own = {name: tensor.detach().cpu().float() for name, tensor in parameters.items()}
    return PeftSite(module=module, layer=layer, shape=adapter.site.shape, **own)
