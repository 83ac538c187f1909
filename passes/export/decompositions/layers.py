"""Layers and losses that the ONNX exporter has no translation for, or a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

_MEAN, _SUM = 1, 2


def measure_cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross-entropy of logits with smoothed labels or with probabilities; the exporter knows plain labels only."""
    is_index = not target.is_floating_point()
    if is_index and not label_smoothing:
        return NotImplemented  # type: ignore[no-any-return]
    classes = 0 if x.dim() == 1 else 1
    logs = functional.log_softmax(x, classes)
    shape = [-1 if d == classes else 1 for d in range(x.dim())]
    weights = torch.ones_like(logs) if weight is None else weight.reshape(shape).expand(logs.shape)
    if not is_index:
        spread = target * (1 - label_smoothing) + label_smoothing / x.shape[classes]
        losses = -(logs * spread * weights).sum(classes)
        return _reduce(losses, torch.ones_like(losses), reduction)
    is_valid = target != ignore_index
    safe = torch.where(is_valid, target, 0).unsqueeze(classes)
    own_weight = torch.where(is_valid, weights.gather(classes, safe).squeeze(classes), 0.0)
    plain = -logs.gather(classes, safe).squeeze(classes) * own_weight
    smooth = torch.where(is_valid, -(logs * weights).sum(classes), 0.0)
    losses = (1 - label_smoothing) * plain + label_smoothing / x.shape[classes] * smooth
    return _reduce(losses, own_weight, reduction)


def _reduce(losses: Tensor, weights: Tensor, reduction: int) -> Tensor:
    if reduction == _MEAN:
        return losses.sum() / weights.sum()
    return losses.sum() if reduction == _SUM else losses


def average_windows(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pooling with a divisor of its own, which the exporter ignores."""
    if divisor_override is None or ceil_mode:
        return NotImplemented  # type: ignore[no-any-return]
    kernel = (*kernel_size, *kernel_size)[:2]
    averages = functional.avg_pool2d(x, kernel, list(stride) or None, list(padding), ceil_mode, True)
    return averages * (kernel[0] * kernel[1] / divisor_override)


def choose_largest_in_windows(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Adaptive max pooling over windows of different sizes, for an image of fixed size: the values and their places."""
    height, width = x.shape[-2:]
    if not (isinstance(height, int) and isinstance(width, int)):  # type: ignore[redundant-expr]
        return NotImplemented
    if height % output_size[0] == 0 and width % output_size[1] == 0:
        return NotImplemented  # type: ignore[no-any-return]
    rows, columns = _split_windows(height, output_size[0]), _split_windows(width, output_size[1])
    values, places = [], []
    for top, bottom in rows:
        for left, right in columns:
            window = x[..., top:bottom, left:right].flatten(-2)
            index = window.argmax(-1)
            values.append(window.amax(-1))
            places.append((index // (right - left) + top) * width + index % (right - left) + left)
    shape = (*x.shape[:-2], len(rows), len(columns))
    return torch.stack(values, -1).reshape(shape), torch.stack(places, -1).reshape(shape)


def _split_windows(size: int, count: int) -> list[tuple[int, int]]:
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


RULES: Mapping[str, Callable[..., object]] = {
    "aten::cross_entropy_loss": measure_cross_entropy,
    "aten::avg_pool2d": average_windows,
    "aten::adaptive_max_pool2d": choose_largest_in_windows,
}
