"""All private or version-dependent APIs of torch that this project uses, one name for each.

No other module uses a private part of torch (a test searches for them). ``tests/passes/test_compat.py`` probes each
one, so that after an upgrade of torch it names the one that changed. A missing API raises an error when this module is
imported or where the API is used, so that no check becomes weaker silently.
"""

from __future__ import annotations

import contextlib
import importlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses import meta_utils
from torch.autograd import forward_ad
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from passes.base import AdapterCompilerError


class TorchVersionError(AdapterCompilerError, ImportError):
    """The installed torch lacks an API that this project needs; the message names the API and its purpose."""


def find(path: str, purpose: str) -> Any:
    """An attribute of torch by its dotted path.

    Args:
        path: the path below ``torch``.
        purpose: what needs the attribute, for the message.

    Raises:
        TorchVersionError: this version of torch does not have it.
    """
    try:
        return operator.attrgetter(path)(torch)
    except AttributeError:
        raise TorchVersionError(
            f"torch {torch.__version__} has no torch.{path}, which adapter-compiler needs for {purpose}; install a "
            "version of torch that it was tested with (see pyproject.toml) and report this one"
        ) from None


# --- tensor subclasses and modes ------------------------------------------------------------------------------------

#: A context in which operators do not call ``__torch_function__`` of tensor subclasses.
WithoutTorchFunction: Any = find("_C.DisableTorchFunctionSubclass", "weights that read as W + ΔW")

#: A ``__torch_function__`` that does nothing, so that ``__torch_dispatch__`` handles every operator.
no_torch_function: Any = find("_C._disabled_torch_function_impl", "packed weights")

#: The active saved-tensor hooks, or ``None``; the argument ``True`` includes them during tracing.
_top_saved_tensor_hooks: Callable[[bool], Any] = find(
    "_C._autograd._top_saved_tensors_default_hooks", "activations that are recomputed in backward"
)

_functorch_is_active: Callable[[], bool] = find("_C._are_functorch_transforms_active", "torch.func and vmap")
_current_backward: Callable[[], int] = find("_C._current_graph_task_id", "gates and masks in a backward")
_is_tracing: Callable[[], bool] = find("_C._is_tracing", "torch.jit.trace")
_count_function_modes: Callable[[], int] = find("_C._len_torch_function_stack", "modes that change torch's functions")
_count_dispatch_modes: Callable[[], int] = find("_C._len_torch_dispatch_stack", "modes that change operators")
_function_modes: Callable[[], Sequence[Any]] = find(
    "overrides._get_current_function_mode_stack", "modes that change torch's functions"
)
_dispatch_modes: Callable[[], Sequence[Any]] = find(
    "utils._python_dispatch._get_current_dispatch_mode_stack", "modes that change operators"
)
_disabled_dispatch_modes: Callable[[], contextlib.AbstractContextManager[Any]] = find(
    "utils._python_dispatch._disable_current_modes", "W + ΔW inside a mode"
)
#: The packages whose modes observe or trace and change no values.
_OWN_PACKAGES = frozenset({"torch", "passes", "adapter_compiler"})
_is_batched: Callable[[torch.Tensor], bool] = find("_C._functorch.is_batchedtensor", "vmap over backward")
_is_wrapped: Callable[[torch.Tensor], bool] = find("_C._functorch.is_functorch_wrapped_tensor", "torch.func and vmap")
_is_legacy_batched: Callable[[torch.Tensor], bool] = find(
    "_C._functorch.is_legacy_batchedtensor", "is_grads_batched=True"
)
_wrap_without_memory: Callable[..., Any] = find("Tensor._make_wrapper_subclass", "weights without memory of their own")


def make_wrapper(cls: type, shape: Sequence[int], **options: Any) -> Any:
    """A tensor of a subclass with this shape and without storage; options are those of ``_make_wrapper_subclass``."""
    return _wrap_without_memory(cls, shape, **options)


def has_saved_tensor_hooks() -> bool:
    """Whether saved-tensor hooks are active, as in an activation checkpoint."""
    return _top_saved_tensor_hooks(True) is not None


def find_backward_number() -> int:
    """A number that identifies the backward that runs in this thread; -1 if none does."""
    return -1 if torch.compiler.is_compiling() else _current_backward()


