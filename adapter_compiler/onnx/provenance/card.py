"""A model card in Markdown, made from what an ONNX file says of itself."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from adapter_compiler.onnx.provenance.facts import FileFacts, read_facts

_ADAPTERS = {
    "merged": "merged into the weights",
    "runtime": "inputs of the file; without them it is the base model",
    "none": "none",
}


def make_card(path: str | Path) -> str:
    """The model card of a file that ``export_onnx``, ``fold_files`` or ``quantize_onnx`` wrote.

    It has what is in the file's metadata and its hashes. What no file knows, such as the training data and the intended
    use, is listed at its end for the author to add.

    Raises:
        ExportError: the file is missing, damaged, or was not written by this library.
    """
    return render_card(read_facts(Path(path)))


def render_card(facts: FileFacts) -> str:
    """The text of the card; names from the file cannot become markup."""
    parts = (_describe_files, _describe_making, _describe_inputs, _describe_adapters, _describe_verification)
    lines = [f"# Model card: {_code(facts.name)}"]
    for part in parts:
        lines += ["", *part(facts)]
    return "\n".join([*lines, "", *_LEFT_TO_THE_AUTHOR, ""])


_LEFT_TO_THE_AUTHOR = (
    "## Not in the file",
    "",
    "Intended use, training data, license, limits and risks are not recorded by the export.",
)


def _describe_files(facts: FileFacts) -> Iterator[str]:
    yield "## Files"
    yield ""
    rows = [(_code(name), f"{one.size:,}", _code(one.sha256)) for name, one in facts.files.items()]
    yield from _table(("file", "bytes", "SHA-256"), rows)


def _describe_making(facts: FileFacts) -> Iterator[str]:
    description = facts.description
    yield "## How it was made"
    yield ""
    rows = [(_code(name), _code(version)) for name, version in sorted(description["versions"].items())]
    yield from _table(("package", "version"), rows)
    yield ""
    yield f"- Exported by {_code(description['strategy'])}"
    yield f"- SHA-256 of the base weights: {_code(description.get('base_weights') or 'not recorded')}"
    if "quantized" in description:
        yield f"- Quantized: {_code(description['quantized']['kind'])}"
    yield from (f"- Constant in the file: {_code(what)}" for what in description.get("frozen", ()))


def _describe_inputs(facts: FileFacts) -> Iterator[str]:
    yield "## Inputs of the example"
    yield ""
    rows = [
        (_code(name), _code(one["dtype"]), " × ".join(map(str, one["shape"])), f"{one['low']:.6g} to {one['high']:.6g}")
        for name, one in facts.description["inputs"].items()
    ]
    yield from _table(("input", "dtype", "shape", "values"), rows)


def _describe_adapters(facts: FileFacts) -> Iterator[str]:
    description = facts.description
    yield "## Adapters"
    yield ""
    yield f"- Adapters: {_ADAPTERS.get(description['adapters'], _code(description['adapters']))}"
    if "configuration" in description:
        yield f"- SHA-256 of their configuration: {_code(description['configuration'])}"
    ranks = description.get("ranks", {})
    if names := [*dict.fromkeys((*ranks, *facts.updates))]:
        yield ""
        rows = [
            (_code(n), str(ranks.get(n, "")), f"{facts.updates[n]:.4g}" if n in facts.updates else "") for n in names
        ]
        yield from _table(("weight", "rank", "‖ΔW‖"), rows)


def _describe_verification(facts: FileFacts) -> Iterator[str]:
    yield "## Verification"
    yield ""
    found = facts.verification
    if found is None:
        yield "None is recorded: the file was changed after its export, or exported by an older version."
        return
    yield f"Compared with {_code(found['against'])} on {found['inputs']} inputs; largest errors:"
    yield ""
    rows = [(_code(n), _number(one["max_abs"]), _number(one["max_rel"])) for n, one in found["outputs"].items()]
    yield from _table(("output", "absolute", "relative"), rows)
    if found["rows"]:
        yield ""
        yield f"{found['rows']:,} samples of the author's are among what it was compared on."
    if found["not_verified"]:
        yield ""
        yield from (f"- Not verified on {_code(case)}: the model itself refuses it" for case in found["not_verified"])


def _number(value: Any) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _code(text: str) -> str:
    """A text from the file in one line, as code. HTML, because Markdown's own code has no escapes for ` and |."""
    escaped = html.escape(" ".join(text.split()))
    for mark in "|`*_[]\\":
        escaped = escaped.replace(mark, f"&#{ord(mark)};")
    return f"<code>{escaped}</code>"
