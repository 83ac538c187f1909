"""Functions of single values that the ONNX exporter has no translation for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

_SHIFT = 8
#: B_2k / (2k (2k-1)), the coefficients of Stirling's series (Abramowitz and Stegun 6.1.41).
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188)

#: Numerators and denominators of the quantile of the normal distribution, constants first (Wichura 1988, AS 241), by
#: the variable q² near the center and √(-ln p) in the tails.
_CENTER = (
    (
        3.3871328727963666080e0,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ),
    (
        1.0,
        4.2313330701600911252e1,
        6.8718700749205790830e2,
        5.3941960214247511077e3,
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ),
)
_TAIL = (
    (
        1.42343711074968357734e0,
        4.63033784615654529590e0,
        5.76949722146069140550e0,
        3.64784832476320460504e0,
        1.27045825245236838258e0,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ),
    (
        1.0,
        2.05319162663775882187e0,
        1.67638483018380384940e0,
        6.89767334985100004550e-1,
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)
_FAR_TAIL = (
    (
        6.65790464350110377720e0,
        5.46378491116411436990e0,
        1.78482653991729133580e0,
        2.96560571828504891230e-1,
        2.65321895265761230930e-2,
        1.24266094738807843860e-3,
        2.71155556874348757815e-5,
        2.01033439929228813265e-7,
    ),
    (
        1.0,
        5.99832206555887937690e-1,
        1.36929880922735805310e-1,
        1.48753612908506148525e-2,
        7.86869131145613259100e-4,
        1.84631831751005468180e-5,
        1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ),
)


def log_gamma(x: Tensor) -> Tensor:
    """``torch.lgamma``: ln |Γ(x)| elementwise, computed in float64 and cast to the dtype of x."""
    wide = x.to(torch.float64)
    mirrored = wide < 0.5
    positive = torch.where(mirrored, 1 - wide, wide)
    shifted = positive + _SHIFT
    inverse = 1 / shifted
    series = (shifted - 0.5) * shifted.log() - shifted + 0.5 * math.log(2 * math.pi)
    for power, coefficient in enumerate(_STIRLING):
        series = series + coefficient * inverse.pow(2 * power + 1)
    for step in range(_SHIFT):
        series = series - (positive + step).log()
    reflected = math.log(math.pi) - torch.sin(math.pi * wide).abs().log() - series
    return torch.where(mirrored, reflected, series).to(x.dtype)


def multivariate_log_gamma(x: Tensor, p: int) -> Tensor:
    """ln Γ_p(x) = p (p - 1) / 4 · ln π + Σ_(j < p) ln Γ(x - j / 2)."""
    terms = [log_gamma(x - j / 2) for j in range(p)]
    return torch.stack(terms).sum(0) + p * (p - 1) / 4 * math.log(math.pi)


def digamma(x: Tensor) -> Tensor:
    """The derivative of ln |Γ(x)|, computed in float64 and cast back."""
    wide = x.to(torch.float64)
    is_mirrored = wide < 0.5
    positive = torch.where(is_mirrored, 1 - wide, wide)
    shifted = positive + _SHIFT
    series = shifted.log() - 0.5 / shifted
    for power, coefficient in enumerate(_STIRLING):
        series = series - (2 * power + 1) * coefficient / shifted.pow(2 * power + 2)
    for step in range(_SHIFT):
        series = series - 1 / (positive + step)
    cotangent = torch.cos(math.pi * wide) / torch.sin(math.pi * wide)
    reflected = series - math.pi * cotangent
    return torch.where(is_mirrored, reflected, series).to(x.dtype)


def invert_normal_distribution(p: Tensor) -> Tensor:
    """The value below which a standard normal one is with probability p."""
    wide = p.to(torch.float64)
    return _find_quantile(wide - 0.5, torch.minimum(wide, 1 - wide)).to(p.dtype)


def invert_erf(x: Tensor) -> Tensor:
    """The value whose error function is x."""
    wide = x.to(torch.float64)
    return (_find_quantile(wide / 2, (1 - wide.abs()) / 2) / math.sqrt(2)).to(x.dtype)


def _find_quantile(q: Tensor, tail: Tensor) -> Tensor:
    """The normal quantile of the probability 1/2 + q; ``tail`` is the probability beyond it."""
    square = 0.180625 - q.square()
    center = q * _divide(_CENTER, square)
    root = (-tail.log()).sqrt()
    beyond = torch.where(root <= 5, _divide(_TAIL, root - 1.6), _divide(_FAR_TAIL, root - 5))
    # Far out the polynomials' quotient tends to a constant, where the quantile is infinite.
    beyond = torch.where(tail == 0, math.inf, beyond)
    return torch.where(q.abs() <= 0.425, center, q.sign() * beyond)


def _divide(polynomials: tuple[Sequence[float], Sequence[float]], x: Tensor) -> Tensor:
    above, below = (_evaluate(coefficients, x) for coefficients in polynomials)
    return above / below


def _evaluate(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Σ c_i x^i by Horner's rule."""
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result


def measure_hypotenuse(a: Tensor, b: Tensor) -> Tensor:
    """√(a² + b²), whose squares may be beyond the dtype's range."""
    a, b = torch.broadcast_tensors(a.abs(), b.abs())
    large, small = torch.maximum(a, b), torch.minimum(a, b)
    ratio = torch.where(large == 0, 0.0, small / large)
    return torch.where(a.isinf() | b.isinf(), math.inf, large * (1 + ratio.square()).sqrt())


def copy_sign(x: Tensor, sign: Tensor | float) -> Tensor:
    """|x| with the sign of another tensor or number, that of zero as well."""
    if not isinstance(sign, Tensor):
        return x.abs() * math.copysign(1.0, sign)
    x, signs = torch.broadcast_tensors(x, sign)
    return torch.where(torch.signbit(signs), -x.abs(), x.abs())


def choose_larger(a: Tensor, b: Tensor) -> Tensor:
    """The larger of two values, or the one that is not nan."""
    return torch.where(a.isnan(), b, torch.where(b.isnan(), a, torch.maximum(a, b)))


def choose_smaller(a: Tensor, b: Tensor) -> Tensor:
    """The smaller of two values, or the one that is not nan."""
    return torch.where(a.isnan(), b, torch.where(b.isnan(), a, torch.minimum(a, b)))


def leak_at_mean_rate(
    x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, generator: object = None
) -> Tensor:
    """The randomized leaky ReLU in eval mode."""
    return NotImplemented if training else torch.nn.functional.leaky_relu(x, (lower + upper) / 2)


RULES: Mapping[str, Callable[..., Tensor]] = {
    "aten::lgamma": log_gamma,
    **dict.fromkeys(("aten::mvlgamma", "aten::special_multigammaln"), multivariate_log_gamma),
    **dict.fromkeys(("aten::digamma", "aten::special_digamma", "aten::special_psi"), digamma),
    **dict.fromkeys(("aten::erfinv", "aten::special_erfinv"), invert_erf),
    "aten::special_ndtri": invert_normal_distribution,
    "aten::hypot": measure_hypotenuse,
    "aten::copysign": copy_sign,
    "aten::fmax": choose_larger,
    "aten::fmin": choose_smaller,
    "aten::rrelu": leak_at_mean_rate,
}
