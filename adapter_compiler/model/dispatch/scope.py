"""Which adapters a thread sees: all, except inside ``disable_adapters`` of a model or inside ``base_weights``.

Context variables hold this, so that it also differs between the tasks of an event loop.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from passes.compat import find_backward_number, has_saved_tensor_hooks

T = TypeVar("T")


class Token:
    """Identifies the adapters of one model; a copy of the model gets its own token.

    Attributes:
        hidden: the number of contexts that hide the adapters at present, over all threads. torch.compile guards this
            number. While it is not 0, each read checks whether its own thread is inside such a context.
        used: the weights whose adapters were used, while this is recorded; otherwise ``None``.
        recorder: called with what routers choose, while somebody records it; otherwise ``None``.
    """

    def __init__(self) -> None:
        self.hidden = 0
        self.used: set[str] | None = None
        self.recorder: Callable[..., None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Token:
        return Token()

    def __reduce__(self) -> Any:
        return Token, ()


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a model that runs in this thread, and the weights that its reads have given."""

    token: Token
    replaced: frozenset[tuple[int, str]]
    reads: dict[tuple[str, bool, bool], Any] = dataclasses.field(default_factory=dict)
    number: int = dataclasses.field(default_factory=itertools.count().__next__)


_hidden: contextvars.ContextVar[tuple[Token, ...]] = contextvars.ContextVar("hidden", default=())
_calls: contextvars.ContextVar[tuple[_Call, ...]] = contextvars.ContextVar("calls", default=())
#: Gates and masks that this thread has for the weights that it reads, by token and name.
_gates: contextvars.ContextVar[Mapping[tuple[Token, str], Any]] = contextvars.ContextVar(
    "gates", default=types.MappingProxyType({})
)
_lock = threading.Lock()
#: Identifies the adapters of all models.
_ALL_MODELS = Token()


def is_visible(token: Token) -> bool:
    """Whether this thread sees the adapters of a model now."""
    return not is_hidden_somewhere(token) or not _is_hidden_here(token)


def is_hidden_somewhere(token: Token) -> bool:
    """Whether any thread hides the adapters of a model now."""
    return token.hidden != 0 or _ALL_MODELS.hidden != 0


def _is_hidden_here(token: Token) -> bool:
    """Whether this thread hides the adapters."""
    return _run_uncompiled(_read_hidden, token)


def _read_hidden(token: Token) -> bool:
    return token in _hidden.get() or _ALL_MODELS in _hidden.get()


def _run_uncompiled(read: Callable[..., T], *args: Any) -> T:
    """Read a thread-local value, which Dynamo cannot guard."""
    if not torch.compiler.is_compiling():
        return read(*args)
    from adapter_compiler.model.dispatch import uncompiled

    found: T = uncompiled.run_uncompiled(read, *args)
    return found


def base_weights() -> contextlib.AbstractContextManager[None]:
    """A context in which this thread reads the plain weights of every model."""
    return without_adapters(_ALL_MODELS)


@contextlib.contextmanager
def without_adapters(token: Token) -> Iterator[None]:
    """A context in which this thread reads the plain weights of one model."""
    with _hiding((*_hidden.get(), token)):
        yield


def same_scope() -> contextlib.AbstractContextManager[None]:
    """A context in which a thread sees the adapters that the present thread sees now, for recomputation in backward.

    It can be entered several times, also by several threads at once.
    """
    return _Recomputation(_hidden.get(), _gates.get())


class _Recomputation(contextlib.AbstractContextManager[None]):
    def __init__(self, tokens: tuple[Token, ...], gates: Mapping[tuple[Token, str], Any]) -> None:
        self._tokens = tokens
        self._gates = gates
        self._entered = threading.local()

    def __enter__(self) -> None:
        is_forward = find_backward_number() < 0  # the gates that it computes are for all of the call
        context = _hiding(self._tokens) if is_forward else _scope(self._tokens, self._gates)
        context.__enter__()
        self._entered.contexts = [*getattr(self._entered, "contexts", ()), context]

    def __exit__(self, *exception: Any) -> bool | None:
        return self._entered.contexts.pop().__exit__(*exception)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _scope(tokens: tuple[Token, ...], gates: Mapping[tuple[Token, str], Any]) -> Iterator[None]:
    number = find_backward_number()
    before = _gates.get()
    _gates.set({key: (number, value) for key, (_, value) in gates.items()})
    try:
        with _hiding(tokens):
            yield
    finally:
        _gates.set(before)


