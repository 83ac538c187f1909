"""Which starting values adapters may be asked to have."""

from __future__ import annotations

import dataclasses
import re

from adapter_compiler.errors import ConfigError

#: The starts that need no data, which ``AdapterConfig(init=...)`` takes.
STARTS = ("gaussian", "kaiming", "orthogonal", "pissa")

#: Those that need batches, which :func:`~adapter_compiler.initialize_adapters` takes.
DATA_STARTS = ("lora_ga", "gradient_svd", "eva")

#: ``pissa_niter_4``: a randomized decomposition with that many power iterations (the paper's fast SVD).
PISSA_NAME = re.compile(r"^pissa(_niter_(?P<iterations>\d+))?$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartOptions:
    """What a configuration says about the start: the initializer's name (``None`` for the form's own), and std."""

    name: str | None = None
    std: float = 0.02


def assert_known_start(name: object) -> None:
    """Raise :class:`ConfigError` unless ``AdapterConfig(init=name)`` can be done without data."""
    known = ", ".join(map(repr, STARTS))
    if isinstance(name, str) and name in DATA_STARTS:
        raise ConfigError(
            f"AdapterConfig(init={name!r}) needs batches, expected one of {known}; leave it out and call "
            f"initialize_adapters(adapted, {name!r}, batches, loss) on the compiled model"
        )
    if name is not None and not (isinstance(name, str) and (name in STARTS or PISSA_NAME.match(name))):
        raise ConfigError(f"AdapterConfig(init={name!r}): expected one of {known}, or 'pissa_niter_4' and the like")
