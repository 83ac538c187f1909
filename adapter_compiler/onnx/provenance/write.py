"""Write what is wanted of card, bill of materials and signature beside an ONNX file."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from adapter_compiler.errors import SignatureError
from adapter_compiler.onnx.provenance.bom import import_cyclonedx, render_bom
from adapter_compiler.onnx.provenance.card import render_card
from adapter_compiler.onnx.provenance.facts import FileFacts, hash_bytes, read_facts
from adapter_compiler.onnx.provenance.signature import (
    bom_of,
    card_of,
    read_private_key,
    sign,
)
from adapter_compiler.saving.primitives.files import written_beside


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """What is written beside an ONNX file.

    Attributes:
        card: a model card in Markdown, ``<file>.card.md``.
        bom: a CycloneDX bill of materials, ``<file>.cdx.json``; needs ``adapter-compiler[provenance]``.
        key: a PEM file with an Ed25519 private key, to sign all of them: ``<file>.manifest.json`` and
            ``<file>.manifest.sig``; needs ``adapter-compiler[provenance]``.
    """

    card: bool = True
    bom: bool = False
    key: str | Path | None = None

    def assert_ready(self) -> None:
        """Raise, before anything is written, if a package is missing or the key cannot be read.

        Raises:
            ConfigError: the key cannot be read.
            MissingDependencyError: a package is missing.
        """
        if self.bom:
            import_cyclonedx("cyclonedx")
        if self.key is not None:
            read_private_key(Path(self.key))


def write_provenance(path: str | Path, provenance: Provenance) -> tuple[Path, ...]:
    """Describe and sign a finished file; all is written or nothing.

    A card or a bill of materials that is not wanted but stands there stays, and is signed too: so a card that its
    author has completed is signed by ``Provenance(card=False, key=...)``.

    Args:
        path: a file that ``export_onnx``, ``export_decoder``, ``fold_files`` or ``quantize_onnx`` wrote.
        provenance: what to write; it replaces what stands there.

    Returns:
        The files that were written.

    Raises:
        ConfigError: the key cannot be read.
        ExportError: the file is missing, damaged, or was not written by this library.
        MissingDependencyError: a package is missing.
        SignatureError: weights are in another folder, or a card or bill of materials is about another file.
    """
    path = Path(path)
    provenance.assert_ready()
    facts = read_facts(path)
    contents: dict[str, bytes] = {}
    if provenance.card:
        contents[card_of(path).name] = render_card(facts).encode()
    if provenance.bom:
        contents[bom_of(path).name] = render_bom(facts).encode()
    if provenance.key is not None:
        described = {**_read_present(path, facts, contents), **contents}
        hashes = {name: hash_bytes(data) for name, data in described.items()}
        contents |= sign(path.name, {**facts.files, **hashes}, read_private_key(Path(provenance.key)))
    if not contents:
        return ()
    with written_beside(path.with_name(list(contents)[-1])) as draft:
        for name, data in contents.items():
            draft.with_name(name).write_bytes(data)
    return tuple(path.with_name(name) for name in contents)


def _read_present(path: Path, facts: FileFacts, replaced: Collection[str]) -> dict[str, bytes]:
    """The card and the bill of materials that stay beside a file, by name; they must be about these bytes."""
    digest = facts.files[path.name].sha256
    kept = [one for one in (card_of(path), bom_of(path)) if one.is_file() and one.name not in replaced]
    found = {one.name: one.read_bytes() for one in kept}
    for name, data in found.items():
        if digest.encode() not in data:
            raise SignatureError(
                f"{path}: {name} does not have the file's SHA-256 {digest}, so it is about another one; write it again "
                "with write_provenance, or remove it"
            )
    return found
