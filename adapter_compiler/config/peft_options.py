"""PEFT's options whose values differ from ours, not only their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adapter_compiler.errors import ConfigError


def translate_peft_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options with PEFT's ``use_dora``, ``use_rslora`` and ``init_lora_weights`` in our own terms.

        use_dora=True                →  kind="dora", or "dora-svd" beside kind="svd"
        use_rslora=True              →  scaling="rslora"
        init_lora_weights=True       →  init="kaiming", or "gaussian" for the kinds with λ, as in PEFT's AdaLoRA
        init_lora_weights="pissa"    →  init="pissa"

    Raises:
        ConfigError: one of them has no meaning here, or contradicts an option of ours.
    """
    own = dict(options)
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
        raise ConfigError(f"AdapterConfig got use_rslora=True and scaling={options['scaling']!r}; give one of them")
    options["scaling"] = "rslora"


def _init_lora_weights(value: Any, options: dict[str, Any]) -> None:
    if "init" in options:
        raise ConfigError(f"AdapterConfig got init_lora_weights={value!r} and init={options['init']!r}; give one")
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
