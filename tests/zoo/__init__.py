"""A catalog of small models, as plain data, for tests and benchmarks.

    for entry in entries(group="encoder"):
        torch.manual_seed(0)
        model = entry.build()
        args, kwargs = entry.example()
        loss_of(model(*args, **kwargs)).backward()

An architecture's library is imported when its entry is built, not before.
"""

from __future__ import annotations

from collections.abc import Collection

from tests.zoo.entry import ZooEntry, find_tensors, loss_of

__all__ = ["ZooEntry", "entries", "find_tensors", "loss_of"]


def entries(group: str | None = None, names: Collection[str] | None = None) -> tuple[ZooEntry, ...]:
    """The entries of one group, or those with the names, or all.

    Names come back in their own order. Raises KeyError for a group or a name that the zoo does not have.
    """
    from tests.zoo.architectures import ARCHITECTURES
    from tests.zoo.awkward import AWKWARD

    catalog = {entry.name: entry for entry in (*ARCHITECTURES, *AWKWARD)}
    chosen = tuple(catalog.values()) if names is None else tuple(catalog[name] for name in names)
    if group is None:
        return chosen
    if group not in {entry.group for entry in catalog.values()}:
        raise KeyError(group)
    return tuple(entry for entry in chosen if entry.group == group)
