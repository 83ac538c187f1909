"""Each format gives the adapted model's numbers by the other run time's own rule, or is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.exchange.convert import convert_adapters
from tests.adapter_compiler.saving.exchange.models import KINDS, Case, add_updates
from tests.adapter_compiler.saving.exchange.readers import (
    Updates,
    read_as_diffusers,
    read_as_llama_cpp,
    read_as_mlx,
    read_as_vllm,
)

#: What each target is read by; gguf is read where the package is installed.
READERS: dict[str, Callable[[Path], Updates]] = {
    "lora": read_as_vllm,
    "vllm": read_as_vllm,
    "mlx": read_as_mlx,
    "gguf": lambda path: read_as_llama_cpp(path, heads=4, key_heads=2),
    "diffusers": lambda path: read_as_diffusers(path, "transformer", before_august_2026=False),
    "old diffusers": lambda path: read_as_diffusers(path, "transformer", before_august_2026=True),
}

REFUSED = {
    ("lora", "dora"): "has no DoRA",
    ("vllm", "dora"): "has no DoRA",
    ("gguf", "dora"): "has no DoRA",
    **{(target, "trained head"): r"lm_head\.weight was trained fully" for target in ("vllm", "gguf", "mlx")},
    ("diffusers", "trained head"): r"lm_head\.weight was trained fully",
    ("old diffusers", "trained head"): r"lm_head\.weight was trained fully",
}


Cases = Callable[..., Case]


def convert(case: Case, target: str, folder: Path) -> Path:
    if target == "gguf":
        pytest.importorskip("gguf", reason="the package gguf is not installed")
    to = target.removeprefix("old ")
    return convert_adapters(case.folder, folder / "out", to=to, base=case.base_folder, component="transformer")


def assert_same_logits(case: Case, updates: Updates) -> None:
    with torch.no_grad():
        logits = add_updates(copy.deepcopy(case.base), updates)(case.tokens).logits
    torch.testing.assert_close(logits, case.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", READERS)
def test_by_the_rule_of_the_target(target: str, kind: str, tmp_path: Path, cases: Cases) -> None:
    case = cases(kind)
    if (target, kind) in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[target, kind]):
            convert(case, target, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    if (target, kind) == ("lora", "trained head") or kind == "dora":
        convert(case, target, tmp_path)  # read by peft and by mlx-lm itself, in test_real_readers
        return
    assert_same_logits(case, READERS[target](convert(case, target, tmp_path)))


@pytest.mark.parametrize("target", ["gguf"])
def test_embeddings_and_heads(target: str, tmp_path: Path, cases: Cases) -> None:
    case = cases("mixed ranks", exclude=(), sites=("*",))
    updates = READERS[target](convert(case, target, tmp_path))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= updates.keys()
    assert_same_logits(case, updates)


def test_mlx_has_embeddings_as_entries_by_features(tmp_path: Path, cases: Cases) -> None:
    case = cases("mixed ranks", exclude=(), sites=("*",))
    updates = read_as_mlx(convert(case, "mlx", tmp_path))
    updates["model.embed_tokens.weight"] = updates["model.embed_tokens.weight"].T
    assert_same_logits(case, updates)


def test_vllm_and_diffusers_take_no_embeddings(tmp_path: Path, cases: Cases) -> None:
    case = cases("mixed ranks", exclude=(), sites=("*",))
    for target in ("vllm", "diffusers"):
        with pytest.raises(ConfigError, match=r"site model\.embed_tokens\.weight is a weight of the kind 'embedding'"):
            convert(case, target, tmp_path)


def test_peft_of_mixed_ranks_is_read_wrongly_by_vllm_and_llama_cpp(tmp_path: Path, cases: Cases) -> None:
    """Why there are formats of their own: these readers drop the patterns of PEFT's folder."""
    case = cases("mixed ranks")
    folder = convert_adapters(case.folder, tmp_path / "peft", to="peft")
    with pytest.raises(AssertionError, match="slots of one rank"):
        read_as_vllm(folder)


def test_a_folder_is_not_converted_into_itself(tmp_path: Path, cases: Cases) -> None:
    case = cases("svd")
    before = {path: path.read_bytes() for path in case.folder.iterdir()}
    with pytest.raises(ConfigError, match="is the folder that is converted"):
        convert_adapters(case.folder, case.folder, to="mlx", base=case.base_folder)
    assert {path: path.read_bytes() for path in case.folder.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"to": "mlx"}, "no base model is given"),
        ({"to": "gguf"}, "no base model is given"),
        ({"to": "ort"}, "no base is given for onnxruntime"),
        ({"to": "diffusers"}, "diffusers finds adapters by the name of the pipeline's part"),
        ({"to": "zip"}, "expected one of native, peft"),
    ],
)
def test_what_is_missing_is_named(options: dict[str, str], problem: str, tmp_path: Path, cases: Cases) -> None:
    if options["to"] == "gguf":
        pytest.importorskip("gguf", reason="the package gguf is not installed")
    case = cases("svd")
    with pytest.raises(ConfigError, match=problem):
        convert_adapters(case.folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
