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
from passes.forms.svd import SvdForm

#: The forms by the names that configurations use.
FORMS: Mapping[str, AdapterForm] = {
    form.name: form for form in (SvdForm(), LoraForm(), DoraForm(LoraForm()), DoraForm(SvdForm()))
}

_OFFSET = re.compile(r"^(?P<form>.+)-offset(?P<rank>\d+)$")


def find_form(name: str) -> AdapterForm:
    """The form with this name, as in ``svd`` or ``lora-offset8``.

    Raises:
        KeyError: no form has this name.
    """
    if name in FORMS:
        return FORMS[name]
    matched = _OFFSET.match(name)
    if matched is None:
        raise KeyError(name)
    return with_offset(FORMS[matched["form"]], int(matched["rank"]))


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
    "NodeEmitter",
    "OffsetForm",
    "OperatorCall",
    "SvdForm",
    "TensorEmitter",
    "Value",
    "find_form",
    "with_offset",
]
