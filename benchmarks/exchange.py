"""By how much adapters change on their way to other run times: target × kind of adapter, by the target's own rule.

    python benchmarks/exchange.py                             # the table, as Markdown
    python benchmarks/exchange.py --table docs/exchange.md    # also written to a page

A small Llama is adapted and its adapters get random values. Each target's file is written and read by a reader that
shares no code with the library: peft and onnxruntime themselves, and otherwise the readers of
tests/adapter_compiler/saving/exchange, which are written from the target's source. The number is the largest absolute
difference of the logits from those of the adapted model. What a target cannot express must be refused by name.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import adapter_compiler as ac  # noqa: E402
from adapter_compiler.errors import ConfigError  # noqa: E402
from adapter_compiler.saving.exchange.convert import convert_adapters  # noqa: E402
from tests.adapter_compiler.saving.exchange import readers  # noqa: E402
from tests.adapter_compiler.saving.exchange.models import KINDS, Case, add_updates, make_case  # noqa: E402

LARGEST_ERROR = 1e-5
COMPONENT = "transformer"

Logits = Callable[[Case, Path], torch.Tensor]


def run_peft(case: Case, folder: Path) -> torch.Tensor:
    """PEFT itself."""
    return run(peft.PeftModel.from_pretrained(copy.deepcopy(case.base), folder).eval(), case)


def run_sums(read: Callable[[Path], readers.Updates], case: Case, path: Path) -> torch.Tensor:
    """W + ΔW, with ΔW by the rule of the target."""
    return run(add_updates(copy.deepcopy(case.base), read(path)), case)


def run_mlx(case: Case, folder: Path) -> torch.Tensor:
    """``mlx_lm/tuner/dora.py``: each output is multiplied by m / ‖W + scale · ΔW‖ of its row."""
    tensors = load_file(folder / "adapters.safetensors")
    magnitudes = {name.removesuffix(".m"): tensor for name, tensor in tensors.items() if name.endswith(".m")}
    if not magnitudes:
        return run_sums(readers.read_as_mlx, case, folder)
    scale = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    model = copy.deepcopy(case.base)
    for name, magnitude in magnitudes.items():
        weight = model.get_parameter(f"{name}.weight").data
        weight += scale * (tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]).T
        weight *= (magnitude / weight.norm(dim=1))[:, None]
    return run(model, case)


def run_diffusers(case: Case, folder: Path, *, before_august_2026: bool) -> torch.Tensor:
    """``load_lora_adapter``: PEFT with a configuration that is made from the tensors, ``use_dora`` by their names."""
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    if not any("lora_magnitude_vector" in name for name in tensors):
        read = functools.partial(readers.read_as_diffusers, component=COMPONENT, before_august_2026=before_august_2026)
        return run_sums(read, case, folder)
    own = {name.removeprefix(f"{COMPONENT}."): tensor for name, tensor in tensors.items()}
    modules = [name.removesuffix(".lora_B.weight") for name in own if name.endswith(".lora_B.weight")]
    (rank,) = {tensor.shape[1] for name, tensor in own.items() if name.endswith(".lora_B.weight")}
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=modules, use_dora=True)
    model = peft.inject_adapter_in_model(config, copy.deepcopy(case.base))
    found: Any = peft.set_peft_model_state_dict(model, own)
    assert not found.unexpected_keys, found.unexpected_keys
    return run(model.eval(), case)


class Onnxruntime:
    """onnxruntime itself, on one base file for all adapters and another one for trained heads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cache  # noqa: B019 - lives as long as the program
    def make_base(self, head: bool) -> Path:
        """A file of the base model with inputs for adapters."""
        name = "trained head" if head else "svd"
        with tempfile.TemporaryDirectory() as folder:
            case = make_case(name, Path(folder))
        fresh = {"exclude": ("lm_head.*", "*embed_tokens*"), **KINDS[name]}
        adapted = ac.compile_with_adapters(case.base, (case.tokens,), config=ac.AdapterConfig(**fresh))
        path = self.folder / f"base{head}.onnx"
        ac.export_onnx(adapted, path, (case.tokens,), adapters="runtime")
        return path

    def __call__(self, case: Case, path: Path) -> torch.Tensor:
        served = ac.OnnxAdapters(self.make_base(has_head(case)))
        served.load("one", path)
        name = served.session.get_inputs()[0].name
        return torch.from_numpy(served.run({name: case.tokens.numpy()}, adapter="one")["logits"])


