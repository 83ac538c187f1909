"""Card, bill of materials and signature: what they say is what is in the file, and no change goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import adapter_compiler as ac
from adapter_compiler.cli.main import app
from adapter_compiler.errors import ConfigError, ExportError, MissingDependencyError, SignatureError
from adapter_compiler.onnx import Provenance, export_onnx, verify_signature, write_provenance
from adapter_compiler.onnx.provenance.base_weights import hash_base_weights, hash_tensors
from adapter_compiler.onnx.provenance.card import make_card
from adapter_compiler.onnx.quantize import quantize_onnx
from adapter_compiler.saving.folding.fold_files import fold_files
from adapter_compiler.saving.onnx_files.metadata import METADATA_KEY, read_metadata, read_verification

SIGNED = ("model.onnx", "model.onnx.card.md", "model.onnx.cdx.json")
BESIDE = ("model.onnx.manifest.json", "model.onnx.manifest.sig")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Any, Any]:
    """An exported adapted model, the base model, the adapted one, and the report."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).eval(), torch.randn(5, 6)
    adapted = ac.compile_with_adapters(model, (x,), config=ac.AdapterConfig(rank=2))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.4)
    folder = tmp_path_factory.mktemp("exported")
    report = export_onnx(adapted, folder / "model.onnx", (x,), provenance=Provenance())
    adapted.save(folder / "adapters")
    save_file(dict(model.state_dict()), folder / "base.safetensors")
    export_onnx(model, folder / "base.onnx", (x,))
    return folder, model, adapted, report


@pytest.fixture
def folder(exported: tuple[Path, nn.Module, Any, Any], tmp_path: Path) -> Path:
    """A copy of the exported file alone."""
    shutil.copy(exported[0] / "model.onnx", tmp_path / "model.onnx")
    return tmp_path


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    key, encoding = ed25519.Ed25519PrivateKey.generate(), serialization.Encoding.PEM
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def signed(folder: Path) -> tuple[Path, Path]:
    """A signed file with card and bill of materials, and the public key."""
    pytest.importorskip("cyclonedx")
    private, public = make_keys(folder, "key")
    write_provenance(folder / "model.onnx", Provenance(bom=True, key=private))
    return folder / "model.onnx", public


def read_record(path: Path) -> dict[str, Any] | None:
    return read_verification(onnx.load(path), path.name)


def test_a_file_records_how_it_was_verified(exported: tuple[Path, nn.Module, Any, Any]) -> None:
    folder, _, _, report = exported
    record = read_record(folder / "model.onnx")
    assert record is not None
    errors = {"max_abs": report.max_abs_error, "max_rel": report.max_rel_error}
    assert record == {
        "against": "PyTorch",
        "inputs": len(report.cases),
        "outputs": {"output": errors},
        "rows": 0,
        "not_verified": [],
    }


def test_a_changed_file_does_not_keep_the_record(exported: tuple[Path, nn.Module, Any, Any], tmp_path: Path) -> None:
    """A fold drops it, and a quantized copy has one of its own."""
    folder, _, _, report = exported
    fold_files(folder / "base.onnx", folder / "adapters", tmp_path / "folded.onnx")
    assert read_record(folder / "base.onnx") is not None
    assert read_record(tmp_path / "folded.onnx") is None
    assert "None is recorded" in make_card(tmp_path / "folded.onnx")
    small = quantize_onnx(folder / "base.onnx", tmp_path / "small.onnx", kind="int8")
    record = read_record(tmp_path / "small.onnx")
    assert record is not None and record["against"] == "base.onnx"
    assert record["outputs"]["output"]["max_rel"] == small.max_rel_error > report.max_rel_error
    assert "Quantized: <code>int8</code>" in make_card(tmp_path / "small.onnx")


