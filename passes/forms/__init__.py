"""What an adapter computes: parameter shapes, the nodes it becomes, its ΔW.

A new form is one file here, and one entry in :data:`FORMS`.
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
    """The form whose name this is.

    Raises:
        KeyError: there is none.
    """
    if name in FORMS:
        return FORMS[name]
    matched = _OFFSET.match(name)
    if matched is None:
        raise KeyError(name)
    return with_offset(FORMS[matched["form"]], int(matched["rank"]))


def with_offset(form: AdapterForm, start_rank: int) -> AdapterForm:
    """The form counted from starting values of this rank, whether it was before or not."""
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
