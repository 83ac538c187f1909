"""What an adapter computes: its parameter shapes, its operators and its ΔW.

A new form is one file here and one entry in :data:`FORMS`. Starting values are not part of a form; see
:mod:`adapter_compiler.adapters.initializers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from passes.forms.base import AdapterForm, Call, Emitter, NodeEmitter, OperatorCall, TensorEmitter, Value
from passes.forms.dora import DoraForm
from passes.forms.lora import LoraForm
from passes.forms.offset import OffsetForm
from passes.forms.routed import MaskedForm, MixtureForm, RoutedForm
from passes.forms.svd import SvdForm

#: The forms by the names that configurations use.
FORMS: Mapping[str, AdapterForm] = {
    form.name: form for form in (SvdForm(), LoraForm(), DoraForm(LoraForm()), DoraForm(SvdForm()))
}

_OFFSET = re.compile(r"^(?P<form>.+)-offset(?P<rank>\d+)$")
_MIXTURE = re.compile(
    r"^(?P<form>svd|lora)-experts(?P<k>\d+)(-top(?P<top>\d+))?(?P<example>-example)?(@(?P<leader>.+))?$"
)
_MASKED = re.compile(r"^(?P<form>svd|lora)-masked@(?P<argument>[^\W\d]\w*)$")


def find_form(name: str) -> AdapterForm:
    """The form with this name, as in ``svd``, ``lora-offset8`` or ``lora-experts4-top2``.

    Raises:
        KeyError: no form has this name.
    """
    if name in FORMS:
        return FORMS[name]
    if (mixture := _MIXTURE.match(name)) is not None:
        return _read_mixture(mixture)
    if (masked := _MASKED.match(name)) is not None:
        return MaskedForm(FORMS[masked["form"]], masked["argument"])
    matched = _OFFSET.match(name)
    if matched is None:
        raise KeyError(name)
    return with_offset(FORMS[matched["form"]], int(matched["rank"]))


def _read_mixture(found: re.Match[str]) -> AdapterForm:
    experts, top = int(found["k"]), int(found["top"] or 0)
    if not (experts > 1 and top < experts):
        raise KeyError(found[0])
    leader = found["leader"] or ""
    return MixtureForm(
        FORMS[found["form"]], experts=experts, top_k=top, per_example=bool(found["example"]), leader=leader
    )


def with_offset(form: AdapterForm, start_rank: int) -> AdapterForm:
    """The form minus its starting values of this rank; an offset that the form already has is replaced."""
    if isinstance(form, DoraForm):
        return DoraForm(with_offset(form.inner, start_rank))
    return OffsetForm(form.core, start_rank)


__all__ = [
    "FORMS",
    "AdapterForm",
    "Call",
    "DoraForm",
    "Emitter",
    "LoraForm",
    "MaskedForm",
    "MixtureForm",
    "NodeEmitter",
    "OffsetForm",
    "OperatorCall",
    "RoutedForm",
    "SvdForm",
    "TensorEmitter",
    "Value",
    "find_form",
    "with_offset",
]
