"""A detached Ed25519 signature of an ONNX file and of what stands beside it, by the package cryptography.

What is signed is a manifest, ``<file>.manifest.json``: names, sizes and SHA-256 of the file, the files with its
weights, its card and its bill of materials. The signature, ``<file>.manifest.sig``, is the 64 bytes of RFC 8032 over
the bytes of the manifest, as ``openssl pkeyutl -verify -rawin`` reads them. Keys are PEM files as ``openssl genpkey``
writes them.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_compiler.errors import ConfigError, MissingDependencyError, SignatureError
from adapter_compiler.onnx.provenance.facts import FileHash, hash_file
from adapter_compiler.saving.onnx_files.initializers import InitializerFile
from adapter_compiler.saving.primitives.paths import read_file_bytes
from passes.planning.json_schema import Field, Source, check_object, is_count, is_object_of, is_text, parse_json

_FORMAT = "adapter-compiler signed files 1"
_LARGEST_MANIFEST = 1 << 20
_LARGEST_KEY = 1 << 16

_MANIFEST: Mapping[str, Field] = {
    "format": Field(expected=repr(_FORMAT), fits=lambda value: value == _FORMAT),
    "model": Field(expected="the name of the signed model", fits=is_text),
    "files": Field(expected="an object of files", fits=is_object_of(lambda value: isinstance(value, dict))),
}
_FILE: Mapping[str, Field] = {
    "sha256": Field(expected="a hash", fits=is_text),
    "bytes": Field(expected="a size", fits=is_count),
}


def card_of(path: Path) -> Path:
    """Where the model card of a file is."""
    return path.with_name(f"{path.name}.card.md")


def bom_of(path: Path) -> Path:
    """Where the bill of materials of a file is."""
    return path.with_name(f"{path.name}.cdx.json")


def manifest_of(path: Path) -> Path:
    """Where the list of the signed files is."""
    return path.with_name(f"{path.name}.manifest.json")


def signature_of(path: Path) -> Path:
    """Where the signature of that list is."""
    return path.with_name(f"{path.name}.manifest.sig")


def read_private_key(path: Path) -> Any:
    """An Ed25519 private key, from a PEM file without a password.

    Raises:
        ConfigError: the file is missing, or has no such key.
        MissingDependencyError: cryptography is not installed.
    """
    return _read_key(path, "private", "load_pem_private_key", "Ed25519PrivateKey", password=None)


def read_public_key(path: Path) -> Any:
    """An Ed25519 public key, from a PEM file.

    Raises:
        ConfigError: the file is missing, or has no such key.
        MissingDependencyError: cryptography is not installed.
    """
    return _read_key(path, "public", "load_pem_public_key", "Ed25519PublicKey")


def sign(name: str, files: Mapping[str, FileHash], key: Any) -> dict[str, bytes]:
    """The manifest and its signature, by the names of their files.

    Args:
        name: the name of the ONNX file.
        files: hashes of the file and of what is to be signed with it, by name.
        key: what :func:`read_private_key` gave.

    Raises:
        SignatureError: a file is in another folder.
    """
    if inner := [other for other in files if not _is_plain(other)]:
        raise SignatureError(
            f"{name}: its weights are in {inner[0]}, expected files beside it; save it with those there"
        )
    content = {other: {"sha256": one.sha256, "bytes": one.size} for other, one in files.items()}
    data = (json.dumps({"format": _FORMAT, "model": name, "files": content}, indent=2, sort_keys=True) + "\n").encode()
    return {manifest_of(Path(name)).name: data, signature_of(Path(name)).name: key.sign(data)}


def verify_signature(path: str | Path, public_key: str | Path) -> tuple[str, ...]:
    """Check that a file, its weights, card and bill of materials are those that the owner of a key has signed.

    Nothing of the files is parsed before the manifest's signature and their hashes have been checked.

    Args:
        path: the ONNX file.
        public_key: a PEM file with the Ed25519 public key.

    Returns:
        The names of the signed files.

    Raises:
        SignatureError: a file is missing, has another content or is not signed, or the key is another one.
        ConfigError: the public key cannot be read.
        MissingDependencyError: cryptography is not installed.
    """
    path = Path(path)
    key = read_public_key(Path(public_key))
    files = _read_manifest(path, key, str(public_key))
    for name, entry in files.items():
        _assert_unchanged(path, name, entry)
    present = [one.name for one in (card_of(path), bom_of(path)) if os.path.lexists(one)]
    if unsigned := [name for name in (*present, *sorted(InitializerFile(path).external_files())) if name not in files]:
        raise SignatureError(
            f"{path}: {unsigned[0]} belongs to it and is not signed; remove it, or sign the files again"
        )
    return tuple(files)


def _read_manifest(path: Path, key: Any, key_name: str) -> dict[str, Any]:
    """The signed files by name; the signature is checked before the text is parsed."""
    source = Source(name=str(manifest_of(path)), error=SignatureError, advice="sign the files again, or get them again")
    data = read_file_bytes(source, manifest_of(path), _LARGEST_MANIFEST)
    beside = Source(name=str(signature_of(path)), error=SignatureError, advice=source.advice)
    signature = read_file_bytes(beside, signature_of(path), _LARGEST_MANIFEST)
    try:
        key.verify(signature, data)
    except _import_cryptography("cryptography.exceptions").InvalidSignature as error:
        raise SignatureError(
            f"{path}: its manifest was not signed by the owner of {key_name}, or was changed after that; expected a "
            "signature by this key; get the files again, or give the signer's public key"
        ) from error
    manifest = check_object(source, "", parse_json(source, data), _MANIFEST)
    files = manifest["files"]
    if manifest["model"] != path.name or path.name not in files:
        source.refuse("the model", manifest["model"], f"{path.name}, with its hash")
    for name, entry in files.items():
        if not _is_plain(name):
            source.refuse("a file", name, "the name of a file beside it")
        check_object(source, f"file {name}", entry, _FILE)
    return dict(files)


def _assert_unchanged(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    place = path.parent / name
    if not place.is_file():
        raise SignatureError(f"{path}: {name} was signed and is missing at {place}; get the files again")
    found = hash_file(place)
    if (found.sha256, found.size) != (entry["sha256"], entry["bytes"]):
        raise SignatureError(
            f"{path}: {name} was changed after it was signed, found SHA-256 {found.sha256} of {found.size:,} bytes, "
            f"expected {entry['sha256']} of {entry['bytes']:,}; get the files again"
        )


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in the same folder, on every system."""
    return name not in (".", "..") and not set("/\\:\0") & set(name)


def _read_key(path: Path, what: str, load: str, kind: str, **options: Any) -> Any:
    serialization = _import_cryptography("cryptography.hazmat.primitives.serialization")
    ed25519 = _import_cryptography("cryptography.hazmat.primitives.asymmetric.ed25519")
    unsupported = _import_cryptography("cryptography.exceptions").UnsupportedAlgorithm
    advice = "make one with openssl genpkey -algorithm ed25519, and its public key with openssl pkey -pubout"
    source = Source(name=str(path), error=ConfigError, advice=advice)
    data = read_file_bytes(source, path, _LARGEST_KEY)
    try:
        key = getattr(serialization, load)(data, **options)
    except (ValueError, TypeError, unsupported) as error:  # TypeError: it has a password
        source.fail(
            f"it cannot be read as a {what} key ({error}), expected an Ed25519 key in PEM without a password", error
        )
    if not isinstance(key, getattr(ed25519, kind)):
        source.fail(f"it has a {what} key of type {type(key).__name__}, expected Ed25519")
    return key


def _import_cryptography(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"signatures need the package cryptography, which cannot be imported ({error}); "
            "install adapter-compiler[provenance]"
        ) from error
