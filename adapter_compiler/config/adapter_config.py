"""The options of adapters: which weights get one, and of what kind, rank and start."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from adapter_compiler.config.attach_options import AttachOptions
from adapter_compiler.config.mixture import Mixture
from adapter_compiler.config.peft_options import translate_peft_options
from adapter_compiler.config.start_options import PISSA_NAME, StartOptions, assert_known_start
from adapter_compiler.config.validation import (
    accept_aliases,
    assert_boolean,
    assert_choice,
    assert_integer,
    assert_number,
)
from adapter_compiler.errors import ConfigError
from passes.capture.submodules import find_named_modules, find_repeated_modules
from passes.forms import FORMS
from passes.forms.routed import ROUTABLE
from passes.planning.rules import AdapterRule
from passes.planning.selection import ALL_LINEAR, SiteSelection
from passes.planning.site import AdapterSite

#: The values of ``AdapterConfig(capture=...)``: whether an example call may be recorded as a graph.
CAPTURES = ("auto", "off")

#: The values of ``AdapterConfig(quantize=...)``.
QUANTIZED_KINDS = ("nf4", "int8")

#: The values of ``AdapterConfig(scaling=...)``: how the scale is computed from ``alpha`` and ``rank``.
SCALINGS = ("alpha/r", "rslora")


@accept_aliases(
    translate_peft_options,
    r="rank",
    init_r="rank",
    lora_alpha="alpha",
    orth_reg_weight="gamma",
    target_modules="sites",
    exclude_modules="exclude",
    modules_to_save="trainable",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which weights are adapted, and how. PEFT's names for the options are accepted too.

    Attributes:
        rank: the number of triplets that each site starts with (AdaLoRA's initial rank). A weight whose smaller
            dimension is less than this gets that many.
        alpha: ΔW = alpha / rank · P diag(λ) Q. The scale does not change when ranks shrink.
        kind: what an adapter computes: ``"svd"`` (AdaLoRA, P diag(λ) Q), ``"lora"`` (B A), ``"dora"`` (LoRA and a
            magnitude for each row) or ``"dora-svd"``. The ranks of kinds with λ can be pruned.
        scaling: ``"alpha/r"``, or ``"rslora"`` for alpha / √rank (arXiv 2312.03732).
        init: how adapters start, see :mod:`adapter_compiler.adapters.initializers`; by default ``"orthogonal"`` for the
            kinds with λ and ``"kaiming"`` for the others. Both draw Q or A at random and start at ΔW = 0, by P = 0 with
            λ = 1, or B = 0. ``"gaussian"`` is the start in AdaLoRA's paper, with λ = 0. For initializers that need
            data, call :func:`~adapter_compiler.initialize_adapters` on the compiled model.
        gamma: weight γ of the orthogonality regularizer ‖PᵀP − I‖² + ‖QQᵀ − I‖² (AdaLoRA, eq. 4), which
            :class:`~adapter_compiler.RankBudget` adds. By default 0.1 if all λ are zero at the budget's first step,
            and otherwise 0, because the regularizer would pull P = 0 to columns of length one.
        sites: ``"all-linear"`` for weights that are used by matrix products only; ``"auto"`` for these, convolutions,
            recurrent layers, and tables of 8 to 10,000 rows; or one or more globs over weight names. A glob also
            selects weights that are used by other operators.
        exclude: one or more globs of weights that get no adapter.
        trainable: one or more globs of other parameters that are trained fully, such as a new head.
        untie: one or more globs of further names of tied parameters (``lm_head.weight``). Each gets a parameter of its
            own, with the same values, so that it can have its own adapter or none. A folded model then has two
            weights; configure it not to tie them again (transformers: ``config.tie_word_embeddings``).
        rules: rank, alpha and kind, or no adapter, for weights selected by name, role, module, depth or size. The
            first rule that matches a weight decides; if none matches, ``sites`` decides.
        init_std: standard deviation of P and Q, or of A, at the start with ``init="gaussian"``.
        dtype: dtype of the adapters; by default the weight's, but float32 for half-precision weights.
        fused: run each adapter and its base layer as one autograd function; results differ by rounding only.
        recompute: if ``fused``, recompute in backward the large activations that are cheap to compute (GELU, SiLU,
            layer normalization) instead of keeping them; results are the same.
        inplace: adapt the given model itself instead of a copy that shares the storage of its weights.
        capture: ``"auto"`` records an example call as a graph, and finds sites, roles and blocks in it. ``"off"``
            records no graph: sites are found by watching the example call, or without an example by the classes of
            the modules. Calls run the model's own Python in both cases.
        regions: the submodules that ``checkpoint`` and ``AdaptedModel.compile`` apply to, as classes or globs over
            names; by default the repeated blocks of the model, or the whole model if it has none.
        checkpoint: recompute the activations inside each region in backward instead of keeping them.
        quantize: keep the frozen weight under each adapter in ``"nf4"`` (about 4 bits a value, double quantization)
            or ``"int8"``, with bitsandbytes. The given model keeps its own weights: delete it to free their memory, or
            adapt it ``inplace``.
        mixture: experts and routers in place of one adapter at each weight, see :class:`~adapter_compiler.Mixture`.
        token_mask: the name of an argument of the model's ``forward``: a mask of the tokens that the adapters act on,
            with a value for each token, 1 (true) or 0. Other tokens, and calls without it, are those of the base model.

    Raises:
        ConfigError: an option is unknown, or its value cannot work.
    """

    rank: int = 12
    alpha: float = 16.0
    kind: str = "svd"
    scaling: str = "alpha/r"
    init: str | None = None
    gamma: float | None = dataclasses.field(default=None, metadata={"example": 0.1})
    sites: str | tuple[str, ...] = ALL_LINEAR
    exclude: str | tuple[str, ...] = ()
    trainable: str | tuple[str, ...] = ()
    untie: str | tuple[str, ...] = ()
    rules: tuple[AdapterRule, ...] = ()
    init_std: float = 0.02
    dtype: torch.dtype | None = None
    fused: bool = True
    recompute: bool = True
    inplace: bool = False
    capture: str = "auto"
    regions: tuple[str | type[nn.Module], ...] = ()
    checkpoint: bool = False
    quantize: str | None = None
    mixture: Mixture | None = dataclasses.field(default=None, metadata={"example": Mixture()})
    token_mask: str | None = dataclasses.field(default=None, metadata={"example": "image_mask"})

    def __post_init__(self) -> None:
        assert_choice(self, "kind", tuple(FORMS))
        assert_choice(self, "scaling", SCALINGS)
        assert_known_start(self.init)
        assert_integer(self, "rank", least=1)
        assert_choice(self, "capture", CAPTURES)
        assert_number(self, "alpha", above=0)
        if self.gamma is not None:
            assert_number(self, "gamma", least=0)
        assert_number(self, "init_std", above=0)
        assert_boolean(self, "fused")
        assert_boolean(self, "recompute")
        assert_boolean(self, "inplace")
        assert_boolean(self, "checkpoint")
        if self.quantize is not None:
            assert_choice(self, "quantize", QUANTIZED_KINDS)
        if self.dtype is not None and not getattr(self.dtype, "is_floating_point", False):
            raise ConfigError(
                f"AdapterConfig(dtype={self.dtype!r}): expected a floating-point torch.dtype or None, "
                "as in dtype=torch.float32"
            )
        self._assert_routable()
        for name in ("exclude", "trainable", "untie"):
            object.__setattr__(self, name, _as_globs(self, name))
        object.__setattr__(self, "regions", _as_regions(self.regions))
        object.__setattr__(self, "rules", _as_rules(self.rules))
        if not isinstance(self.sites, str):
            object.__setattr__(self, "sites", _as_globs(self, "sites"))
        if not self.sites:
            raise ConfigError(
                f"AdapterConfig(sites={self.sites!r}) selects nothing; expected 'all-linear', 'auto' or globs, "
                "as in sites='*.query'"
            )

    def _assert_routable(self) -> None:
        if self.token_mask is not None and not str(self.token_mask).isidentifier():
            raise ConfigError(
                f"AdapterConfig(token_mask={self.token_mask!r}): expected the name of an argument of the model's "
                "forward, as in token_mask='image_mask'"
            )
        if self.mixture is not None and not isinstance(self.mixture, Mixture):
            raise ConfigError(
                f"AdapterConfig(mixture={self.mixture!r}): expected a Mixture or None, as in mixture=Mixture(experts=4)"
            )
        if self.mixture is None and self.token_mask is None:
            return
        option = "mixture=..." if self.mixture is not None else f"token_mask={self.token_mask!r}"
        if self.mixture is not None and self.token_mask is not None:
            raise ConfigError(
                f"AdapterConfig(mixture=..., token_mask={self.token_mask!r}): expected one of them; leave the other out"
            )
        if self.kind not in ROUTABLE:
            raise ConfigError(
                f"AdapterConfig(kind={self.kind!r}, {option}): expected one of {', '.join(map(repr, ROUTABLE))}, "
                "because the others rescale the whole weight; for example kind='lora'"
            )
        if self.init is not None and PISSA_NAME.match(self.init):
            raise ConfigError(
                f"AdapterConfig(init={self.init!r}, {option}): expected a start at ΔW = 0, such as 'kaiming', because "
                "a start that depends on the call cannot be subtracted from the weight; leave init out"
            )
        if self.mixture is not None and self.rank % (experts := self.mixture.experts):
            raise ConfigError(
                f"AdapterConfig(rank={self.rank}) is the rank of all {experts} experts together; expected a multiple "
                f"of {experts}, as in rank={experts * (self.rank // experts + 1)}"
            )

    @property
    def scale(self) -> float:
        """The scale s in ΔW = s · P diag(λ) Q of sites without a rule of their own."""
        return self.scale_for(self.alpha, self.rank)

    def scale_for(self, alpha: float, rank: int) -> float:
        """The scale s for an alpha and a rank: alpha / rank, or alpha / √rank with ``scaling="rslora"``."""
        return alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank)

    @property
    def selection(self) -> SiteSelection:
        """The options that select sites."""
        return SiteSelection(
            sites=self.sites,
            exclude=_as_globs(self, "exclude"),
            trainable=_as_globs(self, "trainable"),
            rules=self.rules,
        )

    def to_dict(self) -> dict[str, Any]:
        """The options that are plain data, for JSON: all but those that a plan replaces, and ``inplace``."""
        left_out = {"rank", "rules", "dtype", "inplace", "regions", "mixture", "token_mask"}
        fields = [field.name for field in dataclasses.fields(self) if field.name not in left_out]
        options = {name: getattr(self, name) for name in fields}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}

    def attaching(self, model: nn.Module) -> AttachOptions:
        """How the adapted weights of a model compute.

        Raises:
            SiteError: an entry of ``regions`` matches no submodule.
        """
        regions = tuple(find_named_modules(model, self.regions) or find_repeated_modules(model) or [""])
        return AttachOptions(
            fused=self.fused,
            recompute=self.recompute,
            regions=regions,
            checkpointed=regions if self.checkpoint else (),
        )

    @property
    def start(self) -> StartOptions:
        """The options of the initializer."""
        return StartOptions(name=self.init, std=self.init_std)

    def dtype_for(self, site: AdapterSite) -> torch.dtype:
        """The dtype of the adapter at ``site``: ``dtype``, else the weight's, but at least float32."""
        if self.dtype is not None:
            return self.dtype
        return torch.float32 if site.dtype.itemsize < torch.float32.itemsize else site.dtype