def is_transformed() -> bool:
    """Whether ``torch.func``, ``vmap``, forward-mode AD, ``torch.jit.trace`` or the compiler runs this code."""
    return (
        torch.compiler.is_compiling()
        or _functorch_is_active()
        or getattr(forward_ad, "_current_level") >= 0  # noqa: B009  mypy does not know it
        or _is_tracing()
    )


def is_changed_by_user_mode() -> bool:
    """Whether a mode of the user, which may change the results of torch's functions or operators, is active here."""
    if torch.compiler.is_compiling() or not (_count_function_modes() or _count_dispatch_modes()):
        return False
    modes = (*_function_modes(), *_dispatch_modes())
    return any(type(mode).__module__.partition(".")[0] not in _OWN_PACKAGES for mode in modes)


def is_in_dispatch_mode() -> bool:
    """Whether a mode sees the operators below autograd, as in ``make_fx``."""
    return not torch.compiler.is_compiling() and _count_dispatch_modes() > 0


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """A context in which no mode sees functions and operators."""
    with find("_C.DisableTorchFunction", "W + ΔW inside a mode")(), _disabled_dispatch_modes():
        yield


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether a tensor is batched, inside ``vmap`` or with ``is_grads_batched=True``."""
    return _is_batched(tensor) or _is_legacy_batched(tensor)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor belongs to a transform of ``torch.func``, so that it has no memory of its own."""
    return _is_wrapped(tensor) or _is_legacy_batched(tensor)


def clone_lazily(values: torch.Tensor) -> torch.Tensor:
    """A copy-on-write copy; an ordinary copy if torch does not own the memory."""
    try:
        copied: torch.Tensor = torch._lazy_clone(values)
    except (RuntimeError, AttributeError):  # for example a memory-mapped file, or a torch without this function
        return values.clone()
    return copied


def version_of(tensor: torch.Tensor) -> int:
    """The number of in-place writes into a tensor's memory, which views share; not for inference tensors."""
    return tensor._version


# --- autograd nodes -------------------------------------------------------------------------------------------------

#: Whether torch shows the hooks of saved tensors. Without that, activations are kept instead of computed again.
SHOWS_SAVED_HOOKS = hasattr(
    find("_C._autograd.SavedTensor", "activations that are recomputed in backward"), "unpack_hook"
)


def is_saved_plainly(node: Any, *names: str) -> bool:
    """Whether a backward node is known to have saved its tensors with these names without a hook.

    The answer is no if torch does not show hooks, see :data:`SHOWS_SAVED_HOOKS`.

    Raises:
        TorchVersionError: the node saves nothing with such a name.
    """
    return all(one is None or _has_no_hook(one) for one in _read(node, "_raw_saved_", names))


def _has_no_hook(saved: Any) -> bool:
    return getattr(saved, "unpack_hook", saved) is None


def read_saved(node: Any, *names: str) -> tuple[Any, ...]:
    """The values that a backward node saved with these names.

    Raises:
        TorchVersionError: the node saves nothing with such a name.
    """
    return _read(node, "_saved_", names)


def _read(node: Any, prefix: str, names: Sequence[str]) -> tuple[Any, ...]:
    try:
        return tuple([getattr(node, prefix + name) for name in names])
    except AttributeError as error:
        raise TorchVersionError(
            f"{node.name()} of torch {torch.__version__} saves other tensors than were expected ({error}); set "
            "AdapterConfig(recompute=False) and report this version"
        ) from None


# --- kernels over lists of tensors ----------------------------------------------------------------------------------

foreach_mul: Callable[..., list[torch.Tensor]] = find("_foreach_mul", "scores of triplets")
foreach_abs_: Callable[..., Any] = find("_foreach_abs_", "scores of triplets")
foreach_copy_: Callable[..., Any] = find("_foreach_copy_", "gradients of triplets")
foreach_div_: Callable[..., Any] = find("_foreach_div_", "scores under a GradScaler")
foreach_lerp_: Callable[..., Any] = find("_foreach_lerp_", "smoothed scores")
foreach_sub_: Callable[..., Any] = find("_foreach_sub_", "smoothed scores")
foreach_zero_: Callable[..., Any] = find("_foreach_zero_", "gradients of triplets")

