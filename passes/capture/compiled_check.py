"""A backend of ``torch.compile`` that compares the code it gets with eager mode before it is used.

The first time that a compiled graph runs, it and the graph's own operators run on copies of the inputs, forward and
backward. If they differ by more than rounding, a warning says by how much, and the graph stays in eager mode. How much
rounding changes is measured: the operators also run on inputs that differ in their last digit. The comparison costs
these three calls, and memory for copies of what the graph reads, once for each graph. The model's Python does not run
for it, so hooks, counters and caches notice nothing.

Graphs that draw random numbers (dropout in training) are not compared, because the compiler draws others than eager
mode does; with its option ``fallback_random`` it draws the same, and they are compared too.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from passes.compat import find_backend

logger = logging.getLogger(__name__)

#: Largest accepted difference, as a fraction of the largest value: fused code rounds in other places.
TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.complex128: 1e-6,
    torch.complex64: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}
#: Accepted difference, as a multiple of what changing the inputs by rounding changes in eager mode.
_NOISE_FACTOR = 16.0
#: Gradients are sums with cancellation, so each counts as at least this fraction of the largest one.
_LEAST_GRADIENT = 1e-2

Run = Callable[..., Sequence[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckedBackend:
    """Makes code with a backend of torch and checks it; equal instances count as one backend for Dynamo.

    Attributes:
        backend: the name of the backend, or the backend itself.
        dynamic: the option of ``torch.compile``.
    """

    backend: str | Callable[..., Any] = "inductor"
    dynamic: bool | None = None

    def __call__(self, graph_module: GraphModule, inputs: Sequence[Any], **options: Any) -> Run:
        """The checked code of a graph; ``options`` are ``mode`` and ``options`` of ``torch.compile``."""
        # Backends change the graph that they get.
        eager = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
        compiled: Run = find_backend(self.backend, self.dynamic)(graph_module, inputs, **options)
        has_same_draws = bool((options.get("options") or {}).get("fallback_random"))
        if draws_random_numbers(eager) and not has_same_draws:
            logger.debug("a compiled graph draws random numbers and is not compared with eager mode")
            return compiled
        return _FirstCallChecked(eager, compiled)


class _FirstCallChecked:
    def __init__(self, eager: GraphModule, compiled: Run) -> None:
        self._eager: GraphModule | None = eager
        self._run: Run = compiled

    def __call__(self, *args: Any) -> Sequence[Any]:
        if self._eager is not None and not any(_is_fake(arg) for arg in args):
            eager, self._eager = self._eager, None
            problem = find_difference(self._run, eager, args)
            if problem is not None:
                self._run = eager.forward
                logger.warning(
                    "a graph that torch.compile has compiled differs from eager mode: %s; its calls run in eager mode. "
                    "Please report this to PyTorch, with the model, or choose another backend",
                    problem,
                )
        return self._run(*args)


def find_difference(compiled: Run, eager: Run, args: Sequence[Any]) -> str | None:
    """By what the results of a graph differ, or ``None`` if they agree.

    Compared are the outputs, what is written into inputs, and, if gradients are enabled, the gradients of the inputs.

    Args:
        compiled: the compiled graph.
        eager: the same in eager mode.
        args: the inputs; they are not changed, and neither are their gradients.
    """
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    devices = {torch.device(t.device).index or 0 for t in tensors if t.device.type == "cuda"}
    # Hooks of an activation checkpoint around this call must not see these tensors.
    with (
        torch.random.fork_rng(sorted(devices)),
        torch.autograd.graph.saved_tensors_hooks(_keep, _keep),
    ):
        runs = []
        state = torch.random.get_rng_state()
        for run, given in ((eager, args), (eager, [_round_otherwise(arg) for arg in args]), (compiled, args)):
            torch.random.set_rng_state(state)
            runs.append(_observe(run, given))
    expected, rounded, found = runs
    return _compare(found, expected, {name: _difference(rounded[name], want) for name, want in expected.items()})


def _round_otherwise(arg: Any) -> Any:
    """Values that differ in the last digit, half of them upwards."""
    if not isinstance(arg, torch.Tensor) or arg.dtype not in TOLERANCES or arg.is_complex():
        return arg
    signs = torch.ones(arg.shape, dtype=arg.dtype, device=arg.device)
    signs.view(-1)[::2] = -1
    other = arg.detach() * (1 + signs * torch.finfo(arg.dtype).eps)
    return other.requires_grad_(arg.requires_grad)


def draws_random_numbers(graph_module: GraphModule) -> bool:
    """Whether a graph of Dynamo may draw random numbers."""
    nodes = (node for part in graph_module.modules() if isinstance(part, GraphModule) for node in part.graph.nodes)
    return any(_is_random(node) for node in nodes)


#: What the names of functions that draw random numbers contain.
_RANDOM_NAMES = (
    *("rand", "dropout", "bernoulli", "multinomial", "normal_", "uniform_", "exponential_", "poisson"),
    *("rrelu", "gumbel", "multi_head_attention_forward"),
)


def _is_random(node: torch.fx.Node) -> bool:
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if name == "dropout" or name.endswith("_dropout"):
        given = dict(zip(("input", "p", "training"), node.args, strict=False)) | dict(node.kwargs)
        return not (given.get("p", 0.5) == 0.0 or given.get("training", True) is False)
    if name == "scaled_dot_product_attention":
        given = dict(zip(("q", "k", "v", "mask", "dropout_p"), node.args, strict=False)) | dict(node.kwargs)
        rate: object = given.get("dropout_p", 0.0)
        return rate != 0.0
    return name == "normal" or any(word in str(name) for word in _RANDOM_NAMES)


def _observe(run: Run, args: Sequence[Any]) -> dict[str, Any]:
    """Outputs, inputs after the call, and gradients, by name."""
    copies = [_copy(arg) for arg in args]
    outputs = list(run(*copies))
    seen: dict[str, Any] = {f"output {i}": output for i, output in enumerate(outputs)}
    changed = [(i, c) for i, (c, arg) in enumerate(zip(copies, args, strict=True)) if isinstance(arg, torch.Tensor)]
    seen |= {f"input {i} after the call": copy.detach().clone() for i, copy in changed if not copy.requires_grad}
    roots = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
    leaves = [(i, copy) for i, copy in changed if copy.requires_grad]
    if roots and leaves and torch.is_grad_enabled():
        weights = [torch.linspace(-1, 1, o.numel(), device=o.device).cos().view(o.shape).to(o.dtype) for o in roots]
        gradients = torch.autograd.grad(roots, [copy for _, copy in leaves], weights, allow_unused=True)
        seen |= {f"gradient of input {i}": g for (i, _), g in zip(leaves, gradients, strict=True)}
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in seen.items()}


def _copy(arg: Any) -> Any:
    if not isinstance(arg, torch.Tensor):
        return arg
    return arg.detach().clone().requires_grad_(arg.requires_grad)


def _compare(found: dict[str, Any], expected: dict[str, Any], noise: dict[str, float]) -> str | None:
    sizes = [_size(value) for name, value in expected.items() if name.startswith("gradient")]
    least = _LEAST_GRADIENT * max(sizes, default=0.0)
    for name, want in expected.items():
        own = least if name.startswith("gradient") else 0.0
        problem = _compare_one(found.get(name), want, own, _NOISE_FACTOR * noise[name])
        if problem is not None:
            return f"{name} {problem}"
    return None


def _compare_one(found: Any, want: Any, least: float, noise: float) -> str | None:
    if not isinstance(want, torch.Tensor) or not isinstance(found, torch.Tensor):
        # An unused input has no gradient or one of zeros.
        same = found is want or (None not in (found, want) and found == want) or _size(found) == _size(want) == 0.0
        return None if same else f"is {_describe(found)}, expected {_describe(want)}"
    if found.shape != want.shape or found.dtype != want.dtype:
        return f"is {_describe(found)}, expected {_describe(want)}"
    if not want.is_floating_point() and not want.is_complex():
        return None if torch.equal(found, want) else f"({_describe(want)}) has other values"
    difference = _difference(found, want)
    allowed = max(TOLERANCES.get(want.dtype, 0.0) * max(_size(want), least), noise)
    # Not "difference > allowed": where only one has nan, the difference is nan.
    return None if difference <= allowed else f"differs by {difference:.3g}, expected at most {allowed:.3g}"


def _difference(found: Any, want: Any) -> float:
    """The largest difference of two tensors of floats of one shape; nan where only one has it; otherwise 0."""
    if not isinstance(want, torch.Tensor) or not isinstance(found, torch.Tensor) or not want.numel():
        return 0.0
    if not (want.is_floating_point() or want.is_complex()) or found.shape != want.shape:
        return 0.0
    a, b = _widen(found), _widen(want)
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs()).max())


def _size(value: Any) -> float:
    """The largest finite magnitude."""
    if not isinstance(value, torch.Tensor) or not value.numel():
        return 0.0
    return float(_widen(value).nan_to_num(0.0, 0.0, 0.0).abs().max())


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    """The values in float64; complex numbers as pairs."""
    real = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    return real.to("cpu", torch.float64)


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def _is_fake(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_meta or type(value).__name__ == "FakeTensor")


def _keep(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
