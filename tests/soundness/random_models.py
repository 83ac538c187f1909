"""The steps that random models are made of, and the changes that may happen to one between calls."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

WIDTH = 6
GLOBALS: dict[str, Any] = {"scale": 1.0}

Step = Callable[[Any, Tensor, int, int], Any]


class Model(nn.Module):
    """A model that runs its steps one after the other.

    Attributes:
        steps: for each, the name, the part that it uses, and a number that it uses.
    """

    def __init__(self, steps: tuple[tuple[str, int, int], ...], *, tied: bool) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.raws = nn.ParameterList([torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(3)])
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(3)])
        self.batch, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(0.4)
        self.embed = nn.Embedding(5, WIDTH)
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))
        self.scale, self.flag, self.table, self.calls = 1.0, True, {"scale": 0.5}, 0
        self.kept: dict[int, Any] = {}
        if tied:
            self.layers[2].weight = self.layers[1].weight

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        for name, part, number in self.steps:
            x = STEPS[name](self, x, part, number)
        return x

    def helper(self, x: Tensor, part: int) -> Any:
        return F.linear(x, self.raws[part]) + self.layers[part](x)


def threshold(number: int) -> float:
    return (number - 4.3) / 10


def break_by_value(m: Any, x: Tensor, part: int, number: int) -> Any:
    for i in range(4):
        if x.mean().item() < threshold(number) and i >= 1:
            break
        x = torch.tanh(m.layers[part](x)) - 0.05
    return x


def value_while(m: Any, x: Tensor, part: int, number: int) -> Any:
    steps = 0
    while x.norm() > 0.5 + number / 4 and steps < 4:
        x = m.layers[part](x) * 0.5
        steps += 1
    return x


def value_try(m: Any, x: Tensor, part: int, number: int) -> Any:
    try:
        if x.sum() < threshold(number):
            raise ValueError
        return m.layers[part](x)
    except ValueError:
        return x @ m.raws[part]


def write_alias(m: Any, x: Tensor, part: int, number: int) -> Any:
    x = m.layers[part](x)
    y = x.view(-1)
    y.mul_(0.5 + number / 10)
    x[:, number % WIDTH] += 1
    return x


def write_row(m: Any, x: Tensor, part: int, number: int) -> Any:
    y = m.layers[part](x)
    y[number % len(y)] = x[0]
    return y.relu_() - 0.3


def without_gradient(m: Any, x: Tensor, part: int, number: int) -> Any:
    with torch.no_grad():
        y = m.layers[part](x)
    return y + x @ m.raws[number % 3]


def by_rows(m: Any, x: Tensor, part: int, number: int) -> Any:
    return torch.stack([m.layers[part](row) if i < number else row @ m.raws[part] for i, row in enumerate(x)])


def in_checkpoint(m: Any, x: Tensor, part: int, number: int) -> Any:
    return checkpoint(lambda x: torch.tanh(m.layers[part](x)) @ m.raws[part], x, use_reentrant=False)


def force(m: Any, x: Tensor, part: int, number: int) -> Any:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = torch.tanh(m.layers[part](leaf)).sum()
        return x + torch.autograd.grad(y, leaf, create_graph=True)[0]


def rescale_weight(m: Any, x: Tensor, part: int, number: int) -> Any:
    if not m.training and m.flag:
        with torch.no_grad():
            m.layers[part].weight.mul_(0.9)
        m.flag = False
    return m.layers[part](x)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient @ weight.t(), x.t() @ gradient


def read_without_gradient(m: Any, x: Tensor, part: int, number: int) -> Any:
    with torch.no_grad():
        weight = m.raws[part]
    return x @ weight.tril() if number % 2 else Product.apply(x, weight)  # type: ignore[no-untyped-call]


def transpose_without_gradient(m: Any, x: Tensor, part: int, number: int) -> Any:
    with torch.no_grad():
        weight = m.raws[part].T
    return x @ weight


def keep_weight(m: Any, x: Tensor, part: int, number: int) -> Any:
    """Read a weight once and use it in all calls, as long as the model has it."""
    weight = m.kept.get(part, (None,))[0]
    registered = m.raws._parameters[str(part)]
    if weight is not registered:
        m.kept[part] = registered, m.raws[part]
    kept = m.kept[part][1]
    return x @ kept.triu() if number % 2 else x + F.pad(F.linear(x, kept[1:5]), (1, 1))


def gradient_of_copy(m: Any, x: Tensor, part: int, number: int) -> Any:
    with torch.enable_grad():
        weight = m.layers[part].weight.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(torch.tanh(F.linear(x.detach(), weight)).sum(), weight)
    return F.linear(x, m.layers[part].weight - gradient * number / 20)


def backward_inside(m: Any, x: Tensor, part: int, number: int) -> Any:
    """Call backward in a forward, and use the same weight again."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        torch.tanh(leaf @ m.raws[part].tril()).sum().backward(inputs=[leaf])
    assert leaf.grad is not None
    return x @ m.raws[part].tril() + leaf.grad


