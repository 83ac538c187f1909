"""What the site needs to be right: its pages, the objects that it documents, and the names that it mentions."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import adapter_compiler as ac
from tests.documents import ROOT, find_code, find_documents, read_text
from tests.source_files import PACKAGES, find_modules, find_packages, read_tree

MODULES = find_modules()
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([\w.]+)`")
#: Paths that a document tells its reader to make.
TO_BE_WRITTEN = re.compile(r"NAME|remove_idle_dropout|my_model|my_file")


def find_object(path: str) -> object:
    """The object at a dotted path.

    Raises:
        AttributeError: there is none.
    """
    parts = path.split(".")
    found: object = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], start=2):
        name = ".".join(parts[:depth])
        if not hasattr(found, part) and isinstance(found, ModuleType) and importlib.util.find_spec(name):
            importlib.import_module(name)
        found = getattr(found, part)
    return found


@functools.cache
def find_documented() -> list[str]:
    """What the pages of the API reference document, by dotted path."""
    pages = sorted((ROOT / "docs/api").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: ([\w.]+)", page.read_text("utf-8"), re.MULTILINE)]


def find_pages(entry: object) -> list[str]:
    """The pages below an entry of the navigation."""
    if isinstance(entry, str):
        return [entry]
    assert isinstance(entry, (dict, list))
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in find_pages(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    pages = find_pages(yaml.safe_load(read_text("mkdocs.yml"))["nav"])
    assert len(pages) == len(set(pages))
    assert set(pages) == {document.removeprefix("docs/") for document in find_documents() if "/" in document}


def test_the_page_of_examples_shows_each_of_them() -> None:
    shown = re.findall(r'^--8<-- "(examples/[\w/]+\.py)"$', read_text("docs/guides/examples.md"), flags=re.MULTILINE)
    assert shown == sorted(str(file.relative_to(ROOT)) for file in (ROOT / "examples").rglob("*.py"))


@pytest.mark.parametrize("name", find_documented())
def test_what_the_reference_documents_is_there(name: str) -> None:
    find_object(name)


def test_the_reference_documents_every_public_name() -> None:
    assert {f"adapter_compiler.{name}" for name in ac.__all__} - set(find_documented()) == {
        "adapter_compiler.AdapterCompilerError"  # on the page of adapter_compiler.errors
    }


@pytest.mark.parametrize("document", find_documents())
def test_paths_that_a_document_names_are_there(document: str) -> None:
    tops = "adapter_compiler|passes|tests|benchmarks|examples|docs"
    for code in find_code(document):
        for path in re.findall(rf"(?:^|(?<=\s))((?:{tops})/[\w./-]*\w/?)", code):
            assert TO_BE_WRITTEN.search(path) or (ROOT / path).exists(), f"{document} names {path}"


@pytest.mark.parametrize("document", find_documents())
def test_objects_that_a_document_names_are_there(document: str) -> None:
    for code in find_code(document):
        if re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+(?:\(.*\))?", code):
            find_object(code.partition("(")[0])


def read_floors(text: str) -> list[set[str]]:
    """The rooms of each floor in one of the tables of docs/architecture.md, top floor first."""
    floors: dict[int, set[str]] = {}
    for floor, rooms in re.findall(r"^\| (\d+) \| (.*?) \|", text, flags=re.MULTILINE):
        floors.setdefault(int(floor), set()).update(re.findall(r"`(\w+)(?:/|\.py)`", rooms))
    assert list(floors) == sorted(floors, reverse=True)
    return list(floors.values())


@pytest.mark.parametrize("package", PACKAGES)
def test_the_architecture_has_the_rooms_and_their_order(package: str) -> None:
    contracts = read_text("pyproject.toml")
    layers = re.search(rf'containers = \["{package}"\].*?layers = \[(.*?)^\]', contracts, re.MULTILINE | re.DOTALL)
    assert layers is not None
    here = {path.stem for path in (ROOT / package).iterdir()}
    expected = [set(re.findall(r"\w+", floor)) & here for floor in re.findall(r'"(.*?)"', layers[1])]
    _, _, tables = read_text("docs/architecture.md").partition(f"\n### {package}\n")
    assert read_floors(tables.partition("\n#")[0]) == [floor for floor in expected if floor]


@pytest.mark.parametrize("package", find_packages(MODULES))
def test_docstrings_refer_to_what_is_there(package: str) -> None:
    folder = MODULES[package].parent
    for name, file in MODULES.items():
        if file.parent == folder:
            for scope, target in find_references(name, file):
                assert is_there(scope, target), f"{file}: nothing is called {target} in {scope}"


def find_references(module: str, file: Path) -> list[tuple[str, str]]:
    """The Sphinx roles in the docstrings of a file: in what, and to what."""
    found: list[tuple[str, str]] = []

    def visit(node: ast.AST, scope: str) -> None:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.extend((scope, target) for target in ROLE.findall(ast.get_docstring(node) or ""))
        for child in ast.iter_child_nodes(node):
            visit(child, f"{scope}.{child.name}" if isinstance(child, ast.ClassDef) else scope)

    visit(read_tree(file), module)
    return found


@functools.cache
def find_definitions() -> dict[str, str]:
    """The module of each class and function that is defined at the top of one."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {n.name: name for name, file in MODULES.items() for n in read_tree(file).body if isinstance(n, kinds)}


def is_there(scope: str, target: str) -> bool:
    """Whether a name means something: looked up from inside ``scope``, as a dotted path, or defined in any module."""
    candidates = [target, f"{find_definitions().get(target.partition('.')[0])}.{target}"]
    while scope:
        candidates.append(f"{scope}.{target}")
        scope = scope.rpartition(".")[0]
    return any(exists(candidate) for candidate in candidates)


def exists(path: str) -> bool:
    """Whether there is such an object, or a class that gives its instances such an attribute."""
    owner, _, name = path.rpartition(".")
    try:
        find_object(path)
    except (AttributeError, ImportError, ValueError):
        try:
            found = find_object(owner)
        except (AttributeError, ImportError, ValueError):
            return False
        return isinstance(found, type) and re.search(rf"\bself\.{name}\b", inspect.getsource(found)) is not None
    return True


def test_roles_become_links() -> None:
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("translate_roles", ROOT / "docs/api/translate_roles.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "See :class:`~passes.base.GraphPass` or :meth:`call`."
    assert module.translate_roles(text, lambda name: {"call": "a.b.call"}.get(name, name)) == (
        'See <autoref identifier="passes.base.GraphPass" optional><code>GraphPass</code></autoref> or '
        '<autoref identifier="a.b.call" optional><code>call</code></autoref>.'
    )
