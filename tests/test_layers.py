"""What import-linter cannot express: an allow-list for passes, and what is imported when."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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
