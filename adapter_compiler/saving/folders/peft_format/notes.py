"""What our PEFT folders say besides what PEFT reads: notes in the metadata of the tensors' file.

PEFT ignores the metadata, and warns of fields in its configuration that it does not know, so notes stand here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.primitives.safetensors_header import SafetensorsHeader
from adapter_compiler.saving.quantized_formats import QuantizedFormat, describe_formats, read_formats
from passes.planning.json_schema import Field, Source, check_object, dump_json, is_flag, is_object_of, parse_json

#: Name of the tensors' file in a PEFT folder.
PEFT_WEIGHTS = "adapter_model.safetensors"

_KEY = "adapter_compiler_notes"

_ADVICE = "save the adapters again"

_SCHEMA: Mapping[str, Field] = {
    "version": Field(expected="1", fits=lambda value: type(value) is int and value == 1),
    "transposed": Field(expected="true or false by module", fits=is_object_of(is_flag)),
    "quantized": Field(expected="formats by weight", fits=lambda value: isinstance(value, dict)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftNotes:
    """What a folder says besides.

    Attributes:
        transposed: by module, whether its weight is stored [in, out].
        quantized: the format that each quantized weight had while the adapters were trained.
    """

    transposed: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    quantized: Mapping[str, QuantizedFormat] = dataclasses.field(default_factory=dict)


def make_metadata(notes: PeftNotes) -> dict[str, str]:
    """The metadata of a file of tensors with these notes."""
    source = Source(name="the notes of a PEFT folder", error=CheckpointError, advice=_ADVICE)
    values = {"version": 1, "transposed": dict(notes.transposed), "quantized": describe_formats(notes.quantized)}
    return {"format": "pt", _KEY: dump_json(source, values)}


def read_notes(file: SafetensorsHeader) -> PeftNotes:
    """The notes of a file; none if PEFT itself wrote it.

    Raises:
        CheckpointError: they are damaged, or of another version.
    """
    if _KEY not in file.metadata:
        return PeftNotes()
    source = Source(name=f"{file.path}: {_KEY}", error=CheckpointError, advice=_ADVICE)
    values = check_object(source, "", parse_json(source, file.metadata[_KEY]), _SCHEMA)
    return PeftNotes(transposed=values["transposed"], quantized=read_formats(source, values["quantized"]))
