"""The state that a module keeps between calls besides weights: random states, buffers and plain attributes.

A graph repeats tensor operations and updates of buffers. It does not repeat a draw from Python's or numpy's generator,
nor an assignment to an attribute. Those are detected here by observing one run in eager mode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from passes.capture.quiet import PROCESS_LOCK
from passes.compat import FLAT_WEIGHT_REFS, FLAT_WEIGHTS, parse_to, version_of

#: The dictionaries of an nn.Module with the hooks that run at a call.
HOOK_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_CONTAINERS = (list, dict, set, deque)
#: Attributes that torch manages: registries, which are handled separately, and caches of the weights.
_MANAGED = {"_parameters", "_buffers", "_modules", FLAT_WEIGHTS, FLAT_WEIGHT_REFS, "forward", *HOOK_KINDS}
#: The module of transformers whose hooks collect outputs of submodules, as for ``output_hidden_states``.
_COLLECTING = "transformers.utils.output_capturing"
#: Flags that a first call sets to record that something has been set up; later calls only read them.
_SET_UP = {"_output_capturing_hooks_installed"}


def is_without_memory(module: nn.Module) -> bool:
    """Whether the module has parameters and all are on the meta device: shapes without values."""
    devices = {parameter.device.type for parameter in module.parameters()}
    return devices == {"meta"}


def runs_more_than_forward(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks of its own, or a ``__call__`` that is not torch's."""
    return any(getattr(module, kind) for kind in HOOK_KINDS) or type(module).__call__ is not nn.Module.__call__


@contextlib.contextmanager
def restored_state(module: nn.Module) -> Iterator[None]:
    """Afterwards, restore everything that running a module may change: random states, buffers, hooks, attributes."""
    in_python = [child for child in module.modules() if not isinstance(child, torch.jit.ScriptModule)]
    kinds = ("_buffers", *HOOK_KINDS)
    registries = [(child.__dict__[kind], dict(child.__dict__[kind])) for child in in_python for kind in kinds]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers() if not buffer.is_meta]
    attributes = _Attributes(module)
    with _restored_generators(module):
        try:
            yield
        finally:
            attributes.restore()
            for registry, named in registries:
                if registry.keys() != named.keys() or any(registry[key] is not named[key] for key in named):
                    registry.clear()
                    registry.update(named)
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)


@dataclasses.dataclass(kw_only=True)
class StateChanges:
    """Descriptions of what a run changed, other than buffers and torch's generators.

    Attributes:
        attributes: changes of plain attributes.
        others: all other changes.
    """

    attributes: list[str] = dataclasses.field(default_factory=list)
    others: list[str] = dataclasses.field(default_factory=list)

    @property
    def first(self) -> str | None:
        """One of the descriptions, or ``None`` if nothing changed."""
        return next(iter((*self.others, *self.attributes)), None)


@contextlib.contextmanager
def find_state_changes(module: nn.Module, found: StateChanges) -> Iterator[None]:
    """Add to ``found`` what the run inside the block changes."""
    attributes = _Attributes(module)
    before = _read_external_generators()
    versions = {n: (p, version_of(p)) for n, p in module.named_parameters() if not p.is_inference()}
    yield
    found.others += [f"changes its parameter {n} in place" for n, (p, v) in versions.items() if version_of(p) != v]
    found.attributes += [f"changes its attribute {name}" for name in attributes.find_changed()]
    after = _read_external_generators()
    found.others += [f"draws from the generator of {name}" for name, state in before.items() if state != after[name]]


@contextlib.contextmanager
def _restored_generators(module: nn.Module) -> Iterator[None]:
    devices = {t.device for t in (*module.parameters(), *module.buffers()) if t.device.type == "cuda"}
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    legacy = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(legacy)


def _read_external_generators() -> dict[str, Any]:
    states: dict[str, Any] = {"Python's random module": random.getstate()}
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = numpy.random.get_state()
        states["numpy"] = (kind, keys.tobytes(), *rest)
    return states


