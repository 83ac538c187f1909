"""Each private API of torch in :mod:`passes.compat` works as needed, and no other module uses private APIs of torch."""

from __future__ import annotations

import contextlib
import copy
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import meta_utils
from torch.distributed.fsdp import fully_shard
from torch.fx import symbolic_trace
from torch.overrides import TorchFunctionMode

from passes import compat
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent.parent

#: Patterns of names of private parts of torch.
PRIVATE = re.compile(
    r"torch\.(\w+\.)*_[a-zA-Z]|from torch[\w.]*\._|import torch\._|(node|grad_fn)\._(raw_)?saved_"
    r"|\._version\b|\._schema\b|forward_ad\._|torch\.fx\.experimental|_init_flat_weights|_flat_weights_names|_guards_fn|_safe_copy"
    r"|_make_wrapper_subclass|_get_fsdp_state|_lazy_init|_fsdp_param_group"
)

#: Exceptions: operators of ATen whose names begin with an underscore, and text that only mentions a private name.
ALLOWED = re.compile(
    r"torch\.ops\.|``torch\.utils\._pytree``|torch\.utils\._pytree\.register_pytree_node|with torch\.utils\._pytree"
)


@pytest.mark.parametrize("package", ["passes", "adapter_compiler"])
def test_private_parts_of_torch_are_named_in_compat_only(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / package).rglob("*.py"))
        if path != ROOT / "passes" / "compat.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if PRIVATE.search(line) and not ALLOWED.search(line)
    ]
    assert found == []


def test_what_is_missing_is_named() -> None:
    with pytest.raises(
        compat.TorchVersionError, match=r"has no torch\._C\._gone, which adapter-compiler needs for a test"
    ):
        compat.find("_C._gone", "a test")


class Wrapper(torch.Tensor):
    """A tensor without storage that records the calls of its ``__torch_function__``."""

    called: list[Any] = []  # noqa: RUF012  shared by all instances

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.called.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return torch.zeros(())


def test_wrappers_have_no_storage_and_torch_function_can_be_disabled() -> None:
    made = compat.make_wrapper(Wrapper, (3, 2), dtype=torch.float64)
    assert made.shape == (3, 2) and made.dtype is torch.float64
    Wrapper.called.clear()
    torch.sum(made)
    assert len(Wrapper.called) == 1
    with compat.WithoutTorchFunction():
        torch.sum(made)
    assert len(Wrapper.called) == 1


def test_no_torch_function_goes_straight_to_dispatch() -> None:
    class Direct(Wrapper):
        __torch_function__ = compat.no_torch_function

    Wrapper.called.clear()
    assert torch.sum(compat.make_wrapper(Direct, (3, 2))).shape == ()
    assert Wrapper.called == []


def test_hooks_on_saved_tensors_are_seen() -> None:
    assert not compat.has_saved_tensor_hooks()
    with torch.autograd.graph.save_on_cpu():
        assert compat.has_saved_tensor_hooks()
    assert not compat.has_saved_tensor_hooks()


