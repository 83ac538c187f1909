"""PEFT's options that differ from ours in their values, not only in their names, and those that have no place here.

Every field of PEFT's ``LoraConfig`` and ``AdaLoraConfig`` is either an option of ``AdapterConfig`` under another name,
translated, or accepted at the value that has no effect and otherwise refused with what to use instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adapter_compiler.errors import ConfigError

#: Options that change nothing about the adapters of a model in memory.
WITHOUT_EFFECT = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
)

_BY_RULE = "choose blocks with rules=(AdapterRule(depth=...),)"
_BY_SCHEDULE = "give it to BudgetSchedule"
_BY_DATA = "leave it out and call initialize_adapters on the compiled model"
_NOWHERE = "leave it out, or train with PEFT"

#: Options that must be at their default, that default, and what to do instead.
ELSEWHERE: dict[str, tuple[Any, str]] = {
    "lora_dropout": (0.0, "leave it out: adapters have no dropout of their own; put nn.Dropout into the model"),
    "bias": ("none", "leave it out and train biases with trainable=('*.bias',)"),
    "layers_to_transform": (None, _BY_RULE),
    "layers_pattern": (None, _BY_RULE),
    "rank_pattern": ({}, "give ranks with rules=(AdapterRule(name=..., rank=...),)"),
    "alpha_pattern": ({}, "give alphas with rules=(AdapterRule(name=..., alpha=...),)"),
    "trainable_token_indices": (None, "train the whole embedding with trainable=, or train with PEFT"),
    "target_parameters": (None, "name the parameters in sites="),
    "loftq_config": ({}, "leave it out; quantize='nf4' keeps the base in 4 bits"),
    "eva_config": (None, _BY_DATA),
    "corda_config": (None, _NOWHERE),
    "lora_ga_config": (None, _BY_DATA),
    "megatron_config": (None, _NOWHERE),
    "velora_config": (None, _NOWHERE),
    "alora_invocation_tokens": (None, _NOWHERE),
    "use_qalora": (False, _NOWHERE),
    "monteclora_config": (None, _NOWHERE),
    "layer_replication": (None, _NOWHERE),
    "lora_bias": (False, "leave it out and train biases with trainable=('*.bias',)"),
    "use_bdlora": (None, _NOWHERE),
    "arrow_config": (None, _NOWHERE),
    "kasa_config": (None, _NOWHERE),
    "ensure_weight_tying": (False, "leave it out: an adapter of a tied weight acts under all of its names"),
    "target_r": (8, _BY_SCHEDULE),
    "tinit": (0, _BY_SCHEDULE),
    "tfinal": (0, _BY_SCHEDULE),
    "deltaT": (1, _BY_SCHEDULE),
    "beta1": (0.85, _BY_SCHEDULE),
    "beta2": (0.85, _BY_SCHEDULE),
    "total_step": (None, _BY_SCHEDULE),
}


def translate_peft_options(options: dict[str, Any]) -> dict[str, Any]:
    """Translate PEFT's ``use_dora``, ``use_rslora`` and ``init_lora_weights`` into our options.

        use_dora=True                →  kind="dora", or "dora-svd" beside kind="svd"
        use_rslora=True              →  scaling="rslora"
        init_lora_weights=True       →  init="kaiming", or "gaussian" for the kinds with λ, as in PEFT's AdaLoRA
        init_lora_weights="pissa"    →  init="pissa"

    Raises:
        ConfigError: one of them has a value that is not supported here, or contradicts one of our options; or another
            option of PEFT's would have an effect that there is not here.
    """
    own = dict(options)
    for name in WITHOUT_EFFECT:
        own.pop(name, None)
    for name, (default, advice) in ELSEWHERE.items():
        value = own.pop(name, default)
        if value and value != default:
            raise ConfigError(f"AdapterConfig({name}={value!r}) is an option of PEFT's, expected {default!r}; {advice}")
    for name, translate in _TRANSLATIONS.items():
        if name in own:
            translate(own.pop(name), own)
    return own


def _use_dora(value: Any, options: dict[str, Any]) -> None:
    _assert_boolean("use_dora", value)
    if value:
        kind = options.get("kind", "lora")
        options["kind"] = {"svd": "dora-svd", "lora": "dora"}.get(kind, kind)


def _use_rslora(value: Any, options: dict[str, Any]) -> None:
    _assert_boolean("use_rslora", value)
    if not value:
        return
    if options.get("scaling", "rslora") != "rslora":
        raise ConfigError(
            f"AdapterConfig got use_rslora=True and scaling={options['scaling']!r}, which contradict each other; "
            "expected one of them; give use_rslora or scaling"
        )
    options["scaling"] = "rslora"


def _init_lora_weights(value: Any, options: dict[str, Any]) -> None:
    if "init" in options:
        raise ConfigError(
            f"AdapterConfig got init_lora_weights={value!r} and init={options['init']!r}, which are one option; "
            "expected one of them; give init or init_lora_weights"
        )
    if value is False:
        raise ConfigError(
            "AdapterConfig(init_lora_weights=False) would start adapters with random updates; expected one of "
            "init='gaussian', 'kaiming', 'orthogonal' or 'pissa'"
        )
    start = "gaussian" if "svd" in options.get("kind", "svd") else "kaiming"
    options["init"] = start if value is True else value


def _assert_boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"AdapterConfig({name}={value!r}): expected True or False; for example {name}=True")


_TRANSLATIONS: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "use_dora": _use_dora,
    "use_rslora": _use_rslora,
    "init_lora_weights": _init_lora_weights,
}
