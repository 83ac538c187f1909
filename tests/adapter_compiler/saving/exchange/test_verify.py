"""An exchanged adapter is replayed in what is installed; one that was changed since is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError, ConfigError, VerificationError
from adapter_compiler.integrations.exchange.reference import write_reference
from adapter_compiler.integrations.exchange.verify import verify_adapter
from adapter_compiler.saving.exchange.convert import convert_adapters
from adapter_compiler.saving.exchange.manifest import find_manifest
from tests.adapter_compiler.saving.exchange.models import Case, perturb

Cases = Callable[..., Case]

#: By target, who replays the reference call of the Llama; mlx-lm where it is installed.
RUN_TIMES = {
    "peft": {"PyTorch", "peft"},
    "peft-adalora": {"PyTorch", "peft"},
    "lora": {"PyTorch", "peft"},
    "vllm": {"PyTorch", "peft"},
    "mlx": {"PyTorch"},
    "gguf": {"PyTorch"},
    "diffusers": {"PyTorch"},
}


def convert(case: Case, to: str, folder: Path) -> Path:
    if to == "gguf":
        pytest.importorskip("gguf", reason="the package gguf is not installed")
    written = convert_adapters(case.folder, folder / "out", to=to, base=case.base_folder, component="transformer")
    write_reference(written, case.adapted, (case.tokens,))
    return written


@pytest.mark.parametrize("to", RUN_TIMES)
def test_a_reference_call_is_replayed(to: str, tmp_path: Path, cases: Cases) -> None:
    case = cases("mixed ranks")
    adapter = convert(case, to, tmp_path)
    checked = verify_adapter(adapter, base=case.base_folder, model=case.base)
    assert {check.run_time for check in checked.checks} - {"mlx-lm"} == {"our reader", *RUN_TIMES[to]}
    assert len([check for check in checked.checks if check.run_time == "our reader"]) == 14
    assert max(check.error for check in checked.checks) <= 1e-5
    assert to != "mlx" or "mlx-lm" in {*checked.not_run, *(check.run_time for check in checked.checks)}


def test_dora_is_replayed_by_peft(tmp_path: Path, cases: Cases) -> None:
    case = cases("dora")
    checked = verify_adapter(convert(case, "peft", tmp_path), model=case.base)
    assert {check.run_time for check in checked.checks} == {"our reader", "peft"}
    assert checked.not_run["PyTorch"] == "the adapter changes more than ΔW"


def test_a_changed_scale_is_noticed(tmp_path: Path, cases: Cases) -> None:
    adapter = convert(cases("svd"), "vllm", tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    with pytest.raises(VerificationError, match=r"ΔW of model\.layers\.0\..* has the norm .* the manifest says"):
        verify_adapter(adapter)


def test_another_order_of_rows_is_noticed(tmp_path: Path, cases: Cases) -> None:
    adapter = convert(cases("svd"), "lora", tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    save_file({**tensors, name: tensors[name].flip(0).contiguous()}, adapter / "adapter_model.safetensors")
    with pytest.raises(VerificationError, match=r"ΔW of model\.layers\.0\.self_attn\.q_proj\.weight"):
        verify_adapter(adapter)


def test_gguf_for_another_number_of_heads_is_noticed(tmp_path: Path, cases: Cases) -> None:
    case = cases("svd")
    adapter = convert(case, "gguf", tmp_path)
    with pytest.raises(ConfigError, match="verified without a base model"):
        verify_adapter(adapter)
    values = json.loads((case.base_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_attention_heads": 2}))
    with pytest.raises(VerificationError, match="by the rule of gguf"):
        verify_adapter(adapter, base=tmp_path)


def test_another_base_is_noticed(tmp_path: Path, cases: Cases) -> None:
    case = cases("svd")
    torch.manual_seed(1)  # that of the case is 0
    other = case.base.__class__(case.base.config)
    with pytest.raises(VerificationError, match="in PyTorch: the output logits differs by up to"):
        verify_adapter(convert(case, "vllm", tmp_path), model=other)


def test_onnxruntime_replays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5)).eval(), torch.randn(7, 6)
    adapted = ac.compile_with_adapters(net, (x,), config=ac.AdapterConfig(rank=4))
    ac.export_onnx(adapted, tmp_path / "served.onnx", (x,), adapters="runtime")
    perturb(adapted, prune=True)
    adapted.save(tmp_path / "adapters")
    out = tmp_path / "task.onnx_adapter"
    convert_adapters(tmp_path / "adapters", out, to="ort", base=tmp_path / "served.onnx")
    write_reference(out, adapted, (x,))
    checked = verify_adapter(out, base=tmp_path / "served.onnx")
    assert {check.run_time for check in checked.checks} == {"our reader", "onnxruntime"}
    assert "PyTorch" in checked.not_run
    find_manifest(out).unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_adapter(out)