def test_a_backward_has_a_number_of_its_own() -> None:
    seen: list[int] = []
    x = torch.ones(2, requires_grad=True)
    for _ in range(2):
        y = x * 2
        y.register_hook(lambda gradient: seen.append(compat.find_backward_number()))
        y.sum().backward()
    assert compat.find_backward_number() == -1
    assert len({*seen, -1}) == 3


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_transforms_are_seen() -> None:
    seen: list[bool] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        seen.append(compat.is_transformed())
        return x.sum()

    x = torch.ones(2, 2)
    note(x)
    torch.func.grad(note)(x)
    torch.vmap(note)(x)
    torch.func.jvp(note, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        note(x)
    torch.jit.trace(note, x, check_trace=False)
    assert seen == [False, True, True, True, True, True]


class Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatch(compat.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) * 2


def test_modes_of_users_are_seen() -> None:
    assert not compat.is_changed_by_user_mode() and not compat.is_in_dispatch_mode()
    with torch.device("cpu"):
        assert not compat.is_changed_by_user_mode()
    with Function():
        assert compat.is_changed_by_user_mode() and not compat.is_in_dispatch_mode()
    with Dispatch():  # type: ignore[no-untyped-call]
        assert compat.is_changed_by_user_mode() and compat.is_in_dispatch_mode()
        assert torch.ones(2).neg().tolist() == [-4.0, -4.0]
        with compat.without_modes():
            assert torch.ones(2).neg().tolist() == [-1.0, -1.0]


def test_tensors_of_transforms_are_seen() -> None:
    seen: list[bool] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        seen.append(compat.is_wrapped(x))
        return x.sum()

    note(torch.ones(2))
    torch.vmap(note)(torch.ones(2, 2))
    torch.func.grad(note)(torch.ones(2))
    assert seen == [False, True, True]


def test_batched_gradients_are_seen() -> None:
    seen: list[bool] = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            seen.append(compat.is_batched(gradient))
            return gradient * 2

    x = torch.ones(2, requires_grad=True)
    y: Any = Double.apply(x)  # type: ignore[no-untyped-call]
    torch.autograd.grad(y, x, torch.ones(2), retain_graph=True)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert seen == [False, True]


def test_a_lazy_clone_does_not_follow_writes() -> None:
    original = torch.ones(4)
    copied = compat.clone_lazily(original)
    original.zero_()
    copied += 1
    assert torch.equal(copied, torch.full((4,), 2.0)) and torch.equal(original, torch.zeros(4))


def test_versions_count_writes_and_are_shared_by_views() -> None:
    x = torch.ones(4)
    view = x[:2]
    before = compat.version_of(x)
    view.mul_(2)
    assert compat.version_of(x) == compat.version_of(view) == before + 1


def test_saved_tensors_of_gelu_silu_and_layer_norm() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    norm = nn.LayerNorm(4)
    for y, names in (
        (F.gelu(x, approximate="tanh"), ("self",)),
        (F.silu(x), ("self",)),
        (norm(x), ("input", "result1", "result2", "weight", "bias")),
    ):
        assert compat.is_saved_plainly(y.grad_fn, *names) == compat.SHOWS_SAVED_HOOKS
        assert torch.equal(compat.read_saved(y.grad_fn, *names)[0], x)
    assert compat.read_saved(F.gelu(x, approximate="tanh").grad_fn, "approximate") == ("tanh",)
    assert compat.read_saved(norm(x).grad_fn, "normalized_shape") == ((4,),)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        hooked = F.gelu(x)
    assert not compat.is_saved_plainly(hooked.grad_fn, "self")
    with pytest.raises(
        compat.TorchVersionError, match=r"GeluBackward0 of torch .* saves other tensors .*recompute=False"
    ):
        compat.read_saved(F.gelu(x).grad_fn, "elsewhere")


def test_kernels_over_lists() -> None:
    def make() -> list[torch.Tensor]:
        return [torch.tensor([-2.0, 4.0])]

    assert torch.equal(compat.foreach_mul(make(), make())[0], torch.tensor([4.0, 16.0]))
    for kernel, args, expected in (
        (compat.foreach_abs_, (), [2.0, 4.0]),
        (compat.foreach_copy_, ([torch.tensor([1.0, 3.0])],), [1.0, 3.0]),
        (compat.foreach_div_, (2.0,), [-1.0, 2.0]),
        (compat.foreach_lerp_, ([torch.zeros(2)], 0.5), [-1.0, 2.0]),
        (compat.foreach_sub_, ([torch.ones(2)],), [-3.0, 3.0]),
        (compat.foreach_zero_, (), [0.0, 0.0]),
    ):
        values = make()
        kernel(values, *args)
        assert values[0].tolist() == expected


def test_arguments_of_to() -> None:
    assert compat.parse_to("cpu", torch.float64)[:2] == (torch.device("cpu"), torch.float64)
    assert compat.parse_to(torch.ones(1, dtype=torch.float16))[1] is torch.float16


def test_flat_weights_of_recurrent_modules() -> None:
    lstm = nn.LSTM(3, 2)
    assert len(getattr(lstm, compat.FLAT_WEIGHTS)) == len(compat.flat_weight_names(lstm)) == 4
    assert callable(getattr(lstm, compat.UPDATE_FLAT_WEIGHTS)) and hasattr(lstm, compat.FLAT_WEIGHT_REFS)
    lstm._parameters["weight_ih_l0"] = nn.Parameter(torch.zeros(8, 3))
    compat.renew_flat_weights(lstm)
    assert any(weight is lstm.weight_ih_l0 for weight in getattr(lstm, compat.FLAT_WEIGHTS))


class Switching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x * 2
        return x + y


def test_recorded_graphs_note_gradient_modes() -> None:
    graph = compat.make_fx(Switching(), pre_dispatch=True)(torch.ones(2))
    assert [n.args[0] for n in graph.graph.nodes if n.target is compat.SET_GRAD_ENABLED] == [False, True]
    program = torch.export.export(Switching(), (torch.ones(2, requires_grad=True),))
    names = [compat.higher_order_name(node.target) for node in program.graph.nodes]
    assert "wrap_with_set_grad_enabled" in names


def test_guards_of_exported_modules_check_their_inputs() -> None:
    exported = torch.export.export(Switching(), (torch.ones(2),)).module()
    assert isinstance(exported, torch.fx.GraphModule)
    guards = compat.take_guards(exported)
    guards(torch.ones(2))
    with pytest.raises((AssertionError, RuntimeError)):
        guards(torch.ones(3))
    assert not exported.graph.find_nodes(op="call_module")
    with pytest.raises(compat.TorchVersionError, match="gives a module without _guards_fn"):
        compat.take_guards(symbolic_trace(Switching()))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.gate > 2 else x * 5


def test_traces_with_values_have_those_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    with compat.values_in_fake_tensors():
        program = torch.export.export(Branching(), (torch.ones(2),), strict=False)
    assert torch.equal(program.module()(torch.ones(2)), torch.full((2,), 2.0))
    monkeypatch.delattr(meta_utils, "_safe_copy")
    with (
        pytest.raises(compat.TorchVersionError, match="branches on parameters by chance"),
        compat.values_in_fake_tensors(),
    ):
        pass


class Untranslatable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.special.bessel_j0(x)
        return y


def test_the_torchscript_exporter_prints_no_graphs(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = ("_C._jit_onnx_log", "_C._jit_set_onnx_log_enabled")
    before = [compat.find(name, "this test") for name in names]
    with warnings.catch_warnings(), compat.without_onnx_log(), pytest.raises(Exception, match="bessel_j0"):
        warnings.simplefilter("ignore")
        torch.onnx.export(Untranslatable(), (torch.ones(2),), tmp_path / "model.onnx", dynamo=False)
    assert capfd.readouterr() == ("", "")
    assert [compat.find(name, "this test") for name in names] == before


def test_schemas_of_operators() -> None:
    assert isinstance(torch.ops.aten.add_.Tensor, compat.OpOverload)
    assert compat.schema_of(torch.ops.aten.add_.Tensor).is_mutable
    assert compat.schema_of(torch.ops.aten.view.default).returns[0].alias_info is not None


def test_loggers_are_those_of_modules() -> None:
    for name in (*compat.EXPORT_LOGGERS, compat.FAKE_TENSOR_LOGGER, compat.SUBCLASS_LOGGER, compat.SHAPE_LOGGER):
        __import__(name)
    __import__(compat.ONNX_LOGGER)


def test_norms_of_weights_are_recognized() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        former = [nn.utils.weight_norm(nn.Linear(2, 3)), nn.utils.spectral_norm(nn.Linear(2, 3))]
    for module, kind in zip(former, compat.WEIGHT_NORM_HOOKS, strict=True):
        hook: Any = next(iter(module._forward_pre_hooks.values()))
        assert [type(hook)] == [kind]
        assert hook.name == "weight"
    present: Any = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3))
    assert compat.is_of_class(present.parametrizations.weight[0], compat.SPECTRAL_NORM)
    assert not compat.is_of_class(present, compat.SPECTRAL_NORM)


