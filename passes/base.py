"""The base class of all passes, the pass manager, and the errors of this package.

A pass is an immutable object that turns one graph into another. Its contract is checked at each run: ``requires`` on
the input graph, ``ensures`` on the result. A pass manager runs passes in order and reports each result to an observer,
so that a compilation can be logged or printed without changes to the passes.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Callable, Sequence

from torch import nn
from torch.fx import GraphModule


class AdapterCompilerError(Exception):
    """Base class of every error that adapter-compiler raises on purpose."""


class PassError(AdapterCompilerError):
    """A pass failed; the message names the pass and those that ran before it."""


class PreconditionError(PassError):
    """The input graph of a pass does not satisfy what the pass requires."""


class PostconditionError(PassError):
    """The graph that a pass returned does not satisfy what the pass ensures."""


class CaptureError(AdapterCompilerError):
    """A module could not be captured as a graph that gives the same results."""


class SiteError(AdapterCompilerError, ValueError):
    """A request names no site, an unknown site, or a weight that cannot have an adapter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassResult:
    """What a pass returns: the graph, and whether the pass changed it."""

    graph_module: GraphModule
    modified: bool


class GraphPass(abc.ABC):
    """Base of all passes. Subclasses are frozen dataclasses whose fields are their options.

    The graph is valid before and after a pass, not necessarily during it. A pass edits its graph module in place and
    returns it.
    """

    @property
    def name(self) -> str:
        """The class name, for errors and observers."""
        return type(self).__name__

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Check the precondition, run, check the postcondition, and generate code for a changed graph.

        Raises:
            PreconditionError: the input graph does not satisfy :meth:`requires`.
            PostconditionError: the result does not satisfy :meth:`ensures`.
        """
        result = self.edit(graph_module)
        if result.modified:
            _recompile(result.graph_module)
        return result

    def edit(self, graph_module: GraphModule) -> PassResult:
        """Run the pass as a call does, with the same errors, but without generating code for a changed graph."""
        _check(self, "requires", graph_module, PreconditionError)
        result = self.call(graph_module)
        _check(self, "ensures", result.graph_module, PostconditionError)
        return result

    @abc.abstractmethod
    def call(self, graph_module: GraphModule) -> PassResult:
        """Edit the graph; the caller checks the contract."""

    def requires(self, graph_module: GraphModule) -> None:
        """Raise an error if this pass does not accept the graph; by default, the graph must lint."""
        graph_module.graph.lint()

    def ensures(self, graph_module: GraphModule) -> None:
        """Raise an error if the result breaks the contract; by default, the graph and its regions must lint."""
        for body in find_graph_modules(graph_module):
            body.graph.lint()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassManager(GraphPass):
    """Runs passes in order; it is a pass itself.

    Code is generated once, at the end, or after each pass if there is an observer.

    Attributes:
        passes: the passes, first to last.
        observer: called as ``observer(pass, result)`` after each pass.
    """

    passes: Sequence[GraphPass]
    observer: Callable[[GraphPass, PassResult], None] | None = None

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the passes.

        Raises:
            PassError: a pass failed; the message names it and the passes that ran before.
        """
        modified = False
        for position, one in enumerate(self.passes):
            try:
                result = one.edit(graph_module) if self.observer is None else one(graph_module)
            except Exception as error:
                before = _names(self.passes[:position])
                raise PassError(f"{one.name} failed (passes before it: {before}): {error}") from error
            graph_module = result.graph_module
            modified = modified or result.modified
            if self.observer is not None:
                self.observer(one, result)
        return PassResult(graph_module=graph_module, modified=modified)

    def requires(self, graph_module: GraphModule) -> None:
        """No check of its own: each pass checks its input."""

    def ensures(self, graph_module: GraphModule) -> None:
        """No check of its own: each pass checks its result."""


def find_graph_modules(graph_module: GraphModule) -> list[GraphModule]:
    """The graph module and the bodies of all regions inside it, a body before the bodies that it calls."""
    bodies = {graph_module: None}
    for child in graph_module.children():
        if isinstance(child, GraphModule):
            bodies |= dict.fromkeys(find_graph_modules(child))
    return list(bodies)


def clone_graph_module(graph_module: GraphModule) -> GraphModule:
    """A copy whose graphs can be edited without changing the original; parameters are shared."""
    clone = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    for name, child in graph_module.named_children():
        if isinstance(child, GraphModule):
            setattr(clone, name, clone_graph_module(child))
    return clone


def make_containers(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path below ``root`` (``root`` if the path is empty); missing modules are created empty."""
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        child = root._modules[part]
        assert child is not None
        root = child
    return root


def _recompile(graph_module: GraphModule) -> None:
    for body in find_graph_modules(graph_module):
        body.recompile()


def _check(one: GraphPass, condition: str, graph_module: GraphModule, error_type: type[PassError]) -> None:
    try:
        getattr(one, condition)(graph_module)
    except PassError:
        raise
    except Exception as error:
        raise error_type(f"{one.name}.{condition}: {error}") from error


def _names(passes: Sequence[GraphPass]) -> str:
    return ", ".join(one.name for one in passes) or "none"