class _Attributes:
    """A snapshot of the plain attributes of a module and its submodules, one level into containers."""

    def __init__(self, module: nn.Module) -> None:
        watched = [(n, m) for n, m in module.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._owners = [(name, child, self._read(child)) for name, child in watched]

    @staticmethod
    def _read(child: nn.Module) -> dict[str, tuple[Any, Any]]:
        return {
            key: (value, value.copy() if isinstance(value, _CONTAINERS) else None)
            for key, value in _watched_items(child)
        }

    def find_changed(self) -> Iterator[str]:
        """Qualified names of attributes that were added, removed or changed since."""
        for owner, child, before in self._owners:
            now = dict(_watched_items(child))
            for key in (before.keys() | now.keys()) - _SET_UP:
                if key not in now or key not in before or not _is_same(*before[key], now[key]):
                    yield f"{owner}.{key}" if owner else key

    def restore(self) -> None:
        """Restore the value of every attribute and the contents of every container."""
        for _, child, before in self._owners:
            for key in [key for key, _ in _watched_items(child) if key not in before]:
                del child.__dict__[key]
            for key, (value, contents) in before.items():
                child.__dict__[key] = value
                if isinstance(value, _CONTAINERS) and not _has_same_contents(value, contents):
                    _refill(value, contents)


def _watched_items(child: nn.Module) -> Iterator[tuple[str, Any]]:
    """The plain attributes, except those that a hook of torch.nn.utils computes from weights at each call."""
    computed = {getattr(hook, "name", None) for hook in child._forward_pre_hooks.values() if _is_torch_hook(hook)}
    return ((key, value) for key, value in child.__dict__.items() if key not in _MANAGED and key not in computed)


def is_known_hook(hook: Any) -> bool:
    """Whether a graph may include a hook's work: torch's hooks only compute; those of transformers collect outputs."""
    return _is_torch_hook(hook) or _is_collecting_hook(hook)


def _is_torch_hook(hook: Any) -> bool:
    """Whether a hook belongs to torch.nn.utils, as those of weight_norm and spectral_norm."""
    return _module_of(hook).startswith("torch.nn.utils.")


def _is_collecting_hook(hook: Any) -> bool:
    return _module_of(hook) == _COLLECTING


def _module_of(hook: Any) -> str:
    return str(getattr(hook, "__module__", type(hook).__module__))


def _is_same(value: Any, contents: Any, now: Any) -> bool:
    if value is not now:
        return isinstance(value, (bool, int, float, str, bytes)) and type(value) is type(now) and value == now
    return contents is None or _has_same_contents(now, contents)


def _has_same_contents(value: Any, contents: Any) -> bool:
    if len(value) != len(contents):
        return False
    pairs = [(value, contents)] if isinstance(value, set) else zip(value, contents, strict=True)
    if isinstance(value, dict):
        pairs = zip(value.items(), contents.items(), strict=True)
        return all(k is j and v is w for (k, v), (j, w) in pairs)
    return all(one == other if isinstance(value, set) else one is other for one, other in pairs)


def _refill(value: Any, contents: Any) -> None:
    value.clear()
    value.update(contents) if isinstance(value, (dict, set)) else value.extend(contents)


@contextlib.contextmanager
def canonical_kernels() -> Iterator[None]:
    """Switch off what makes a module run other kernels than those that its code calls.

    The fused inference path of ``nn.TransformerEncoder`` gives other results under a padding mask, and a surrounding
    autocast region would become part of the graph.
    """
    with without_fast_path(), contextlib.ExitStack() as stack:
        for device_type in _autocast_devices():
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextlib.contextmanager
def without_redundant_moves() -> Iterator[None]:
    """Inside, ``module.to(...)`` does nothing if the module already has the requested device and dtype.

    In eager code such a call has no effect, and routers of experts rely on it. In a trace it fails, because traced
    parameters cannot be moved.
    """
    original = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, memory_format = parse_to(*args, **kwargs)
        tensors = [*module.parameters(), *module.buffers()]
        is_there = all(
            (device is None or t.device == device)
            and (dtype is None or t.dtype == dtype or not (t.is_floating_point() or t.is_complex()))
            for t in tensors
        )
        return module if is_there and memory_format is None else original(module, *args, **kwargs)

    with PROCESS_LOCK:
        setattr(nn.Module, "to", to)  # noqa: B010  a method cannot be assigned to
        try:
            yield
        finally:
            setattr(nn.Module, "to", original)  # noqa: B010


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Switch off the fused inference path of ``nn.TransformerEncoder``, which does not call its submodules."""
    with PROCESS_LOCK:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


def _autocast_devices() -> list[str]:
    return [name for name in ("cpu", "cuda", "xpu", "mps") if torch.is_autocast_enabled(name)]
