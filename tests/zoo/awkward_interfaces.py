"""Awkward interfaces: signatures, inputs and outputs, patched and hooked modules, lazy and scripted ones."""

from __future__ import annotations

import dataclasses
import functools
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.zoo.awkward_base import HIDDEN, WIDTH, describe_awkward, make_mlp, rows, sequences, two_rows


class StarArguments(nn.Module):
    """Forward takes *args and **kwargs and sums what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.positional, self.named = make_mlp(), make_mlp()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return torch.stack([self.positional(x) for x in args] + [self.named(x) for x in kwargs.values()]).sum(0)


class Flagged(nn.Module):
    """Keyword-only arguments: a Python flag, a mode by name, an optional tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"mean": make_mlp(), "last": make_mlp()})
        self.residual = nn.Linear(WIDTH, WIDTH)

    def forward(self, *, x: Tensor, use_residual: bool = False, pool: str = "mean", bias: Tensor | None = None) -> Any:
        pooled = x.mean(1) if pool == "mean" else x[:, -1]
        y = self.heads[pool](pooled)
        y = y + self.residual(pooled) if use_residual else y
        return y if bias is None else y + bias


class DictInput(nn.Module):
    """One argument: a dictionary of tensors with a nested one."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = make_mlp(), make_mlp()

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        hidden = self.main(batch["x"]) + self.side(batch["extra"]["y"])
        return {"prediction": hidden, "auxiliary": {"mean": hidden.mean(0), "name": "auxiliary"}}


class ListInput(nn.Module):
    """One argument: a list of tensors of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.ModuleList([nn.Linear(width, HIDDEN) for width in (8, 12, WIDTH)])
        self.head = nn.Linear(HIDDEN, WIDTH)

    def forward(self, parts: list[Tensor]) -> Any:
        return self.head(torch.stack([enter(x) for enter, x in zip(self.enter, parts, strict=True)]).sum(0).relu())


@dataclasses.dataclass
class Prediction:
    """An output class that torch knows nothing of."""

    mean: Tensor
    log_variance: Tensor
    name: str = "prediction"
    hidden: list[Tensor] = dataclasses.field(default_factory=list)


class DataclassOutput(nn.Module):
    """The output is a dataclass that is not registered with pytree."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.log_variance = make_mlp(), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Prediction:
        hidden = self.body(x)
        return Prediction(mean=self.mean(hidden), log_variance=self.log_variance(hidden), hidden=[x, hidden])


class DataclassBetween(nn.Module):
    """Submodules hand an unregistered dataclass to one another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = DataclassOutput(), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Any:
        prediction = self.first(x)
        return self.second(prediction.mean + prediction.log_variance.exp())


class Scores(NamedTuple):
    """An output tuple with names."""

    logits: Tensor
    best: Tensor
    loss: Tensor | None


class NamedTupleOutput(nn.Module):
    """The output is a NamedTuple with indices and a None in it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_mlp(8)

    def forward(self, x: Tensor) -> Scores:
        logits = self.body(x)
        return Scores(logits=logits, best=logits.argmax(-1), loss=None)


class NestedOutput(nn.Module):
    """Outputs nested in tuples, lists and dictionaries, with None and numbers among them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = make_mlp(), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x)
        return None, [hidden, (self.head(hidden), None)], {"width": x.shape[1], "flag": True}


class DistributionOutput(nn.Module):
    """An actor and a critic: one output is a torch distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.actor, self.critic = make_mlp(), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x)
        return torch.distributions.Categorical(logits=self.actor(hidden), validate_args=False), self.critic(hidden)


class OtherMethod(nn.Module):
    """A submodule is used by a method that is not forward."""

    class Coder(nn.Module):
        """Encodes and decodes; calling it is an error."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

        def encode(self, x: Tensor) -> Any:
            return self.up(x).relu()

        def decode(self, x: Tensor) -> Any:
            return self.down(x)

    def __init__(self) -> None:
        super().__init__()
        self.coder = self.Coder()

    def forward(self, x: Tensor) -> Any:
        return self.coder.decode(self.coder.encode(x))