def test_the_base_weights_have_one_hash(exported: tuple[Path, nn.Module, Any, Any]) -> None:
    """The adapted model has that of the model it was made from; each bit, name and shape counts."""
    folder, model, adapted, _ = exported
    digest = hash_base_weights(model)
    assert digest == hash_base_weights(adapted)
    files = (folder / "model.onnx", folder / "base.onnx")
    assert [read_metadata(onnx.load(f), f.name)["base_weights"] for f in files] == [digest, digest]
    w = torch.arange(6.0, dtype=torch.bfloat16).reshape(2, 3)
    changed = w.clone()
    changed[1, 2] += 1
    others = [{"w": changed}, {"v": w}, {"w": w.reshape(3, 2)}, {"w": w.view(torch.int16)}, {}]
    assert len({hash_tensors({"w": w}), *map(hash_tensors, others)}) == 6
    assert hash_tensors({"w": w.t().contiguous().t()}) == hash_tensors({"w": w})
    assert hash_tensors({"w": w.to("meta")}) is None


def test_the_card_says_what_is_in_the_file(exported: tuple[Path, nn.Module, Any, Any]) -> None:
    folder, model, _, report = exported
    card = (folder / "model.onnx.card.md").read_text(encoding="utf-8")
    assert card == make_card(folder / "model.onnx")
    description = read_metadata(onnx.load(folder / "model.onnx"), "")
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    for text in (digest, description["configuration"], hash_base_weights(model), str(torch.__version__)):
        assert f"<code>{text}</code>" in card
    norm = description["updates"]["0.weight"]
    assert f"| <code>0.weight</code> | 2 | {norm:.4g} |" in card
    assert f"on {len(report.cases)} inputs" in card
    assert f"| <code>output</code> | {report.max_abs_error:.1e} | {report.max_rel_error:.1e} |" in card