class Scaled(TorchFunctionMode):
    """Changes the result of one function of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 1.5 if func is F.linear else result


def in_mode(m: Any, x: Tensor, part: int, number: int) -> Any:
    with Scaled():
        return F.linear(x, m.layers[part].weight) + m.norms[part](F.linear(x, m.raws[part]))


def write_two_views(m: Any, x: Tensor, part: int, number: int) -> Any:
    if not m.training and m.flag:
        with torch.no_grad():
            first, second = m.layers[part].weight[:2], m.layers[part].weight[3:]
            first.mul_(0.5)
            second.data.add_(0.1)
        m.flag = False
    return m.layers[part](x)


STEPS: dict[str, Step] = {
    "linear": lambda m, x, i, k: m.layers[i](x),
    "linear-by-hand": lambda m, x, i, k: F.linear(x, m.layers[i].weight, m.layers[i].bias),
    "linear-keywords": lambda m, x, i, k: F.linear(input=x, weight=m.layers[i].weight),
    "matmul": lambda m, x, i, k: x @ m.raws[i],
    "matmul-transposed": lambda m, x, i, k: x @ m.raws[i].T,
    "matmul-reversed": lambda m, x, i, k: (m.raws[i] @ x.T).T,
    "addmm": lambda m, x, i, k: torch.addmm(m.shift, x, m.raws[i]),
    "weight-slice": lambda m, x, i, k: x + F.pad(x @ m.raws[i][:, : 1 + k % WIDTH], (0, WIDTH - 1 - k % WIDTH)),
    "weight-cut": lambda m, x, i, k: torch.cat([x @ part for part in m.layers[i].weight.chunk(2, 1)], 1),
    "weight-norm": lambda m, x, i, k: x * m.layers[i].weight.norm() / 2,
    "weight-masked": lambda m, x, i, k: F.linear(x, m.layers[i].weight.tril(), m.layers[i].bias),
    "weight-stack": lambda m, x, i, k: torch.einsum("bi,loi->bo", x, torch.stack([m.layers[i].weight, m.raws[i]])),
    "weight-shape": lambda m, x, i, k: m.layers[i](x) * m.raws[i].shape[0] / m.raws[i].numel(),
    "weight-item": lambda m, x, i, k: m.layers[0 if m.layers[i].weight[0, 0].item() > 0 else 1](x),
    "norm": lambda m, x, i, k: m.norms[i](x),
    "batch-norm": lambda m, x, i, k: m.batch(x) if len(x) > 1 else x,
    "dropout": lambda m, x, i, k: m.drop(x),
    "dropout-by-hand": lambda m, x, i, k: F.dropout(m.layers[i](x), k / 20, m.training),
    "tanh": lambda m, x, i, k: torch.tanh(x),
    "gelu": lambda m, x, i, k: m.layers[i](F.gelu(x)),
    "norm-linear": lambda m, x, i, k: m.layers[i](m.norms[i](x)),
    "relu-in-place": lambda m, x, i, k: F.relu_(x.clone()),
    "scale": lambda m, x, i, k: x * m.scale + m.table["scale"],
    "global": lambda m, x, i, k: x * GLOBALS["scale"],
    "calls": lambda m, x, i, k: x + m.calls / 10,
    "flag": lambda m, x, i, k: m.layers[i](x) if m.flag else x @ m.raws[i],
    "mode": lambda m, x, i, k: m.layers[i](x) if m.training else x @ m.raws[k % 3],
    "grad-mode": lambda m, x, i, k: m.layers[i](x) if torch.is_grad_enabled() else x @ m.raws[i],
    "requires-grad": lambda m, x, i, k: x @ m.raws[i] if x.requires_grad else m.layers[i](x),
    "value": lambda m, x, i, k: m.layers[i](x) if x.mean().item() > threshold(k) else x @ m.raws[i],
    "value-bool": lambda m, x, i, k: m.layers[i if (x > threshold(k)).any() else k % 3](x),
    "value-while": value_while,
    "value-try": value_try,
    "break": break_by_value,
    "index": lambda m, x, i, k: m.layers[int(x.abs().sum().item() * 10) % 3](x),
    "item": lambda m, x, i, k: m.layers[i](x) * (1 + len(str(int(x.sum().item() * 100)))) / 4,
    "sorted": lambda m, x, i, k: m.layers[i](x[sorted(range(len(x)), key=x.sum(1).tolist().__getitem__)]),
    "lookup": lambda m, x, i, k: x + m.embed(x.abs().sum(1).long() % 5),
    "shape": lambda m, x, i, k: m.layers[i](x) if len(x) > k % 5 else x @ m.raws[i],
    "strides": lambda m, x, i, k: m.layers[i](x.t().contiguous().t()) * (2 if x.is_contiguous() else 1),
    "rows": by_rows,
    "alias": write_alias,
    "write-row": write_row,
    "residual": lambda m, x, i, k: x + m.layers[i](torch.tanh(m.layers[k % 3](x))),
    "twice": lambda m, x, i, k: m.layers[i](torch.tanh(m.layers[i](x))),
    "module-and-weight": lambda m, x, i, k: m.layers[i](x) + x @ m.layers[i].weight.t(),
    "helper": lambda m, x, i, k: m.helper(x, i),
    "random": lambda m, x, i, k: m.layers[i](x) if torch.rand(()) < k / 9 else x @ m.raws[i],
    "noise": lambda m, x, i, k: x + torch.randn_like(x) * k / 20,
    "no-grad": without_gradient,
    "detach": lambda m, x, i, k: x.detach() + m.layers[i](x) * 0.5,
    "checkpoint": in_checkpoint,
    "force": force,
    "rescale": rescale_weight,
    "rescale-views": write_two_views,
    "read-without-grad": read_without_gradient,
    "transpose-without-grad": transpose_without_gradient,
    "kept": keep_weight,
    "gradient-of-copy": gradient_of_copy,
    "backward-inside": backward_inside,
    "mode-of-functions": in_mode,
    "weight-whole-slice": lambda m, x, i, k: x @ m.raws[i][:, :WIDTH],
    "weight-text": lambda m, x, i, k: m.layers[i](x) * (1 + len(f"{m.raws[i][0, 0]:.2f}")),
    "weight-rows-in-loop": lambda m, x, i, k: torch.stack([x @ row for row in m.raws[i]], 1),
}


def shift_input(module: Any, args: Any) -> Any:
    return (args[0] + 0.5,)


def double(module: Any, args: Any, output: Any) -> Any:
    return output * 2


def add_size_of_weight(module: Any, args: Any, output: Any) -> Any:
    return output + module.weight.norm()


def scale_gradient(module: Any, gradients: Any, outputs: Any) -> Any:
    return tuple(None if g is None else g * 2 for g in gradients)


class Louder(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * 2


def remove_hooks(m: Any, k: int) -> None:
    for module in m.modules():
        for registry in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            registry.clear()


def swap(m: Any, k: int) -> None:
    layers = list(m.layers)
    i, j = k % 3, (k + 1) % 3
    layers[i], layers[j] = layers[j], layers[i]
    for index, layer in enumerate(layers):
        m.layers[index] = layer


def replace_forward(m: Any, k: int) -> None:
    layer = m.layers[k % 3]
    layer.forward = types.MethodType(lambda self, x: x @ self.weight.t() * 0.5, layer)


def restore_forward(m: Any, k: int) -> None:
    for layer in m.layers:
        layer.__dict__.pop("forward", None)


def change_global(m: Any, k: int) -> None:
    GLOBALS["scale"] = 0.5 + k / 5


def write_weight(m: Any, k: int) -> None:
    with torch.no_grad():
        m.layers[k % 3].weight.mul_(0.5).add_(0.01)
        m.raws[k % 3][k % WIDTH] = 0.1


def fresh(m: Any) -> Tensor:
    return torch.randn(WIDTH, WIDTH).to(m.shift.dtype)


def freshen_parameter(m: Any, k: int) -> None:
    m.layers[0].weight = nn.Parameter(fresh(m), requires_grad=k % 2 == 0)


def freshen_raw(m: Any, k: int) -> None:
    m.raws[k % 3] = nn.Parameter(fresh(m), requires_grad=False)


def freshen_by_loading(m: Any, k: int) -> None:
    m.layers[0].load_state_dict({"weight": fresh(m), "bias": fresh(m)[0]}, strict=False, assign=k % 2 == 0)


def hook_on_weight(m: Any, k: int) -> None:
    weight = m.layers[k % 3].weight
    if weight.requires_grad:
        weight.register_hook(lambda gradient: gradient * (1 + k))


def copy_weight(m: Any, k: int) -> None:
    m.layers[k % 3].weight.data.copy_(m.raws[k % 3].data)


def write_data_of_views(m: Any, k: int) -> None:
    m.raws[k % 3][k % WIDTH].data.fill_(0.2)
    m.layers[k % 3].weight.data[:, k % WIDTH].mul_(0.5)


Change = Callable[[Any, int], object]

#: The names of changes that give W new values, to which ΔW is then added, begin with "fresh".
CHANGES: dict[str, Change] = {
    "scale": lambda m, k: setattr(m, "scale", k / 3),
    "flag": lambda m, k: setattr(m, "flag", k % 2 == 0),
    "table": lambda m, k: m.table.update(scale=k / 3),
    "eps": lambda m, k: setattr(m.norms[k % 3], "eps", 0.1 + k / 9),
    "p": lambda m, k: setattr(m.drop, "p", k / 10),
    "momentum": lambda m, k: setattr(m.batch, "momentum", k / 10),
    "layer-mode": lambda m, k: m.layers[k % 3].train(k % 2 == 0),
    "drop-mode": lambda m, k: m.drop.train(k % 2 == 0),
    "batch-mode": lambda m, k: m.batch.train(k % 2 == 0),
    "bias-none": lambda m, k: setattr(m.layers[k % 3], "bias", None),
    "bias": lambda m, k: setattr(m.layers[k % 3], "bias", nn.Parameter(m.shift * k, requires_grad=False)),
    "buffer": lambda m, k: m.shift.mul_(k / 5),
    "hook": lambda m, k: m.layers[k % 3].register_forward_hook(double),
    "hook-with-weight": lambda m, k: m.layers[k % 3].register_forward_hook(add_size_of_weight),
    "hook-before": lambda m, k: m.layers[k % 3].register_forward_pre_hook(shift_input),
    "hook-on-model": lambda m, k: m.register_forward_hook(double),
    "hook-on-norm": lambda m, k: m.norms[k % 3].register_forward_hook(double),
    "hook-backward": lambda m, k: m.layers[k % 3].register_full_backward_hook(scale_gradient),
    "hooks-removed": remove_hooks,
    "forward": replace_forward,
    "forward-restored": restore_forward,
    "class": lambda m, k: setattr(m.layers[k % 3], "__class__", Louder),
    "swap": swap,
    "share": lambda m, k: m.layers.__setitem__(k % 3, m.layers[0]),
    "new-layer": lambda m, k: m.layers.__setitem__(k % 3, nn.Linear(WIDTH, WIDTH).to(m.shift.dtype)),
    "global": change_global,
    "write": write_weight,
    "write-copy": copy_weight,
    "write-data": write_data_of_views,
    "hook-on-weight": hook_on_weight,
    "fresh-parameter": freshen_parameter,
    "fresh-raw": freshen_raw,
    "fresh-loaded": freshen_by_loading,
    "steps": lambda m, k: setattr(m, "steps", m.steps[1:] + m.steps[:1]),
}
