"""The file that holds an adapter: its name, its version, and what its header says of each site."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.primitives.file_format import FileFormat
from passes.planning.json_schema import (
    Field,
    Source,
    check_object,
    is_count,
    is_finite,
    is_flag,
    is_list_of,
    is_object_of,
    is_string,
    is_text,
)
from passes.planning.plan import AdapterPlan

#: Name of the file in the folder given to ``AdaptedModel.save``.
FILE_NAME = "adapters.safetensors"

#: What a header has under ``sites``; what is in it is checked by :func:`read_sites`.
SITES = Field(expected="an object of sites", fits=lambda value: isinstance(value, dict))

#: What that file is.
ADAPTERS = FileFormat(
    kind=None,
    version=1,
    writer="AdaptedModel.save",
    schema={
        "sites": SITES,
        "aliases": Field(expected="names by name", fits=is_object_of(is_text), required=False),
        "layers": Field(expected="kinds of modules by weight", fits=is_object_of(is_text), required=False),
        "plan": Field(expected="an adapter plan as text", fits=is_text, required=False),
        "options": Field(expected="options by name", fits=lambda value: isinstance(value, dict), required=False),
        "trained": Field(expected="modules by parameter", fits=is_object_of(is_string), required=False),
        "unsaved": Field(expected="a list of names", fits=is_list_of(is_text), required=False),
        "moved": Field(expected="a list of names", fits=is_list_of(is_text), required=False),
        "quantized": Field(
            expected="formats by weight", fits=is_object_of(lambda value: isinstance(value, dict)), required=False
        ),
    },
)

#: What a header says of a site.
_SITE: Mapping[str, Field] = {
    "form": Field(expected="the name of a form", fits=is_text),
    "rank": Field(expected="a number of triplets", fits=is_count),
    "scale": Field(expected="a finite number", fits=is_finite),
    "shape": Field(
        expected="a list of two or more sizes", fits=lambda value: is_list_of(is_count)(value) and len(value) >= 2
    ),
    "transposed": Field(expected="true or false", fits=is_flag),
    "rows": Field(
        expected="[first, end]",
        fits=lambda value: is_list_of(is_count)(value) and len(value) == 2 and value[0] < value[1],
        required=False,
    ),
}


def describe_file(
    plan: AdapterPlan,
    *,
    layers: Mapping[str, str],
    quantized: Mapping[str, Mapping[str, str]],
    trained: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The header of a file with the adapters of a plan.

    Args:
        plan: the adapters.
        layers: the kind of module that each weight belongs to, which other formats depend on.
        quantized: the format of each weight that was quantized while the adapters were trained.
        trained: the entries ``trained``, ``unsaved`` and ``moved``, or none where that is not known.
        options: what the model was compiled with, where that is known; the plan is then written in full.
    """
    aliases = {alias: adapter.site.weight for adapter in plan for alias in adapter.site.aliases}
    known: dict[str, Any] = {"layers": dict(layers), "quantized": dict(quantized)}
    if options is not None:
        known |= {"plan": plan.to_json(), "options": dict(options)}
    known = {key: value for key, value in known.items() if value}
    return {"sites": describe_plan(plan), "aliases": aliases, **known, **trained}


def describe_plan(plan: AdapterPlan) -> dict[str, dict[str, Any]]:
    """What the header of a file must agree with, by site."""
    return {
        adapter.site.name: {
            "form": adapter.form.name,
            "rank": adapter.rank,
            "scale": adapter.scale,
            "shape": list(adapter.site.shape),
            "transposed": adapter.site.transposed,
            **({"rows": list(adapter.site.rows)} if adapter.site.rows else {}),
        }
        for adapter in plan
    }


def read_sites(path: Path, header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a header says of each site, as :func:`describe_plan` gave it.

    Raises:
        CheckpointError: something in it is no description of a site.
    """
    source = Source(name=str(path), error=CheckpointError, advice="save the adapters again")
    return {name: check_object(source, f"site {name}", entry, _SITE) for name, entry in header["sites"].items()}