def has_head(case: Case) -> bool:
    """Whether the head was trained fully."""
    return case.adapted.module.get_parameter("lm_head.weight").requires_grad


def run(model: nn.Module, case: Case) -> torch.Tensor:
    """The logits of a model."""
    with torch.no_grad():
        logits: torch.Tensor = model(case.tokens).logits
    return logits


def make_targets(onnxruntime: Onnxruntime) -> dict[str, tuple[str, Logits]]:
    """By name of the row the target and its reader."""

    def read_gguf(path: Path) -> readers.Updates:
        return readers.read_as_llama_cpp(path, heads=4, key_heads=2)

    found: dict[str, tuple[str, Logits]] = {
        "peft": ("peft", run_peft),
        "peft-adalora": ("peft-adalora", run_peft),
        "lora": ("lora", run_peft),
        "vllm": ("vllm", functools.partial(run_sums, readers.read_as_vllm)),
        "mlx": ("mlx", run_mlx),
        "diffusers": ("diffusers", functools.partial(run_diffusers, before_august_2026=False)),
        "diffusers before August 2026": ("diffusers", functools.partial(run_diffusers, before_august_2026=True)),
        "ort": ("ort", onnxruntime),
    }
    if importlib.util.find_spec("gguf"):
        found["gguf"] = ("gguf", functools.partial(run_sums, read_gguf))
    return found


def measure(case: Case, to: str, logits: Logits, onnxruntime: Onnxruntime) -> float | str:
    """The largest difference of the logits, or why the target has no adapters of this kind."""
    base = onnxruntime.make_base(has_head(case)) if to == "ort" else case.base_folder
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = convert_adapters(case.folder, Path(folder) / "out", to=to, base=base, component=COMPONENT)
        except ConfigError as error:
            return str(error).replace(str(case.folder / "adapters.safetensors"), "the folder").replace(folder, "")
        return float((logits(case, path) - case.expected()).abs().max())


def spell_table(rows: Mapping[str, Mapping[str, float | str]]) -> str:
    """The table as Markdown, and why cells are refused."""
    lines = [f"| target | {' | '.join(KINDS)} |", f"|---|{'---:|' * len(KINDS)}"]
    reasons: dict[str, str] = {}
    for target, cells in rows.items():
        spelled = [f"{cell:.1e}" if isinstance(cell, float) else "refused" for cell in cells.values()]
        lines.append(f"| {target} | {' | '.join(spelled)} |")
        reasons |= {f"{target}, {kind}": cell for kind, cell in cells.items() if isinstance(cell, str)}
    largest = max(cell for cells in rows.values() for cell in cells.values() if isinstance(cell, float))
    lines += ["", f"The largest error is {largest:.1e}; accepted is {LARGEST_ERROR:.0e}.", "", "What is refused:", ""]
    return "\n".join([*lines, *(f"- **{place}**: {reason}" for place, reason in reasons.items())])


def main() -> int:
    """Measure all cells; 1 if an error is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="write the table to this page, after its introduction")
    parser.add_argument("--targets", nargs="*", help="only these rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as kept:
        onnxruntime = Onnxruntime(Path(kept))
        targets = make_targets(onnxruntime)
        cases = {kind: make_case(kind, Path(kept) / kind) for kind in KINDS}
        rows: dict[str, dict[str, float | str]] = {}
        for name in options.targets or targets:
            rows[name] = {kind: measure(case, *targets[name], onnxruntime) for kind, case in cases.items()}
            print(f"{name} done", file=sys.stderr, flush=True)
    table = spell_table(rows)
    print(table)
    if options.table:
        head, _, _ = options.table.read_text(encoding="utf-8").partition("\n| target |")
        options.table.write_text(f"{head.rstrip()}\n\n{table}\n", encoding="utf-8")
    errors = [cell for cells in rows.values() for cell in cells.values() if isinstance(cell, float)]
    return 0 if max(errors) <= LARGEST_ERROR else 1


if __name__ == "__main__":
    sys.exit(main())
