"""Make calls of a model from the user's batches: a DataLoader, a Dataset, a list or a generator.

A batch is what the model is called with: a tensor, a tuple of positional arguments or a dict of keyword arguments. What
is in it besides, such as labels, is not given to the model; a metric sees the whole batch. The example says which
arguments there are.
"""

from __future__ import annotations

import dataclasses
import itertools
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset, IterableDataset, default_collate

from adapter_compiler.errors import ConfigError
from passes.capture.calls import ModuleCall, split_call
from passes.compat import pytree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One batch.

    Attributes:
        name: ``batch 1 of the samples``.
        call: the call of the model.
        batch: what the user's data gave, or the rows of it put together.
        rows: the size of the first dimension of the first tensor of the call.
    """

    name: str
    call: ModuleCall
    batch: Any
    rows: int


class Samples:
    """The user's data as calls; can be iterated more than once.

    Attributes:
        not_given: parts of the batches that no argument of the example corresponds to, as far as they were read.
    """

    def __init__(self, source: Any, example: ModuleCall) -> None:
        """Check the data and its first batch.

        Args:
            source: batches, or single rows, which are put together into batches of the example's size.
            example: a call of the model, with its arguments by name where they have one.

        Raises:
            ConfigError: the data is empty or no iterable, or its first batch is not one of the model's.
        """
        self._source = _make_repeatable(source)
        self._arguments = Arguments(example)
        self.not_given: dict[str, None] = {}
        first = next(iter(self._source), None)
        if first is None:
            raise ConfigError("samples= is empty, expected at least one batch; leave it out or give some")
        self._are_rows = self._arguments.is_row(first)
        next(iter(self))

    def __iter__(self) -> Iterator[Sample]:
        for number, batch in enumerate(self._read_batches(), 1):
            name = f"batch {number} of the samples"
            call, rest = self._arguments.fit(batch, name)
            self.not_given.update(dict.fromkeys(rest))
            yield Sample(name=name, call=call, batch=batch, rows=_count_rows(call))

    def _read_batches(self) -> Iterator[Any]:
        if not self._are_rows:
            yield from self._source
            return
        rows, size = map(self._arguments.convert_row, self._source), max(1, self._arguments.batch_size)
        while chunk := list(itertools.islice(rows, size)):
            try:
                yield default_collate(chunk)
            except (RuntimeError, TypeError) as error:
                raise ConfigError(
                    f"samples= gives single rows, and torch's default_collate cannot put {len(chunk)} of them "
                    f"together: {error}; give a DataLoader with a collate_fn"
                ) from error


class Arguments:
    """The arguments of an example, into which batches must fit.

    Attributes:
        batch_size: of the first tensor of the example.
    """

    def __init__(self, example: ModuleCall) -> None:
        """Take the arguments apart."""
        self._example = example
        args, kwargs = example.rebuild(example.tensors)
        self._names: list[int | str] = [*range(len(args)), *kwargs]
        self._values: dict[int | str, Any] = dict(enumerate(args))
        self._values.update(kwargs)
        self._wanted = [name for name in self._names if _has_tensor(self._values[name])]
        self.batch_size = _count_rows(example)

    def is_row(self, batch: Any) -> bool:
        """Whether every tensor has the example's dtype and one dimension less."""
        found, _ = self._choose(batch, "the first of the samples")
        wanted = [(tensor.dtype, tensor.dim() - 1) for tensor in self._example.tensors]
        return [(tensor.dtype, tensor.dim()) for tensor in self._list_tensors(found)] == wanted

    def convert_row(self, row: Any) -> Any:
        """The row with tensors where a dict has lists of numbers, whose columns default_collate would make."""
        return {**row, **self._choose(row, "a row of the samples")[0]} if isinstance(row, Mapping) else row

    def fit(self, batch: Any, name: str) -> tuple[ModuleCall, list[str]]:
        """The call for a batch, and what of the batch is not in it.

        Raises:
            ConfigError: an argument is missing, or has another nesting, dtype or number of dimensions.
        """
        found, rest = self._choose(batch, name)
        values = {**self._values, **found}
        args = [values[key] for key in self._names if isinstance(key, int)]
        call = split_call(args, {str(key): values[key] for key in self._names if not isinstance(key, int)})
        if call.spec != self._example.spec or call.positions != self._example.positions:
            raise ConfigError(
                f"{name} has {', '.join(call.names) or 'no tensors'}, the example {', '.join(self._example.names)}; "
                f"expected the same nesting. {self._advise()}"
            )
        for path, tensor, example in zip(call.names, call.tensors, self._example.tensors, strict=True):
            if tensor.dtype is not example.dtype or tensor.dim() != example.dim():
                raise ConfigError(
                    f"{name} gives {path} as {tensor.dtype} of shape {list(tensor.shape)}, the example has "
                    f"{example.dtype} of shape {list(example.shape)}; expected its dtype and number of dimensions. "
                    f"{self._advise()}"
                )
        return call, rest

    def _choose(self, batch: Any, name: str) -> tuple[dict[int | str, Any], list[str]]:
        """The values of the arguments, and the names of the other parts."""
        inputs, rest = self._split_labels(batch)
        if isinstance(inputs, Mapping):
            if missing := [key for key in self._wanted if key not in inputs]:
                raise ConfigError(
                    f"{name} has no {missing[0]}, it has {', '.join(map(str, inputs))}; expected a value for each "
                    f"argument of the example. {self._advise()}"
                )
            rest = [*rest, *(str(key) for key in inputs if key not in self._values)]
            chosen = {key: inputs[key] for key in self._names if key in inputs}
        else:
            if len(inputs) < len(self._wanted):
                raise ConfigError(
                    f"{name} has {len(inputs)} parts, the example {len(self._wanted)} arguments "
                    f"({', '.join(map(str, self._wanted))}); expected a value for each. {self._advise()}"
                )
            rest = [*(f"part {i + 1}" for i in range(len(self._wanted), len(inputs))), *rest]
            chosen = dict(zip(self._wanted, inputs, strict=False))
        return {key: _to_tensors(value, self._values[key]) for key, value in chosen.items()}, rest

    def _split_labels(self, batch: Any) -> tuple[Mapping[Any, Any] | Sequence[Any], list[str]]:
        """The inputs of ``(inputs, labels)``, where the inputs are a tuple or a dict of their own."""
        if isinstance(batch, Mapping):
            return batch, []
        if not isinstance(batch, (tuple, list)):
            return (batch,), []
        if batch and isinstance(batch[0], (Mapping, tuple, list)) and not self._nests(batch[0]):
            return batch[0], [f"part {i + 1}" for i in range(1, len(batch))]
        return batch, []

    def _nests(self, value: Any) -> bool:
        """Whether the first argument is itself a container, or a list of numbers stands for a tensor."""
        is_nested = bool(self._wanted) and isinstance(self._values[self._wanted[0]], (Mapping, tuple, list))
        return is_nested or (not isinstance(value, Mapping) and all(isinstance(one, numbers.Number) for one in value))

    def _list_tensors(self, found: Mapping[int | str, Any]) -> list[torch.Tensor]:
        leaves = pytree.tree_leaves([found[key] for key in self._wanted])
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def _advise(self) -> str:
        shown = ", ".join(str(key) for key in self._wanted)
        return (
            f"A batch is a dict by the names of arguments, a tuple in their order ({shown}), or a tensor; labels may "
            "come after them, as in (inputs, labels). Let the loader give that, or wrap it in a generator that does"
        )


