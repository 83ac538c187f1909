"""The form in which a model is exported: folded, in eval mode, on the CPU, with flat and named outputs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adapter_compiler.adapters.copies import copy_module, share_parameter
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.model.capture.transformers_caches import register_caches
from adapter_compiler.onnx.verification.inputs import bind_to_names, name_leaves, spell_names
from passes.capture.calls import ModuleCall
from passes.capture.module_state import restored_state
from passes.capture.self_check import is_identical
from passes.compat import pytree


class NamedOutputs(nn.Module):
    """Returns the tensors of a module's result as one flat tuple, each once."""

    def __init__(self, module: nn.Module, left_out: Collection[str] = ()) -> None:
        """Wrap a module; :meth:`named_outputs` does not give the outputs of the names ``left_out``."""
        super().__init__()
        self.module = module
        self.left_out = left_out
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """The flat outputs. An argument that is returned is copied: in a file, an output is no input."""
        given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
        outputs = _distinct_tensors(self.compute(*args, **kwargs)).values()
        return tuple(tensor.clone() if id(tensor) in given else tensor for tensor in outputs)

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.module(*args, **kwargs)

    def around(self, module: nn.Module, left_out: Collection[str] = ()) -> NamedOutputs:
        """The same for another copy of the module."""
        return NamedOutputs(module, left_out)

    def named_outputs(self, call: ModuleCall) -> list[tuple[str, torch.Tensor]]:
        """The outputs for a call, named after the keys of what the module returns; the call leaves no trace.

        A name that an input has is given to an output as ``output.<name>``.
        """
        args, kwargs = call.rebuild(call.tensors)
        taken = set(spell_names(call.names))
        with restored_state(self.module):
            outputs = _distinct_tensors(self.compute(*args, **kwargs))
        named = [(f"output.{name}" if name in taken else name, tensor) for name, tensor in outputs.items()]
        return [(name, tensor) for name, tensor in named if name not in self.left_out]

    def find_written_buffers(self, call: ModuleCall) -> list[str]:
        """The buffers that a call changes. In a file they are constants."""
        args, kwargs = call.rebuild(call.tensors)
        before = {name: buffer.detach().clone() for name, buffer in self.module.named_buffers()}
        with restored_state(self.module):
            self.compute(*args, **kwargs)
            after = dict(self.module.named_buffers())
            return [name for name, old in before.items() if not is_identical(old, after.get(name))]


def _distinct_tensors(result: Any) -> dict[str, torch.Tensor]:
    seen: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, leaf in name_leaves(result):
        if isinstance(leaf, torch.Tensor) and seen.setdefault(id(leaf), name) == name:
            tensors[name] = leaf
    return tensors


def prepare_call(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, *, merged: bool
) -> tuple[NamedOutputs, ModuleCall]:
    """The model to export, with its adapters merged or without them, and the example by the names of its arguments.

    Raises:
        ConfigError: the example is empty or not a tuple, or the model is not a module.
    """
    if isinstance(args, torch.Tensor):
        raise ConfigError("example_args is a Tensor, expected a tuple of arguments, as in (x,)")
    if not args and not kwargs:
        raise ConfigError(
            "example_args and example_kwargs are empty, expected the arguments of one call of the model; "
            "give example_args or example_kwargs"
        )
    register_caches()
    prepared = prepare_merged(model) if merged else prepare_base(model)
    return NamedOutputs(prepared), bind_to_names(prepared, _to_cpu(args), _to_cpu(dict(kwargs or {})))


def prepare_merged(model: nn.Module) -> nn.Module:
    """A copy of the model with merged adapters, in eval mode on the CPU; routers and masks stay beside the weights.

    It is frozen: with gradients, PyTorch traces another attention kernel, whose layout the exporter cannot always
    translate.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"export_onnx(adapted_or_model=...) is a {type(model).__name__}, expected an AdaptedModel or a "
            "torch.nn.Module; give the model itself"
        )
    if isinstance(model, AdaptedModel) and any(adapter.form.is_routed for adapter in model.plan):
        return copy.deepcopy(model).eval().cpu().requires_grad_(False)
    if isinstance(model, AdaptedModel):
        return model.fold(parametrized="remove").eval().cpu().requires_grad_(False)
    return prepare_base(model)


def prepare_base(model: nn.Module) -> nn.Module:
    """A copy of the model without its adapters, in eval mode on the CPU."""
    if isinstance(model, AdaptedModel):
        return model.copy_base().eval().cpu()
    return copy_module(model, lambda _, parameter: share_parameter(parameter)).eval().cpu()


def _to_cpu(tree: Any) -> Any:
    """The same nesting with every tensor detached and on the CPU."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().cpu(), tree)