def test_names_in_a_file_do_not_become_markup(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    (entry,) = (entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    entry.value = json.dumps({**json.loads(entry.value), "strategy": "a</code>|`b`\n# <b>[c](d)"})
    onnx.save(model, folder / "model.onnx")
    card = make_card(folder / "model.onnx")
    assert "a&lt;/code&gt;&#124;&#96;b&#96; # &lt;b&gt;&#91;c&#93;(d)" in card


def test_a_file_of_another_program_has_no_card(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(ExportError, match=r"model\.onnx was not exported by adapter-compiler"):
        make_card(folder / "model.onnx")


def test_the_bill_of_materials_is_valid(folder: Path, exported: tuple[Path, nn.Module, Any, Any]) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    pytest.importorskip("jsonschema")
    schema = pytest.importorskip("cyclonedx.schema")
    write_provenance(folder / "model.onnx", Provenance(card=False, bom=True))
    text = (folder / "model.onnx.cdx.json").read_text(encoding="utf-8")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace("machine-learning-model", "machine")) is not None
    bom = json.loads(text)
    model = bom["metadata"]["component"]
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    assert (model["type"], model["hashes"]) == ("machine-learning-model", [{"alg": "SHA-256", "content": digest}])
    (base,) = model["pedigree"]["ancestors"]
    assert base["properties"][0]["value"] == hash_base_weights(exported[1])
    assert {one["name"] for one in bom["components"]} == {"onnx", "onnxruntime", "torch"}
    (edges,) = (one["dependsOn"] for one in bom["dependencies"] if one["ref"] == model["bom-ref"])
    assert edges == sorted(one["bom-ref"] for one in bom["components"])
    assert [one["name"] for one in bom["metadata"]["tools"]["components"]] == ["adapter-compiler"]


def test_signed_files_are_verified(signed: tuple[Path, Path]) -> None:
    path, public = signed
    assert verify_signature(path, public) == SIGNED


@pytest.mark.parametrize("name", [*SIGNED, *BESIDE])
def test_every_changed_byte_is_found(signed: tuple[Path, Path], name: str) -> None:
    path, public = signed
    place = path.with_name(name)
    data = place.read_bytes()
    for position in (0, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[position] ^= 1
        place.write_bytes(changed)
        with pytest.raises(SignatureError, match=r"was changed after"):
            verify_signature(path, public)
    place.write_bytes(data + b" ")
    with pytest.raises(SignatureError, match=r"was changed after"):
        verify_signature(path, public)
    place.write_bytes(data)
    assert verify_signature(path, public) == SIGNED


@pytest.mark.parametrize("name", [*SIGNED, *BESIDE])
def test_a_missing_file_is_found(signed: tuple[Path, Path], name: str) -> None:
    path, public = signed
    path.with_name(name).unlink()
    with pytest.raises(SignatureError, match=name.replace(".", r"\.")):
        verify_signature(path, public)


def test_a_wrong_key_is_found(signed: tuple[Path, Path]) -> None:
    path, _ = signed
    private, other = make_keys(path.parent, "other")
    with pytest.raises(SignatureError, match=r"was not signed by the owner of .*other\.pub"):
        verify_signature(path, other)
    with pytest.raises(ConfigError, match="cannot be read as a public key"):
        verify_signature(path, private)


def test_a_signature_is_for_one_name(signed: tuple[Path, Path]) -> None:
    """Signed files cannot stand in for others that the same key has signed."""
    path, public = signed
    for name in (SIGNED[0], *BESIDE):
        shutil.copy(path.with_name(name), path.with_name(name.replace("model", "bigger", 1)))
    with pytest.raises(SignatureError, match=r"the model is 'model\.onnx', expected bigger\.onnx"):
        verify_signature(path.with_name("bigger.onnx"), public)


def test_a_card_that_was_not_signed_is_refused(folder: Path) -> None:
    path, (private, public) = folder / "model.onnx", make_keys(folder, "key")
    write_provenance(path, Provenance(card=False, key=private))
    assert verify_signature(path, public) == ("model.onnx",)
    write_provenance(path, Provenance())
    with pytest.raises(SignatureError, match=r"model\.onnx\.card\.md belongs to it and is not signed"):
        verify_signature(path, public)
    card = folder / "model.onnx.card.md"
    card.write_text(card.read_text(encoding="utf-8") + "Intended use: tests.\n", encoding="utf-8")
    write_provenance(path, Provenance(card=False, key=private))
    assert verify_signature(path, public) == SIGNED[:2] and "Intended use: tests." in card.read_text(encoding="utf-8")
    card.write_text("about another file", encoding="utf-8")
    with pytest.raises(SignatureError, match="so it is about another one"):
        write_provenance(path, Provenance(card=False, key=private))


def test_weights_beside_the_file_are_signed(folder: Path) -> None:
    path, (private, public) = folder / "model.onnx", make_keys(folder, "key")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    write_provenance(path, Provenance(key=private))
    assert verify_signature(path, public) == ("model.onnx", "model.onnx.card.md", "model.onnx.data")
    weights = folder / "model.onnx.data"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in make_card(path)
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(SignatureError, match=r"model\.onnx\.data was changed after it was signed"):
        verify_signature(path, public)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_reads_the_signature(signed: tuple[Path, Path]) -> None:
    path, public = signed
    manifest, signature = (str(path.with_name(name)) for name in BESIDE)
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin", "-in", manifest]
    done = subprocess.run([*command, "-sigfile", signature], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "Signature Verified Successfully")


def test_a_missing_package_is_named_before_anything_is_written(
    exported: tuple[Path, nn.Module, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = exported[2]
    for module in ("cyclonedx", "cryptography.hazmat.primitives.serialization"):
        monkeypatch.setitem(sys.modules, module, None)
    for wanted in (Provenance(bom=True), Provenance(key=tmp_path / "key.pem")):
        with pytest.raises(MissingDependencyError, match=r"install adapter-compiler\[provenance\]"):
            export_onnx(adapted, tmp_path / "model.onnx", (torch.randn(5, 6),), provenance=wanted)
    assert list(tmp_path.iterdir()) == []


def test_commands(tmp_path: Path) -> None:
    pytest.importorskip("cyclonedx")
    private, public = make_keys(tmp_path, "key")
    (tmp_path / "my_model.py").write_text(
        "import torch\n\ndef build():\n    return torch.nn.Linear(3, 2).eval(), (torch.randn(4, 3),), {}\n"
    )
    path = tmp_path / "model.onnx"
    options = ["--card", "--bom", "--sign", str(private)]
    done = CliRunner().invoke(app, ["export", f"{tmp_path / 'my_model.py'}:build", "-o", str(path), *options])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["verify", str(path), "--public-key", str(public), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["signed"] == list(SIGNED)
    path.write_bytes(path.read_bytes() + b" ")
    done = CliRunner().invoke(app, ["verify", str(path), "--public-key", str(public), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"] == "SignatureError"
