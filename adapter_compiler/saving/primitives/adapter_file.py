"""The file that holds an adapter: its name, its version, and what its header says of each site."""

from __future__ import annotations

from typing import Any

from adapter_compiler.saving.primitives.plain_data import FileFormat
from passes.planning.plan import AdapterPlan

#: Name of the file in the folder given to ``AdaptedModel.save``.
FILE_NAME = "adapters.safetensors"

#: What that file is.
ADAPTERS = FileFormat(kind=None, version=1, writer="AdaptedModel.save")


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
