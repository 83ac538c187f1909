"""Which adapters a thread sees: all, unless it is inside ``disable_adapters`` of a model or ``base_weights``."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Token:
    """Stands for the adapters of one model; a copy of the model has one of its own.

    Attributes:
        hidden: how many threads are at the moment inside contexts that hide the adapters. A compiler guards this
            number; while it is not 0, each thread is asked whether it is one of those.
        noted: the weights whose adapters were used, while somebody wants to know.
    """

    def __init__(self) -> None:
        self.hidden = 0
        self.noted: set[str] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Token:
        return Token()

    def __reduce__(self) -> Any:
        return Token, ()


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a model that runs in this thread, and what reads in it have given."""

    token: Token
    exchanged: frozenset[tuple[int, str]]
    reads: dict[tuple[str, bool, bool], Any] = dataclasses.field(default_factory=dict)


class _Scope(threading.local):
    hidden: tuple[Token, ...] = ()
    calls: tuple[_Call, ...] = ()


_scope = _Scope()
_lock = threading.Lock()
#: Stands for the adapters of all models.
_EVERY = Token()


def is_visible(token: Token) -> bool:
    """Whether this thread sees the adapters of a model at the moment."""
    return (token.hidden == 0 and _EVERY.hidden == 0) or not _is_hidden_here(token)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _is_hidden_here(token: Token) -> bool:
    """No compiler can guard what a thread keeps to itself."""
    return token in _scope.hidden or _EVERY in _scope.hidden


def base_weights() -> contextlib.AbstractContextManager[None]:
    """Inside, this thread reads the plain weights of every model."""
    return without_adapters(_EVERY)


@contextlib.contextmanager
def without_adapters(token: Token) -> Iterator[None]:
    """Inside, this thread reads the plain weights of one model."""
    with _hiding((*_scope.hidden, token)):
        yield


def same_scope() -> contextlib.AbstractContextManager[None]:
    """A context in which a thread sees what the present one sees now; for what is computed again in backward.

    It may be entered as often as something is computed again, also by several threads at a time.
    """
    return _Recomputation(_scope.hidden)


class _Recomputation(contextlib.AbstractContextManager[None]):
    def __init__(self, tokens: tuple[Token, ...]) -> None:
        self._tokens = tokens
        self._entered = threading.local()

    def __enter__(self) -> None:
        context = _hiding(self._tokens)
        context.__enter__()
        self._entered.contexts = [*getattr(self._entered, "contexts", ()), context]

    def __exit__(self, *exception: Any) -> bool | None:
        return self._entered.contexts.pop().__exit__(*exception)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _hiding(tokens: tuple[Token, ...]) -> Iterator[None]:
    before, _scope.hidden = _scope.hidden, tokens
    with _lock:
        for token in tokens:
            token.hidden += 1
    try:
        yield
    finally:
        _scope.hidden = before
        with _lock:
            for token in tokens:
                token.hidden -= 1


@contextlib.contextmanager
def calling(token: Token, exchanged: frozenset[tuple[int, str]]) -> Iterator[None]:
    """Inside, a call of a model runs in this thread.

    Args:
        token: the model's.
        exchanged: weights in whose place something else stood when the call began, by module and name.
    """
    before, _scope.calls = _scope.calls, (*_scope.calls, _Call(token, exchanged))
    try:
        yield
    finally:
        _scope.calls = before


@torch.compiler.disable  # type: ignore[untyped-decorator]
def is_exchanged_in_call(token: Token, module: object, leaf: str) -> bool:
    """Whether what stands in a weight's place came there after the present call of the model began."""
    call = _find_call(token)
    return call is not None and (id(module), leaf) not in call.exchanged


def remembered(token: Token, weight: str, base: Any, adapters: Any, make: Callable[[], T]) -> T:
    """What a read gave before in the present call of the model, if nothing of it is another by now; else a new one."""
    call = _find_call(token)
    # What a checkpoint computes again in backward must read as often as it did.
    if call is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return make()
    key = (weight, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    known = call.reads.get(key)
    if known is not None and known.base is base and _are_same(known.adapters, adapters):
        found: T = known
        return found
    made = call.reads[key] = make()
    return made


def _are_same(known: Any, adapters: Any) -> bool:
    pairs = zip(known, adapters, strict=True) if len(known) == len(adapters) else ()
    same = [
        one.planned is other.planned and all(p is other.parameters[n] for n, p in one.parameters.items())
        for one, other in pairs
    ]
    return len(same) == len(adapters) and all(same)


def _find_call(token: Token) -> _Call | None:
    """The outermost call of the model in this thread."""
    return next((call for call in _scope.calls if call.token is token), None)
