"""Read every error text of both packages from their source, with ``{placeholders}`` and without line numbers.

Found are all calls of our own error classes, wherever they are made, and whatever else a ``raise`` calls with a text:
other classes, and functions that make an error from a few words. Where a text has a variable that is set to a text
in the same function or module, those texts are listed below it.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from tests.source_files import ROOT, find_modules, read_tree

#: The class above all errors of ours; see passes/base.py.
ROOT_CLASS = "AdapterCompilerError"

Scope = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef
Texts = dict[str, list[str]]


def list_error_texts(root: Path = ROOT) -> str:
    """Each module that makes errors, and below it their classes and texts, sorted."""
    trees = {name: read_tree(file) for name, file in find_modules(root).items()}
    classes = find_error_classes(trees.values())
    blocks = []
    for name, tree in trees.items():
        if lines := sorted(set(_find_texts(tree, classes))):
            blocks.append("\n".join([name, *(f"    {line}" for line in lines)]))
    return "\n\n".join(blocks) + "\n"


def find_error_classes(trees: Collection[ast.Module]) -> set[str]:
    """The names of :data:`ROOT_CLASS` and of every class below it."""
    definitions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found = {ROOT_CLASS}
    while new := {d.name for d in definitions if found & {_render(base) for base in d.bases}} - found:
        found |= new
    return found


def _find_texts(scope: Scope, classes: Collection[str], outer: Texts | None = None) -> Iterator[str]:
    """The texts that a module or function makes, and those of the functions inside it."""
    texts = {**(outer or {}), **_find_local_texts(scope)}
    raised = {id(node.exc) for node in _walk(scope) if isinstance(node, ast.Raise)}
    for node in _walk(scope):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _find_texts(node, classes, texts)
        elif isinstance(node, ast.Call) and (
            _render(node.func) in classes
            or ((id(node) in raised or _is_refusal(node.func)) and any(map(_is_text, node.args)))
        ):
            yield _describe(node, texts)


def _is_refusal(function: ast.expr) -> bool:
    """Whether a function makes or raises the error of a reader, as ``source.fail(text)`` and ``self._refuse(text)``."""
    return isinstance(function, ast.Attribute) and function.attr in ("fail", "refuse", "_refuse")


def _walk(scope: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a scope, down to functions inside it but not into them."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _walk(child)


def _find_local_texts(scope: Scope) -> Texts:
    """By each variable, the texts that it is set to in this scope."""
    found: Texts = {}
    for node in _walk(scope):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _is_text(node.value):
            found.setdefault(node.targets[0].id, []).append(_read_text(node.value))
    return found


def _is_text(value: ast.expr) -> bool:
    if isinstance(value, ast.IfExp):
        return _is_text(value.body) or _is_text(value.orelse)
    return isinstance(value, ast.JoinedStr) or (isinstance(value, ast.Constant) and isinstance(value.value, str))


def _describe(call: ast.Call, texts: Texts) -> str:
    """``Class: text``, and the texts of its variables on further lines."""
    used = {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}
    text = " | ".join(map(_read_text, [*call.args, *(keyword.value for keyword in call.keywords)]))
    lines = [f"{_render(call.func)}: {text}".rstrip()]
    lines += [f"    {{{name}}} = {one}" for name in sorted(used & texts.keys()) for one in sorted(texts[name])]
    return "\n    ".join(lines)


def _read_text(value: ast.expr) -> str:
    """A text as it is, and anything else as a placeholder."""
    match value:
        case ast.Constant(value=str(text)):
            return text.replace("\n", "\\n")
        case ast.JoinedStr(values=parts):
            return "".join(map(_read_text, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _read_text(left) + _read_text(right)
        case ast.Call(func=ast.Attribute(value=ast.JoinedStr() as text, attr="rstrip" | "strip")):
            return _read_text(text)
        case ast.FormattedValue(value=inner, conversion=conversion, format_spec=spec):
            suffix = f"!{chr(conversion)}" if conversion > 0 else ""
            return f"{{{_render(inner)}{suffix}{'' if spec is None else ':' + _read_text(spec)}}}"
    return f"{{{_render(value)}}}"


def _render(value: ast.AST) -> str:
    """An expression in short: names, attributes, calls and choices; everything longer is ``…``.

    ``ast.unparse`` would give the whole of it, but not the same in every version of Python.
    """
    match value:
        case ast.Name(id=name):
            return name
        case ast.Constant(value=constant):
            return repr(constant)
        case ast.Attribute(value=owner, attr=attribute):
            return f"{_render(owner)}.{attribute}"
        case ast.Call(func=ast.Attribute(value=ast.Constant(), attr=method), args=arguments):
            return f"{method}({_render_all(arguments)})"
        case ast.Call(func=function, args=arguments):
            return f"{_render(function)}({_render_all(arguments)})"
        case ast.Subscript(value=owner, slice=index):
            return f"{_render(owner)}[{_render(index)}]"
        case ast.IfExp(body=body, orelse=other):
            return f"{_read_choice(body)} or {_read_choice(other)}"
    return "…"


def _render_all(values: Iterable[ast.expr]) -> str:
    return ", ".join(map(_render, values))


def _read_choice(value: ast.expr) -> str:
    return repr(_read_text(value)) if _is_text(value) else _render(value)