# --- modules --------------------------------------------------------------------------------------------------------

_parse_to: Callable[..., tuple[Any, ...]] = find("_C._nn._parse_to", "module.to() inside a trace")

#: Attributes of recurrent modules with lists of their weights, and the method that updates the lists.
FLAT_WEIGHTS, FLAT_WEIGHT_REFS, UPDATE_FLAT_WEIGHTS = "_flat_weights", "_flat_weight_refs", "_update_flat_weights"


def parse_to(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """``(device, dtype, non_blocking, memory format)`` from the arguments of ``module.to(...)``."""
    return _parse_to(*args, **kwargs)


def renew_flat_weights(module: nn.RNNBase) -> None:
    """Rebuild the list of weights of a recurrent module from its parameters."""
    with torch.no_grad():
        module._init_flat_weights()


def flat_weight_names(module: nn.RNNBase) -> Sequence[str]:
    """The names of the parameters in a recurrent module's list of weights."""
    return module._flat_weights_names


# --- torch.compile --------------------------------------------------------------------------------------------------

#: The attribute in which a module that is compiled in place keeps the function that its calls run.
_COMPILED_CALL, _CALL = "_compiled_call_impl", "_call_impl"


def set_compiled_call(module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let calls of a module run another function, as ``nn.Module.compile`` does; copies and pickles lose it.

    Args:
        module: the module.
        make: makes the function from the one that runs the hooks and ``forward``.

    Raises:
        TorchVersionError: calls of modules do not use such a function.
    """
    if not hasattr(nn.Module, _COMPILED_CALL) or not hasattr(nn.Module, _CALL):
        raise TorchVersionError(
            f"torch {torch.__version__} has no torch.nn.Module.{_COMPILED_CALL}, which adapter-compiler needs for "
            "compiled blocks; use torch.compile(adapted)"
        )
    setattr(module, _COMPILED_CALL, make(getattr(module, _CALL)))


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to a module or to one of its submodules."""
    return any(
        getattr(child, _COMPILED_CALL, None) is not None or "_orig_mod" in child._modules for child in module.modules()
    )


def find_backend(backend: str | Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    """A backend of ``torch.compile`` as a function of a graph, its inputs, and the options ``mode`` and ``options``."""
    if backend == "inductor":
        make = find("_TorchCompileInductorWrapper", "compiled blocks")
        return lambda graph, inputs, mode=None, options=None: make(mode, options, dynamic)(graph, inputs)
    from torch._dynamo.backends.registry import lookup_backend

    found: Callable[..., Any] = lookup_backend(backend)
    return found


def find_compiler_problem() -> str | None:
    """Why ``torch.compile`` cannot generate code for CPUs, or ``None`` if it finds a C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        return " ".join(str(error).split())
    return None


# --- export and tracing ---------------------------------------------------------------------------------------------

#: The operator that enables and disables gradients, as recorded in graphs.
SET_GRAD_ENABLED: Any = find("_C._set_grad_enabled", "parts of a graph under no_grad")

#: Loggers whose messages are expected during captures and exports.
EXPORT_LOGGERS = ("torch._export.non_strict_utils", "torch.fx.experimental.symbolic_shapes")
FAKE_TENSOR_LOGGER, SUBCLASS_LOGGER = "torch._subclasses.fake_tensor", "torch._subclasses"
SHAPE_LOGGER, ONNX_LOGGER = "torch.fx.experimental.symbolic_shapes", "torch.onnx._internal.exporter._registration"

#: The submodule in which torch.export stores the checks of a graph's inputs.
_GUARDS = "_guards_fn"


def take_guards(exported: torch.fx.GraphModule) -> Callable[..., Any]:
    """The function that checks an exported module's inputs; its calls are erased from the graph.

    Raises:
        TorchVersionError: there is no such function; without it, a graph would accept inputs that it is not valid for.
    """
    guards = getattr(exported, _GUARDS, None)
    if guards is None:
        raise TorchVersionError(
            f"torch.export of torch {torch.__version__} gives a module without {_GUARDS}, which checks a graph's "
            "inputs; install a version of torch that adapter-compiler was tested with (see pyproject.toml)"
        )
    for node in exported.graph.find_nodes(op="call_module", target=_GUARDS):
        exported.graph.erase_node(node)
    forward: Callable[..., Any] = guards.forward
    return forward


def make_fx(function: Callable[..., Any], **options: Any) -> Callable[..., torch.fx.GraphModule]:
    """``torch.fx.experimental.proxy_tensor.make_fx``, which is slow to import."""
    from torch.fx.experimental import proxy_tensor

    traced: Callable[..., torch.fx.GraphModule] = proxy_tensor.make_fx(function, **options)
    return traced


@contextlib.contextmanager
def values_in_fake_tensors() -> Iterator[None]:
    """Inside, a trace decides conditions on values by the example's values, and records the decisions.

    PyTorch (2.13) copies the values of plain tensors only. Values of Parameters are uninitialized memory, so branches
    on them would be decided by chance; inside this context they are copied too.

    Raises:
        TorchVersionError: torch copies values in another way.
    """
    from torch._functorch import config

    name = "_safe_copy"
    original = getattr(meta_utils, name, None)
    if original is None:
        raise TorchVersionError(
            f"torch {torch.__version__} has no torch._subclasses.meta_utils.{name}, without which a trace would decide "
            "branches on parameters by chance; install a version that adapter-compiler was tested with"
        )

    def copy(target: torch.Tensor, source: torch.Tensor | None) -> None:
        original(target, source.detach() if isinstance(source, nn.Parameter) else source)

    setattr(meta_utils, name, copy)
    try:
        with config.patch(fake_tensor_propagate_real_tensors=True, generate_fake_kernels_from_real_mismatches=True):
            yield
    finally:
        setattr(meta_utils, name, original)


@contextlib.contextmanager
def onnx_decompositions(rules: Mapping[OpOverload, Callable[..., Any]]) -> Iterator[None]:
    """Inside, ``torch.onnx.export`` decomposes these operators too, in the pass over a program that it makes anyway.

    A pass of our own before it would trace the program once more, which for a large model takes as long as the rest of
    the translation. The caller holds a lock.
    """
    module, name = "onnx._internal.exporter._decomp", "create_onnx_friendly_decomposition_table"
    with contextlib.suppress(ImportError):  # find says what is missing
        importlib.import_module(f"torch.{module}")
    owner, original = find(module, "exports to ONNX"), find(f"{module}.{name}", "exports to ONNX")

    def make_table(registered: Any) -> dict[OpOverload, Callable[..., Any]]:
        return {**original(registered), **rules}

    setattr(owner, name, make_table)
    try:
        yield
    finally:
        setattr(owner, name, original)


#: Functions of the TorchScript exporter that print and that let C++ print.
_ONNX_LOG = ("_jit_onnx_log", "_jit_set_onnx_log_enabled")


@contextlib.contextmanager
def without_onnx_log() -> Iterator[None]:
    """Inside, the TorchScript exporter does not print graphs that it fails on directly to the process's output.

    The exporter turns its own switch, ``_jit_set_onnx_log_enabled``, on, so this is kept off. The caller holds a lock.
    """
    binding = find("_C", "exports through TorchScript")
    before = {name: find(f"_C.{name}", "exports through TorchScript") for name in _ONNX_LOG}
    binding._jit_set_onnx_log_enabled(False)
    try:
        for name in _ONNX_LOG:
            setattr(binding, name, lambda *_: None)
        yield
    finally:
        for name, function in before.items():
            setattr(binding, name, function)


#: The hooks of the former ``torch.nn.utils.weight_norm`` and ``spectral_norm``, in this order.
WEIGHT_NORM_HOOKS = (WeightNorm, SpectralNorm)

#: The class of spectral normalization as a parametrization.
SPECTRAL_NORM = "torch.nn.utils.parametrizations._SpectralNorm"


def is_of_class(value: object, name: str) -> bool:
    """Whether a value is an instance of the class with this full name."""
    return any(f"{cls.__module__}.{cls.__qualname__}" == name for cls in type(value).__mro__)


def schema_of(overload: OpOverload) -> torch.FunctionSchema:
    """The schema of an operator: its arguments, its results, and which of them share or change memory."""
    return overload._schema


def higher_order_name(target: object) -> str | None:
    """The name of a higher-order operator, such as ``wrap_with_set_grad_enabled``; ``None`` for anything else."""
    return getattr(target, "_name", None)


# --- FSDP2 ----------------------------------------------------------------------------------------------------------


def prepare_fsdp(module: nn.Module, context: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    """Let ``fully_shard`` look at the parameters of a module now, and always inside a context.

    FSDP2 reads parameters by their attributes: at the first call, after ``load_state_dict``, and after ``.to()``.

    Args:
        module: the root, to which ``fully_shard`` was applied.
        context: in which attributes read as the parameters that are registered.

    Raises:
        TorchVersionError: this version of torch does it in another way.
    """
    try:
        with context():
            module._get_fsdp_state()._lazy_init()  # type: ignore[operator]
        states = [part._get_fsdp_state() for part in module.modules() if hasattr(part, "_get_fsdp_state")]  # type: ignore[operator]
        for one in [one for state in states for group in _find_groups(state) for one in group.fsdp_params]:
            one.reset_sharded_param = _inside(context, one.reset_sharded_param)
    except AttributeError as error:
        raise TorchVersionError(
            f"torch {torch.__version__} prepares fully_shard in another way ({error}), which adapter-compiler needs "
            "for shard(adapted); install a version of torch that it was tested with (see pyproject.toml) and report "
            "this one"
        ) from error


def has_unreduced_gradients(module: nn.Module) -> bool:
    """Whether FSDP2 keeps accumulated gradients in a module that it has not reduced over the ranks yet."""
    states = [part._get_fsdp_state() for part in module.modules() if hasattr(part, "_get_fsdp_state")]  # type: ignore[operator]
    parameters = (one for state in states for group in _find_groups(state) for one in group.fsdp_params)
    return any(_keeps_gradient(one) for one in parameters)


def _keeps_gradient(parameter: Any) -> bool:
    """In the dtype of the reduction, or, if that is the gradient's own, beside the gathered parameter."""
    gathered = getattr(parameter, "_unsharded_param", None)
    return parameter.unsharded_accumulated_grad is not None or (gathered is not None and gathered.grad is not None)


def _find_groups(state: Any) -> Sequence[Any]:
    """The parameter groups of a module that FSDP2 shards; earlier versions of torch have one at most."""
    if hasattr(state, "_fsdp_param_groups"):
        found: Sequence[Any] = state._fsdp_param_groups
        return found
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _inside(
    context: Callable[[], contextlib.AbstractContextManager[None]], act: Callable[[], None]
) -> Callable[[], None]:
    def run() -> None:
        with context():
            act()

    return run


__all__ = [
    "EXPORT_LOGGERS",
    "FAKE_TENSOR_LOGGER",
    "FLAT_WEIGHTS",
    "FLAT_WEIGHT_REFS",
    "ONNX_LOGGER",
    "SET_GRAD_ENABLED",
    "SHAPE_LOGGER",
    "SHOWS_SAVED_HOOKS",
    "SPECTRAL_NORM",
    "SUBCLASS_LOGGER",
    "UPDATE_FLAT_WEIGHTS",
    "WEIGHT_NORM_HOOKS",
    "OpOverload",
    "TorchDispatchMode",
    "TorchVersionError",
    "WithoutTorchFunction",
    "clone_lazily",
    "find",
    "find_backend",
    "find_compiler_problem",
    "flat_weight_names",
    "foreach_abs_",
    "foreach_copy_",
    "foreach_div_",
    "foreach_lerp_",
    "foreach_mul",
    "foreach_sub_",
    "foreach_zero_",
    "has_saved_tensor_hooks",
    "has_unreduced_gradients",
    "higher_order_name",
    "is_batched",
    "is_changed_by_user_mode",
    "is_compiled",
    "is_in_dispatch_mode",
    "is_of_class",
    "is_saved_plainly",
    "is_transformed",
    "is_wrapped",
    "make_fx",
    "make_wrapper",
    "no_torch_function",
    "onnx_decompositions",
    "parse_to",
    "prepare_fsdp",
    "pytree",
    "read_saved",
    "renew_flat_weights",
    "schema_of",
    "set_compiled_call",
    "take_guards",
    "values_in_fake_tensors",
    "version_of",
    "without_modes",
    "without_onnx_log",
]
