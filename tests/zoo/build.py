"""One row of a table of architectures: the model's class, its inputs, and what its configuration sets."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from tests.zoo.entry import ZooEntry

Config = dict[str, Any]


def build_architecture(class_name: str, config: Config) -> nn.Module:
    """A model of transformers with random weights, in training mode."""
    import transformers

    model_class = getattr(transformers, class_name)
    model: nn.Module = model_class(model_class.config_class(**copy.deepcopy(config)))
    return model.train()


def describe_architecture(
    group: str,
    name: str,
    class_name: str,
    inputs: Callable[[int, int], dict[str, Any]],
    config: Config,
    *,
    traits: Collection[str] = (),
    size: tuple[int, int] = (2, 8),
    other_size: tuple[int, int] = (3, 12),
) -> ZooEntry:
    """An entry for one class of transformers under a configuration."""
    return ZooEntry(
        name=name,
        group=group,
        build=functools.partial(build_architecture, class_name, config),
        inputs=inputs,
        description=class_name,
        traits=frozenset(traits),
        size=size,
        other_size=other_size,
    )
