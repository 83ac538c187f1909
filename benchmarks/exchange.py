"""Adapters of each kind in each format of another run time: the largest error by that one's own rule, or who refuses.

    ./run python benchmarks/exchange.py
    ./run python benchmarks/exchange.py --markdown

A small LLaMA with grouped queries gets adapters of each kind with other values, in place of training. They are
converted, read by the rule of the other run time (by itself where it can be installed, else by the readers of the
tests, which share no code with the library), and the logits are compared with those of the adapted model: the number
is the largest difference. ``-`` means that a package is not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from adapter_compiler.errors import AdapterCompilerError, MissingDependencyError  # noqa: E402
from adapter_compiler.saving.exchange.convert import convert_adapters  # noqa: E402
from tests.adapter_compiler.saving.exchange import models, readers  # noqa: E402

Logits = Callable[[models.Case, Path], torch.Tensor]
LARGEST = 1e-5


def with_updates(read: Callable[[Path], readers.Updates]) -> Logits:
    """A reader of ΔW."""

    def run(case: models.Case, path: Path) -> torch.Tensor:
        model = models.add_updates(copy.deepcopy(case.base), read(path))
        return model(case.tokens).logits

    return run


def with_peft(case: models.Case, path: Path) -> torch.Tensor:
    """peft itself."""
    import peft

    return peft.PeftModel.from_pretrained(copy.deepcopy(case.base), path).eval()(case.tokens).logits


def with_mlx(case: models.Case, path: Path) -> torch.Tensor:
    """mlx-lm itself."""
    from mlx import core
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    core.set_default_device(core.cpu)
    model = load_adapters(load_model(case.base_folder)[0], str(path))
    model.eval()
    return torch.tensor(model(core.array(case.tokens.numpy())).tolist())


def with_onnxruntime(case: models.Case, path: Path) -> torch.Tensor:
    """onnxruntime itself, on a base file that takes the adapter."""
    import adapter_compiler as ac

    served = ac.OnnxAdapters(case.base_folder / "served.onnx")
    served.load("adapter", path)
    (logits,) = served.run({"input_ids": case.tokens.numpy()}, adapter="adapter").values()
    return torch.from_numpy(logits)


#: By row of the table: the format, who reads it, and the packages that are needed for that.
TARGETS: dict[str, tuple[str, Logits, tuple[str, ...]]] = {
    "peft, read by peft": ("peft", with_peft, ("peft",)),
    "peft-adalora, read by peft": ("peft-adalora", with_peft, ("peft",)),
    "lora, read by peft": ("lora", with_peft, ("peft",)),
    "vllm, by vLLM's rule": ("vllm", with_updates(readers.read_as_vllm), ()),
    "gguf, by llama.cpp's rule": ("gguf", with_updates(lambda p: readers.read_as_llama_cpp(p, 4, 2)), ("gguf",)),
    "mlx, read by mlx-lm": ("mlx", with_mlx, ("mlx_lm",)),
    "diffusers, by its rule": (
        "diffusers",
        with_updates(lambda p: readers.read_as_diffusers(p, "unet", before_august_2026=False)),
        (),
    ),
    "diffusers, by its rule before August 2026": (
        "diffusers",
        with_updates(lambda p: readers.read_as_diffusers(p, "unet", before_august_2026=True)),
        (),
    ),
    "ort, read by onnxruntime": ("ort", with_onnxruntime, ("onnxruntime",)),
}


def measure(case: models.Case, target: str, folder: Path) -> str:
    """The largest difference of a logit, or why there is none."""
    to, run, packages = TARGETS[target]
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        return f"- ({missing[0]})"
    base = case.base_folder / "served.onnx" if to == "ort" else case.base_folder
    try:
        written = convert_adapters(case.folder, folder / "out", to=to, base=base, component="unet")
    except MissingDependencyError:
        raise
    except AdapterCompilerError as error:
        return f"refused: {error}"
    with torch.no_grad():
        return f"{float((run(case, written) - case.expected()).abs().max()):.1e}"


def export_base(case: models.Case) -> None:
    """The file that onnxruntime's adapters are inputs of."""
    import adapter_compiler as ac

    if not any(adapter.form.rescales for adapter in case.adapted.plan):
        path = case.base_folder / "served.onnx"
        ac.export_onnx(case.adapted, path, example_kwargs={"input_ids": case.tokens}, adapters="runtime")


def main() -> int:
    """Print the table; the exit code is 1 if an error is larger than it may be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown, refusals as a list")
    markdown = parser.parse_args().markdown
    warnings.simplefilter("ignore")
    cells: dict[tuple[str, str], str] = {}
    with tempfile.TemporaryDirectory() as root:
        for kind in models.KINDS:
            with contextlib.redirect_stderr(io.StringIO()):
                case = models.make_case(kind, make_folder(Path(root) / kind))
                export_base(case)
                for target in TARGETS:
                    cells[target, kind] = measure(case, target, make_folder(Path(root) / kind / target))
    show(cells, markdown=markdown)
    return int(any(is_wrong(cell) for cell in cells.values()))


def make_folder(path: Path) -> Path:
    """The folder, made."""
    path.mkdir(parents=True)
    return path


def is_wrong(cell: str) -> bool:
    """Whether a cell has an error that is too large."""
    return not cell.startswith(("refused", "-")) and not float(cell) <= LARGEST


def show(cells: dict[tuple[str, str], str], **options: Any) -> None:
    """Print the table, and below it why formats refuse."""
    lines = [["", *models.KINDS]]
    reasons: dict[str, str] = {}
    for target in TARGETS:
        row = [target]
        for kind in models.KINDS:
            cell = cells[target, kind]
            if cell.startswith("refused"):
                reasons.setdefault(f"{TARGETS[target][0]}, {kind}", cell)
                cell = "refused"
            row.append(cell)
        lines.append(row)
    if options["markdown"]:
        lines.insert(1, ["---", *("---:" for _ in models.KINDS)])
    for line in lines:
        if options["markdown"]:
            print(f"| {' | '.join(line)} |")
        else:
            print("".join(f"{cell:>14}" for cell in line[1:]), line[0], sep="  ")
    print()
    for where, reason in reasons.items():
        print(f"- {where}: {reason.removeprefix('refused: ')}")


if __name__ == "__main__":
    raise SystemExit(main())
