"""The commands end to end: on real files, with JSON, exit codes and clear errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import onnx
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import adapter_compiler as ac
from adapter_compiler.cli.main import app
from adapter_compiler.saving.primitives.adapter_file import FILE_NAME
from tests.adapter_compiler.saving.rewriting import rewrite

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    return model, (torch.randn(5, 6),), {}

def build_adapted():
    import adapter_compiler as ac
    model, args, kwargs = build()
    return ac.compile_with_adapters(model, args, config=ac.AdapterConfig(rank=2, alpha=3)), args, kwargs

def nothing():
    return None
"""


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def run_json(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*(str(argument) for argument in arguments), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model file, its checkpoint, and trained adapters for it."""
    (tmp_path / "my_model.py").write_text(MODEL)
    scope: dict[str, Any] = {}
    exec(MODEL, scope)
    model, args, _ = scope["build"]()
    save_file(dict(model.state_dict()), tmp_path / "base.safetensors")
    adapted = ac.compile_with_adapters(model, args, config=ac.AdapterConfig(rank=2, alpha=3))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.4)
    adapted.save(tmp_path / "adapters")
    save_file(dict(adapted.fold().state_dict()), tmp_path / "expected.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [[], ["fold"], ["export"], ["verify"], ["adapters", "list"], ["adapters", "inspect"], ["adapters", "convert"]],
)
def test_help_has_an_example(command: list[str]) -> None:
    assert "Example: adapter-compiler" in " ".join(run(*command, "--help").split())


def test_fold(folder: Path) -> None:
    out = folder / "out.safetensors"
    result = run_json("fold", folder / "base.safetensors", folder / "adapters", "-o", out)
    assert result == {"out": str(out), "changed": ["0.weight", "2.weight"]}
    found, expected = load_file(out), load_file(folder / "expected.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_fold_into_the_given_weights_of_a_quantized_base(folder: Path, tmp_path: Path) -> None:
    """A format that this machine cannot make again matters only where it is to be made again."""
    out = tmp_path / "out.safetensors"
    shutil.copytree(folder / "adapters", tmp_path / "packed")
    formats = {"0.weight": {"format": "fp1", "dtype": "float32"}}
    rewrite(tmp_path / "packed" / FILE_NAME, lambda header, _: header.update(quantized=formats))
    arguments = ("fold", folder / "base.safetensors", tmp_path / "packed", "-o", out)
    assert "weights cannot be quantized to 'fp1' again" in run(*arguments, code=1)
    assert "base_weights='full'" in run(*arguments, "--base-weights", "full", code=1)
    assert not out.exists()
    run(*arguments, "--base-weights", "given")
    found, expected = load_file(out), load_file(folder / "expected.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_errors_are_one_line_and_exit_code_1(folder: Path) -> None:
    output = run("fold", folder / "none.safetensors", folder / "adapters", "-o", folder / "out", code=1)
    assert output.startswith("error: ")
    assert "does not exist" in output
    result = run_json("export", f"{folder / 'my_model.py'}:nothing", "-o", folder / "x.onnx", code=1)
    assert result["error"] == "ConfigError"
    assert "returned a NoneType" in result["message"]
    assert run_json("export", f"{folder / 'my_model.py'}:absent", "-o", folder / "x.onnx", code=1)
    run("adapters", "convert", folder / "adapters", "-o", folder / "x", "--to", "zip", code=1)
    run("fold", code=2)


def test_export_fold_and_verify(folder: Path) -> None:
    """An exported base file with adapters folded in agrees with the exported merged model; int8 reports its error."""
    target = f"{folder / 'my_model.py'}:build"
    base, merged, folded = (folder / f"{name}.onnx" for name in ("base", "merged", "folded"))
    assert run_json("export", target, "-o", base)["adapters"] == "none"
    report = run_json("export", target, "--adapters", folder / "adapters", "-o", merged, "--int8", folder / "int8.onnx")
    assert report["max_abs_error"] < 1e-4
    assert report["int8"]["argmax_agreement"] >= 0.5
    assert 0 < report["int8"]["max_rel_error"] < 0.25
    assert "MatMulInteger" in {node.op_type for node in onnx.load(folder / "int8.onnx").graph.node}
    run("fold", base, folder / "adapters", "-o", folded)
    checked = run_json("verify", folded, "--against", merged, "--draws", 3)
    assert max(error["max_abs"] for error in checked["errors"]) < 1e-5
    assert "agrees with itself on 8 inputs" in run("verify", folded)
    assert "differs" in run("verify", folded, "--against", base, code=1)


def test_export_with_runtime_adapters(folder: Path) -> None:
    target, out = f"{folder / 'my_model.py'}:build_adapted", folder / "model.onnx"
    result = run_json("export", target, "--runtime", "--adapters", folder / "adapters", "-o", out)
    served = ac.OnnxAdapters(out)
    served.load("task", result["adapter_file"])
    x = torch.randn(3, 6)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    model.load_state_dict(load_file(folder / "expected.safetensors"))
    name = next(iter(value.name for value in served.session.get_inputs()))
    found = torch.from_numpy(served.run({name: x.numpy()}, adapter="task")["output"])
    torch.testing.assert_close(found, model(x).detach(), rtol=1e-5, atol=1e-5)


def test_adapters(folder: Path) -> None:
    rows = run_json("adapters", "list", folder)
    assert [(row["kind"], row["sites"], row["average_rank"]) for row in rows] == [("adapter-compiler", 2, 2.0)]
    shown = run_json("adapters", "inspect", folder / "adapters")
    assert [(row["weight"], row["live"]) for row in shown["weights"]] == [("0.weight", 2), ("2.weight", 2)]
    assert "0.weight" in run("adapters", "inspect", folder / "adapters")


def test_verify_against_the_model(folder: Path) -> None:
    target, file = f"{folder / 'my_model.py'}:build", folder / "merged.onnx"
    run("export", target, "--adapters", folder / "adapters", "-o", file)
    checked = run_json("verify", file, "--model", target, "--adapters", folder / "adapters", "--draws", 2)
    assert checked["against"] == target
    cases = ["example", "batch 6", "random values 1", "random values 2"]
    assert [error["case"] for error in checked["errors"]] == cases
    assert max(error["max_abs"] for error in checked["errors"]) < 1e-4
    shown = run("verify", file, "--model", target, "--adapters", folder / "adapters")
    assert "on 10 inputs: example, batch 6, random values 1" in " ".join(shown.split())


def test_verify_names_what_differs_from_the_model(folder: Path) -> None:
    """Without the adapters, the model differs from its first weight on."""
    target, file = f"{folder / 'my_model.py'}:build", folder / "merged.onnx"
    run("export", target, "--adapters", folder / "adapters", "-o", file)
    result = run_json("verify", file, "--model", target, code=1)
    assert result["error"] == "VerificationError"
    assert "merged.onnx: output output on example: onnxruntime differs from PyTorch by" in result["message"]
    assert re.search(r"the first node that differs is node_linear \(\w+, 0\)", result["message"])


def test_verify_takes_one_thing_to_compare_with(folder: Path) -> None:
    target = f"{folder / 'my_model.py'}:build"
    assert "give one of them" in run("verify", "a.onnx", "--against", "b.onnx", "--model", target, code=1)
    assert "give --model" in run("verify", "a.onnx", "--adapters", folder / "adapters", code=1)
    assert "does not exist" in run("verify", folder / "none.onnx", "--model", target, code=1)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_converted_to_peft_and_back(kind: str, folder: Path) -> None:
    run("adapters", "convert", folder / "adapters", "-o", folder / "peft", "--to", f"peft-{kind}")
    model, x = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).eval(), torch.randn(3, 6)
    model.load_state_dict(load_file(folder / "expected.safetensors"))
    expected = model(x).detach()
    model.load_state_dict(load_file(folder / "base.safetensors"))
    loaded = peft.PeftModel.from_pretrained(model, folder / "peft")
    torch.testing.assert_close(loaded(x).detach(), expected, rtol=1e-5, atol=1e-5)
    run("adapters", "convert", folder / "peft", "-o", folder / "back", "--to", "native")
    run("fold", folder / "base.safetensors", folder / "back", "-o", folder / "out.safetensors")
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    model.load_state_dict(load_file(folder / "out.safetensors"))
    torch.testing.assert_close(loaded.merge_and_unload()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("to", "place"), [("vllm", "folder"), ("ort", "file")])
def test_converted_for_other_run_times(to: str, place: str, folder: Path) -> None:
    base = folder / "base.onnx"
    if to == "ort":
        target = f"{folder / 'my_model.py'}:build_adapted"
        run("export", target, "-o", base, "--runtime")
    found = run_json("adapters", "convert", folder / "adapters", "-o", folder / f"for_{to}", "--to", to, "--base", base)
    assert found[place] == str(folder / f"for_{to}") and found["sites"] == 2
    problem = run("adapters", "convert", folder / "adapters", "-o", folder / "x", "--to", "diffusers", code=1)
    assert "give it with --component" in problem


def test_sites_shows_every_weight_and_writes_a_plan_and_a_picture(folder: Path) -> None:
    plan, picture = folder / "plan.json", folder / "sites.svg"
    target = f"{folder / 'my_model.py'}:build"
    found = run_json("sites", target, "--rank", 3, "--exclude", "2", "--plan", plan, "--picture", picture)
    assert [(row["name"], row["rank"], row["role"]) for row in found["sites"]] == [("0.weight", 3, "feed_forward.up")]
    assert found["rejected"] == {"2.weight": "excluded (exclude='2')"}
    assert found["written"] == [str(plan), str(picture)]
    assert [(a.site.name, a.rank) for a in ac.AdapterPlan.from_json(plan.read_text())] == [("0.weight", 3)]
    assert "<svg" in picture.read_text(encoding="utf-8")
    text = run("sites", target, "--role", "head")
    assert "1 adapted weights" in text
    assert "no adapter: 0.weight" in text


def test_sites_names_the_roles_there_are(folder: Path) -> None:
    output = run("sites", f"{folder / 'my_model.py'}:build", "--role", "attention.*", code=1)
    assert "There are roles feed_forward.up, head" in " ".join(output.split())