def note_gates(token: Token, name: str, gates: Any) -> None:
    """Keep gates or a mask for the weights that this thread reads next, until the present call of the model ends."""
    _run_uncompiled(_write_gates, token, name, gates)


def _write_gates(token: Token, name: str, gates: Any) -> None:
    _gates.set({**_gates.get(), (token, name): (find_backward_number(), gates)})


def find_gates(token: Token, name: str) -> Any:
    """The gates or the mask of this name; ``None`` if there are none.

    Those of a call are not found in its backward, where another call may have run in between. A recomputation of
    ``AdapterConfig(checkpoint=True)`` has them again.
    """
    return _run_uncompiled(_read_gates, token, name)


def _read_gates(token: Token, name: str) -> Any:
    number, gates = _gates.get().get((token, name), (-1, None))
    return gates if number == find_backward_number() else None


@contextlib.contextmanager
def _hiding(tokens: tuple[Token, ...]) -> Iterator[None]:
    before = _hidden.get()
    _hidden.set(tokens)
    with _lock:
        for token in tokens:
            token.hidden += 1
    try:
        yield
    finally:
        _hidden.set(before)
        with _lock:
            for token in tokens:
                token.hidden -= 1


@contextlib.contextmanager
def calling(token: Token, replaced: frozenset[tuple[int, str]]) -> Iterator[None]:
    """A context in which this thread runs a call of a model.

    Args:
        token: the model's token.
        replaced: the weights that were replaced by plain tensors when the call began: module id and parameter name.
    """
    before, gates = _calls.get(), _gates.get()
    _calls.set((*before, _Call(token, replaced)))
    try:
        yield
    finally:
        _calls.set(before)
        if _gates.get() is not gates:
            _gates.set(gates)


def is_replaced_in_call(token: Token, module: object, leaf: str) -> bool:
    """Whether a weight that is replaced now was not yet replaced when the present call of the model began."""
    return _run_uncompiled(_read_replaced, token, module, leaf)


def _read_replaced(token: Token, module: object, leaf: str) -> bool:
    call = _find_call(token)
    return call is not None and (id(module), leaf) not in call.replaced


def reuse_read(token: Token, weight: str, base: Any, adapters: Any, make: Callable[[], T]) -> T:
    """The result of an earlier read of a weight in the present call of the model, or a new one if something changed.

    Args:
        token: the model's token.
        weight: the weight's first qualified name.
        base: W.
        adapters: its bound adapters.
        make: makes the result of a new read.
    """
    call = _find_call(token)
    # Inside an activation checkpoint nothing is reused, because the recomputation must save the same tensors.
    if call is None or has_saved_tensor_hooks():
        return make()
    key = (weight, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    known = call.reads.get(key)
    if known is not None and known.base is base and _are_same(known.adapters, adapters):
        found: T = known
        return found
    made = call.reads[key] = make()
    return made


def find_call_number(token: Token) -> int | None:
    """A number that identifies the present call of the model in this thread, or ``None`` outside of calls."""
    call = _find_call(token)
    return None if call is None else call.number


def _are_same(known: Any, adapters: Any) -> bool:
    pairs = zip(known, adapters, strict=True) if len(known) == len(adapters) else ()
    same = [
        one.planned is other.planned and all(p is other.parameters[n] for n, p in one.parameters.items())
        for one, other in pairs
    ]
    return len(same) == len(adapters) and all(same)


def _find_call(token: Token) -> _Call | None:
    """The outermost call of the model in this thread."""
    return next((call for call in _calls.get() if call.token is token), None)
