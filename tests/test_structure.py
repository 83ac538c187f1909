"""A reader finds the way from the tree alone: no import circles, small folders, each of which says what it holds."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.source_files import (
    PACKAGES,
    ROOT,
    find_circle,
    find_modules,
    find_packages,
    merge_by_part,
    read_import_graph,
    read_tree,
)

MODULES = find_modules()
IMPORTS = read_import_graph()
#: Entries that a folder may have; the two roots list the rooms, so they have room for a few more.
MOST_ENTRIES = 10
MOST_IN_ROOT = {"adapter_compiler": 12, "passes": 11}


def find_entries(folder: Path) -> list[str]:
    """What a reader sees in a folder, apart from what every package has."""
    unseen = {"__init__.py", "py.typed", "__pycache__"}
    return sorted(e.name for e in folder.iterdir() if e.name not in unseen and (e.is_file() or any(e.rglob("*.py"))))


def test_no_module_imports_itself_through_others() -> None:
    circle = find_circle(IMPORTS)
    assert circle == [], f"modules import each other in a circle: {circle}; move what both need below both"


@pytest.mark.parametrize("package", find_packages(MODULES))
def test_no_parts_of_a_package_import_each_other(package: str) -> None:
    parts = merge_by_part(IMPORTS, package)
    examples = [parts.edges[edge]["example"] for edge in find_circle(parts)]
    assert examples == [], f"parts of {package} import each other in a circle: {'; '.join(examples)}"


@pytest.mark.parametrize("package", find_packages(MODULES))
def test_a_folder_has_few_entries(package: str) -> None:
    entries = find_entries(MODULES[package].parent)
    most = MOST_IN_ROOT.get(package, MOST_ENTRIES)
    assert len(entries) <= most, f"{package} has {len(entries)} entries, at most {most} are allowed: {entries}"


@pytest.mark.parametrize("package", find_packages(MODULES))
def test_a_folder_says_what_belongs_there(package: str) -> None:
    docstring = ast.get_docstring(read_tree(MODULES[package]))
    assert docstring, f"{MODULES[package]} has no docstring, expected one that says what belongs there"
    assert len(docstring.split()) >= 5, f"{MODULES[package]} says only {docstring!r}, expected what belongs there"


def test_every_folder_is_a_package() -> None:
    folders = {file.parent for file in MODULES.values()}
    assert folders == {MODULES[package].parent for package in find_packages(MODULES)}


def write_packages(root: Path, sources: dict[str, str]) -> None:
    for package in PACKAGES:
        (root / package).mkdir()
        (root / package / "__init__.py").touch()
    for name, source in sources.items():
        file = root / name
        file.parent.mkdir(exist_ok=True, parents=True)
        (file.parent / "__init__.py").touch()
        file.write_text(source, encoding="utf-8")


@pytest.mark.parametrize(
    "source",
    [
        "import passes.b",
        "from passes import b",
        "from passes.b import x",
        "from . import b",
        "from .b import x",
        "def late():\n    import passes.b",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from passes.b import x",
    ],
)
def test_a_circle_of_modules_is_found(tmp_path: Path, source: str) -> None:
    write_packages(tmp_path, {"passes/a.py": source, "passes/b.py": "import passes.a"})
    assert set(find_circle(read_import_graph(tmp_path))) == {("passes.a", "passes.b"), ("passes.b", "passes.a")}


def test_a_circle_of_folders_is_found_where_modules_form_none(tmp_path: Path) -> None:
    sources = {
        "passes/one/top.py": "from passes.two.low import x",
        "passes/one/low.py": "x = 0",
        "passes/two/top.py": "from ..one.low import x",
        "passes/two/low.py": "x = 0",
    }
    write_packages(tmp_path, sources)
    graph = read_import_graph(tmp_path)
    assert find_circle(graph) == []
    parts = merge_by_part(graph, "passes")
    assert [parts.edges[edge]["example"] for edge in find_circle(parts)] == [
        "passes.one.top imports passes.two.low",
        "passes.two.top imports passes.one.low",
    ]


def test_only_folders_with_source_count_as_entries(tmp_path: Path) -> None:
    write_packages(tmp_path, {"passes/one/a.py": "", "passes/b.py": ""})
    (tmp_path / "passes" / "gone" / "__pycache__").mkdir(parents=True)
    assert find_entries(tmp_path / "passes") == ["b.py", "one"]


def test_the_whole_source_is_read() -> None:
    assert len(MODULES) > 100
    assert ("adapter_compiler.cli.main", "adapter_compiler.cli.commands.demo") in IMPORTS.edges
    assert all((ROOT / package / "__init__.py") in MODULES.values() for package in PACKAGES)
