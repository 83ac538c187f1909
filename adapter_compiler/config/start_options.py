"""The names and options of initializers."""

from __future__ import annotations

import dataclasses
import re

from adapter_compiler.errors import ConfigError

#: The initializers that need no data: the values of ``AdapterConfig(init=...)``.
STARTS = ("gaussian", "kaiming", "orthogonal", "pissa")

#: The initializers that need batches of data, for :func:`~adapter_compiler.initialize_adapters`.
DATA_STARTS = ("lora_ga", "gradient_svd", "lora_one", "eva")

#: ``pissa_niter_4`` is PiSSA with a randomized decomposition of 4 power iterations (the paper's fast SVD).
PISSA_NAME = re.compile(r"^pissa(_niter_(?P<iterations>\d+))?$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartOptions:
    """The options of an initializer.

    Attributes:
        name: its name; ``None`` for the form's default.
        std: standard deviation of the random factors, for ``"gaussian"``.
    """

    name: str | None = None
    std: float = 0.02


def assert_known_start(name: object) -> None:
    """Raise :class:`ConfigError` unless ``name`` is an initializer that needs no data, or ``None``."""
    known = ", ".join(map(repr, STARTS))
    if isinstance(name, str) and name in DATA_STARTS:
        raise ConfigError(
            f"AdapterConfig(init={name!r}) needs batches, expected one of {known}; leave it out and call "
            f"initialize_adapters(adapted, {name!r}, batches, loss) on the compiled model"
        )
    if name is not None and not (isinstance(name, str) and (name in STARTS or PISSA_NAME.match(name))):
        raise ConfigError(
            f"AdapterConfig(init={name!r}): expected one of {known}, or 'pissa_niter_N' with a number N; for example "
            "init='pissa_niter_4'"
        )
