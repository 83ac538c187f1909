"""Exchanged adapters on the command line: their reference call, and their verification."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from adapter_compiler.cli.common.target import load_target, with_adapters

if TYPE_CHECKING:
    from adapter_compiler.integrations.exchange.verify import AdapterVerification


def is_exchanged(path: Path) -> bool:
    """Whether a path is an adapter with a manifest, or a folder, which no ONNX file is."""
    from adapter_compiler.saving.exchange.manifest import find_manifest

    return path.is_dir() or find_manifest(path).exists()


def add_reference(written: Path, adapters: Path, target: str) -> None:
    """Run a function's model with the adapters of a folder, and write inputs and outputs beside an adapter."""
    from adapter_compiler.integrations.exchange.reference import write_reference

    found = load_target(target)
    write_reference(written, with_adapters(found.model, adapters), found.args, found.kwargs)


def describe_adapter(path: Path, base: str | None) -> tuple[Any, ...]:
    """Verify an adapter: the result as data, and what is to be shown of it."""
    from adapter_compiler.integrations.exchange.verify import verify_adapter

    is_function = base is not None and ":" in base and not Path(base).exists()
    model = load_target(str(base)).model if is_function else None
    checked = verify_adapter(path, base=None if is_function else base, model=model)
    data = {
        "adapter": str(path),
        "target": checked.target,
        "checks": [dataclasses.asdict(check) for check in checked.checks],
        "not_run": dict(checked.not_run),
    }
    return (data, *_show(checked))


def _show(checked: AdapterVerification) -> Iterator[Any]:
    yield f"{checked.adapter} ({checked.target}) agrees with its manifest"
    table = Table("run time", "compared")
    table.add_column("largest error", justify="right")
    for name in dict.fromkeys(check.run_time for check in checked.checks):
        own = [check for check in checked.checks if check.run_time == name]
        compared = f"ΔW of {len(own)} weights" if name == "our reader" else ", ".join(c.subject for c in own)
        table.add_row(name, compared, f"{max(check.error for check in own):.1e}")
    yield table
    yield from (f"{name}: not run, {reason}" for name, reason in checked.not_run.items())
