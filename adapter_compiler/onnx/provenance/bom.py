"""A CycloneDX bill of materials (ML-BOM) of an ONNX file, by the package cyclonedx-python-lib.

The library has no class for CycloneDX's ``modelCard``, so what the card says is in properties of the component.
"""

from __future__ import annotations

import importlib
import json
import uuid
from pathlib import Path
from typing import Any

from adapter_compiler.errors import MissingDependencyError
from adapter_compiler.onnx.provenance.facts import FileFacts, FileHash, read_facts

_PREFIX = "adapter-compiler"


def make_bom(path: str | Path) -> str:
    """A CycloneDX 1.6 document, as JSON, for a file that this library wrote.

    The component is of type ``machine-learning-model`` and has the SHA-256 of the file; files with its weights are
    components in it, and the packages that made it are dependencies of scope ``excluded``: it runs without them.
    The base weights are its ancestor. Their hash is a property there, because it is over tensors and not over a file.
    The serial number is made from the file's hash.

    Raises:
        ExportError: the file is missing, damaged, or was not written by this library.
        MissingDependencyError: cyclonedx-python-lib is not installed.
    """
    return render_bom(read_facts(Path(path)))


def import_cyclonedx(module: str) -> Any:
    """A module of cyclonedx-python-lib, or of packageurl, which it brings.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"a bill of materials needs the package cyclonedx-python-lib, which cannot be imported ({error}); "
            "install adapter-compiler[provenance]"
        ) from error


def render_bom(facts: FileFacts) -> str:
    """The JSON text."""
    bom_module = import_cyclonedx("cyclonedx.model.bom")
    tools = import_cyclonedx("cyclonedx.model.tool")
    output = import_cyclonedx("cyclonedx.output")
    schema = import_cyclonedx("cyclonedx.schema")
    packages = [_make_package(name, version) for name, version in sorted(facts.description["versions"].items())]
    own = [package for package in packages if package.name == _PREFIX]
    others = [package for package in packages if package.name != _PREFIX]
    model = _make_model(facts)
    bom = bom_module.Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"urn:sha256:{facts.files[facts.name].sha256}"),
        metadata=bom_module.BomMetaData(component=model, tools=tools.ToolRepository(components=own)),
        components=others,
    )
    bom.register_dependency(model, others)
    writer = output.make_outputter(bom, schema.OutputFormat.JSON, schema.SchemaVersion.V1_6)
    return str(writer.output_as_string(indent=2)) + "\n"


def _make_model(facts: FileFacts) -> Any:
    module = import_cyclonedx("cyclonedx.model.component")
    (name, own), *others = facts.files.items()
    weights = [
        module.Component(type=module.ComponentType.FILE, name=other, bom_ref=other, hashes=[_make_hash(one)])
        for other, one in others
    ]
    return module.Component(
        type=module.ComponentType.MACHINE_LEARNING_MODEL,
        name=name,
        bom_ref=name,
        hashes=[_make_hash(own)],
        components=weights,
        pedigree=_make_pedigree(module, facts),
        properties=[_make_property(key, value) for key, value in _list_properties(facts).items()],
    )


def _make_pedigree(module: Any, facts: FileFacts) -> Any:
    digest = facts.description.get("base_weights")
    if digest is None:
        return None
    base = module.Component(
        type=module.ComponentType.MACHINE_LEARNING_MODEL,
        name="base weights",
        bom_ref=f"base weights {digest}",
        properties=[_make_property("base-weights:sha256", digest)],
    )
    return module.Pedigree(ancestors=[base])


def _make_package(name: str, version: str) -> Any:
    module = import_cyclonedx("cyclonedx.model.component")
    known = None if version == "unknown" else version
    purl = import_cyclonedx("packageurl").PackageURL(type="pypi", name=name, version=known)
    return module.Component(
        type=module.ComponentType.LIBRARY,
        name=name,
        version=known,
        purl=purl,
        bom_ref=str(purl),
        scope=module.ComponentScope.EXCLUDED,
    )


def _make_hash(one: FileHash) -> Any:
    module = import_cyclonedx("cyclonedx.model")
    return module.HashType(alg=module.HashAlgorithm.SHA_256, content=one.sha256)


def _make_property(key: str, value: str) -> Any:
    return import_cyclonedx("cyclonedx.model").Property(name=f"{_PREFIX}:{key}", value=value)


def _list_properties(facts: FileFacts) -> dict[str, str]:
    """What the file says of itself, by names of properties."""
    description = facts.description
    found: dict[str, Any] = {"adapters": description["adapters"], "strategy": description["strategy"]}
    if "configuration" in description:
        found["configuration:sha256"] = description["configuration"]
    if "quantized" in description:
        found["quantized"] = description["quantized"]["kind"]
    if "ranks" in description:
        found["ranks"] = json.dumps(description["ranks"], sort_keys=True)
    found["inputs"] = json.dumps(description["inputs"], sort_keys=True)
    found["verification"] = "none" if facts.verification is None else json.dumps(facts.verification, sort_keys=True)
    return found
