"""Read the source of both packages: their modules, and who imports whom."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parent.parent
PACKAGES = ("adapter_compiler", "passes")


def find_modules(root: Path = ROOT) -> dict[str, Path]:
    """The file of each module and package, by its qualified name, in order of names."""
    files = (file for package in PACKAGES for file in (root / package).rglob("*.py"))
    return {name_module(file, root): file for file in sorted(files)}


def name_module(file: Path, root: Path = ROOT) -> str:
    """The qualified name under which a file is imported."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_tree(file: Path) -> ast.Module:
    """The syntax tree of a source file."""
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def find_packages(modules: dict[str, Path]) -> list[str]:
    """The names of those modules that are folders."""
    return [name for name, file in modules.items() if file.name == "__init__.py"]


def read_import_graph(root: Path = ROOT) -> nx.DiGraph:
    """An edge for each import of a module of both packages by another, wherever in the file it stands.

    Imports inside functions and under ``TYPE_CHECKING`` count as well: they too say what depends on what.
    """
    modules = find_modules(root)
    graph = nx.DiGraph()
    graph.add_nodes_from(modules)
    for name, file in modules.items():
        found = {target for node in ast.walk(read_tree(file)) for target in _find_targets(node, name, modules)}
        graph.add_edges_from((name, target) for target in sorted(found - {name}))
    return graph


def _find_targets(node: ast.AST, importer: str, modules: dict[str, Path]) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & modules.keys()
    if not isinstance(node, ast.ImportFrom):
        return set()
    source = _resolve(node, importer, is_package=modules[importer].name == "__init__.py")
    names = {f"{source}.{alias.name}" for alias in node.names}
    return (names & modules.keys()) or ({source} & modules.keys())


def _resolve(node: ast.ImportFrom, importer: str, *, is_package: bool) -> str:
    """The absolute name of the module after ``from``."""
    if node.level == 0:
        return node.module or ""
    parts = importer.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, node.module] if node.module else parts)


def merge_by_part(graph: nx.DiGraph, package: str) -> nx.DiGraph:
    """The imports between the parts of a package, where a part is a module or a whole folder directly inside."""
    depth = package.count(".") + 2
    part_of = {name: ".".join(name.split(".")[:depth]) for name in graph if name.startswith(f"{package}.")}
    merged = nx.DiGraph()
    merged.add_nodes_from(part_of.values())
    for importer, imported in graph.edges:
        one, other = part_of.get(importer), part_of.get(imported)
        if one and other and one != other:
            merged.add_edge(one, other, example=f"{importer} imports {imported}")
    return merged


def find_circle(graph: nx.DiGraph) -> list[tuple[str, str]]:
    """The edges of one circle of the graph; none if it has no circle."""
    try:
        return [(one, other) for one, other in nx.find_cycle(graph)]
    except nx.NetworkXNoCycle:
        return []