def _make_repeatable(source: Any) -> Iterable[Any]:
    if isinstance(source, (torch.Tensor, Mapping, str)) or not (hasattr(source, "__iter__") or _has_items(source)):
        raise ConfigError(
            f"samples= is a {type(source).__name__}, expected batches: a list, a generator, a DataLoader or a Dataset; "
            "give a single batch as [batch]"
        )
    if (isinstance(source, Dataset) and not isinstance(source, IterableDataset)) or not hasattr(source, "__iter__"):
        return _Items(source)
    return list(source) if isinstance(source, Iterator) else source


def _has_items(source: Any) -> bool:
    return hasattr(source, "__getitem__") and hasattr(source, "__len__")


class _Items:
    """The items of something that has a length and numbers for them; it need not raise ``IndexError``."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Any]:
        return (self._source[number] for number in range(len(self._source)))


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _to_tensors(value: Any, example: Any) -> Any:
    """The value on the CPU; what stands for one tensor, an array or numbers, becomes one."""
    if isinstance(example, torch.Tensor) and not isinstance(value, (torch.Tensor, numpy.ndarray)):
        try:
            value = torch.as_tensor(value)
        except (ValueError, TypeError, RuntimeError):
            return value  # the comparison with the example refuses it by name
    return pytree.tree_map(_to_tensor, value)


def _to_tensor(leaf: Any) -> Any:
    if isinstance(leaf, (numpy.ndarray, numpy.generic)) and leaf.dtype.kind in "biufc":
        return torch.as_tensor(numpy.array(leaf))
    return leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf


def _count_rows(call: ModuleCall) -> int:
    return next((tensor.shape[0] for tensor in call.tensors if tensor.dim()), 1)