def forward_doubled(module: nn.Sequential, x: Tensor) -> Tensor:
    """Twice what nn.Sequential computes."""
    for layer in module:
        x = layer(x)
    return 2 * x


class ReplacedForward(nn.Module):
    """Some library replaced forward on an instance."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = make_mlp(), nn.Linear(WIDTH, WIDTH)
        self.inner.forward = types.MethodType(forward_doubled, self.inner)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Any:
        return self.outer(self.inner(x))


def keep_first_feature(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that adds the input's first feature to the result."""

    @functools.wraps(function)
    def wrapper(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(self, x, *args, **kwargs) + x[..., :1]

    return wrapper


class DecoratedForward(nn.Module):
    """Forward is wrapped by a decorator."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_mlp()

    @keep_first_feature
    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.body(x) * scale


class Hooked(nn.Module):
    """Forward hooks and pre-hooks change inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = make_mlp(), nn.Linear(WIDTH, WIDTH)
        self.body.register_forward_pre_hook(lambda module, args: (args[0].tanh(),))
        self.body[0].register_forward_hook(lambda module, args, output: output * 2)
        self.head.register_forward_hook(lambda module, args, kwargs, output: output + args[0], with_kwargs=True)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))


class HiddenModules(nn.Module):
    """Layers in a Python list are no submodules, and their weights no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        for layer in self.hidden:
            x = layer(x).relu()
        return self.head(x)


class Scripted(nn.Module):
    """A ScriptModule among ordinary submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, WIDTH)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.scripted = torch.jit.script(nn.Sequential(nn.Linear(HIDDEN, WIDTH), nn.ReLU()))

    def forward(self, x: Tensor) -> Any:
        return self.last(self.scripted(self.first(x)))


class Lazy(nn.Module):
    """Lazy modules: no shapes before the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.LazyLinear(HIDDEN), nn.LazyLinear(WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.up(x).relu())


def named(batch: int, length: int) -> dict[str, Any]:
    """One row by a name of its own."""
    return {"anything": torch.randn(batch, WIDTH)}


def flagged(batch: int, length: int) -> dict[str, Any]:
    """A sequence with a flag and the name of a mode."""
    return {"x": torch.randn(batch, length, WIDTH), "use_residual": True, "pool": "last"}


def as_dict(batch: int, length: int) -> tuple[Any, ...]:
    """A nested dictionary of rows."""
    return ({"x": torch.randn(batch, WIDTH), "extra": {"y": torch.randn(batch, WIDTH)}, "source": "test"},)


def as_list(batch: int, length: int) -> tuple[Any, ...]:
    """A list of rows of different widths."""
    return ([torch.randn(batch, width) for width in (8, 12, WIDTH)],)


def none(batch: int, length: int) -> tuple[Any, ...]:
    """No positional argument."""
    return ()


INTERFACES = (
    describe_awkward("star-arguments", StarArguments, two_rows, "signature", inputs=named),
    describe_awkward("flagged", Flagged, none, "signature", "python-flag", inputs=flagged),
    describe_awkward("dict-input", DictInput, as_dict, "signature"),
    describe_awkward("list-input", ListInput, as_list, "signature"),
    describe_awkward("dataclass-output", DataclassOutput, rows, "output"),
    describe_awkward("dataclass-between", DataclassBetween, rows, "output"),
    describe_awkward("named-tuple-output", NamedTupleOutput, rows, "output"),
    describe_awkward("nested-output", NestedOutput, rows, "output"),
    describe_awkward("distribution-output", DistributionOutput, rows, "output"),
    describe_awkward("other-method", OtherMethod),
    describe_awkward("replaced-forward", ReplacedForward, rows, "patched"),
    describe_awkward("decorated-forward", DecoratedForward, sequences, "signature"),
    describe_awkward("hooked", Hooked, rows, "hooks"),
    describe_awkward("hidden-modules", HiddenModules, rows, "hidden-parameters"),
    describe_awkward("scripted", Scripted, rows, "script"),
    describe_awkward("lazy", Lazy, rows, "lazy"),
)