def test_fsdp_reads_parameters_inside_the_context() -> None:
    """When it is prepared, and after a state dict was loaded."""
    run_ranks(1, prepare_for_one_rank)


def prepare_for_one_rank() -> None:
    entered: list[bool] = []

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        entered.append(True)
        yield

    model: Any = nn.Linear(4, 4)
    fully_shard(model)
    compat.prepare_fsdp(model, context)
    before = len(entered)
    assert before >= 1
    model.load_state_dict(model.state_dict())
    assert len(entered) > before
    assert not compat.has_unreduced_gradients(model)
    model.set_requires_gradient_sync(False)
    model(torch.ones(2, 4)).sum().backward()
    assert compat.has_unreduced_gradients(model)


def test_a_module_runs_the_function_that_was_set() -> None:
    layer = nn.Linear(2, 2)
    assert not compat.is_compiled(layer)
    compat.set_compiled_call(layer, lambda call: lambda x: call(x) + 1)
    x = torch.randn(3, 2)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias) + 1)
    assert compat.is_compiled(nn.Sequential(layer))
    assert not compat.is_compiled(copy.deepcopy(layer))
    wrapped: Any = torch.compile(nn.Linear(2, 2), backend="eager")
    assert compat.is_compiled(wrapped)


def test_a_missing_compiler_is_found() -> None:
    import torch._inductor.config as inductor

    with inductor.patch({"cpp.cxx": (sys.executable,)}):
        assert compat.find_compiler_problem() is None
    with inductor.patch({"cpp.cxx": ("/nowhere/c++",)}):
        assert "/nowhere/c++" in str(compat.find_compiler_problem())
