"""What import-linter cannot express: an allow-list for passes, and what is imported when."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import adapter_compiler
import adapter_compiler.onnx

ROOT = Path(__file__).parent.parent
ALLOWED_IN_PASSES = {"networkx", "numpy", "onnx", "passes", "torch"} | sys.stdlib_module_names
OPTIONAL = {"accelerate", "bitsandbytes", "lightning", "peft", "sklearn", "transformers"}


def find_imported_packages(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("file", sorted((ROOT / "passes").rglob("*.py")), ids=lambda file: file.stem)
def test_passes_imports_only_torch_networkx_and_onnx(file: Path) -> None:
    assert find_imported_packages(file) - ALLOWED_IN_PASSES == set()


def test_import_loads_no_optional_library() -> None:
    code = f"import sys, adapter_compiler; print(*sorted({OPTIONAL!r} & sys.modules.keys()))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert loaded.stdout.strip() == ""


@pytest.mark.parametrize(
    "module", ["adapter_compiler", "adapter_compiler.cli.main", "adapter_compiler.saving.folding.fold_files"]
)
def test_what_only_exports_is_imported_on_demand(module: str) -> None:
    """Folding a checkpoint is to take little memory, of which imports are the largest part."""
    heavy = {"matplotlib", "onnx_ir", "onnxruntime", "onnxscript"}
    code = f"import sys, {module}; print(*sorted({heavy!r} & sys.modules.keys()))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert loaded.stdout.strip() == ""


#: Parts of torch, and libraries, that take longer to import than all of the two packages.
SLOW = {
    "networkx",
    "rich",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
    "torch.fx.experimental.proxy_tensor",
}
#: The number of modules besides those of torch and of the two packages that an import may load.
MOST_MODULES = 30


def test_import_loads_little_besides_torch() -> None:
    code = (
        "import sys, torch; before = {*sys.modules}; import adapter_compiler; new = {*sys.modules} - before; "
        "own = {n for n in new if n.partition('.')[0] in ('adapter_compiler', 'passes')}; print(len(new - own)); "
        f"print(*sorted({SLOW!r} & new))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    count, slow = done.stdout.split("\n")[:2]
    assert slow == ""
    assert int(count) <= MOST_MODULES


def test_names_that_are_imported_on_demand_are_there() -> None:
    for package in (adapter_compiler, adapter_compiler.onnx):
        assert all(getattr(package, name) is not None for name in package.__all__)
    assert set(adapter_compiler.__all__) <= set(dir(adapter_compiler))
    with pytest.raises(AttributeError, match="module 'adapter_compiler' has no attribute 'export_onxx'"):
        adapter_compiler.export_onxx  # type: ignore[attr-defined]  # noqa: B018