def _as_globs(config: AdapterConfig, name: str) -> tuple[str, ...]:
    value = getattr(config, name)
    globs = (value,) if isinstance(value, str) else value
    if not isinstance(globs, (tuple, list, set, frozenset)) or not all(isinstance(g, str) and g for g in globs):
        raise ConfigError(
            f"AdapterConfig({name}={value!r}): expected a glob or globs, as in {name}=('*.query', 'head.*')"
        )
    return tuple(sorted(globs) if isinstance(globs, (set, frozenset)) else globs)


def _as_regions(value: Any) -> tuple[str | type[nn.Module], ...]:
    entries = (value,) if isinstance(value, (str, type)) else tuple(value)
    for entry in entries:
        if not (isinstance(entry, str) and entry) and not (isinstance(entry, type) and issubclass(entry, nn.Module)):
            raise ConfigError(
                f"AdapterConfig(regions={value!r}): expected globs over names or classes of torch.nn.Module"
            )
    return entries


def _as_rules(value: Any) -> tuple[AdapterRule, ...]:
    rules = (value,) if isinstance(value, AdapterRule) else value
    if not isinstance(rules, (tuple, list)) or not all(isinstance(rule, AdapterRule) for rule in rules):
        raise ConfigError(f"AdapterConfig(rules={value!r}): expected a sequence of AdapterRule")
    return tuple(rules)
