"""What every pass is: a frozen value that turns one graph into another under a contract.

The contract of a pass is checked at each run: ``requires`` on the graph that goes in, ``ensures``
on the graph that comes out. A pass manager runs passes in order and shows each result to an
observer, so that a compilation can be watched, logged or printed without the passes knowing.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Callable, Sequence

from torch import nn
from torch.fx import GraphModule


class AdapterCompilerError(Exception):
    """Root of every error that adapter-compiler raises on purpose."""


class PassError(AdapterCompilerError):
    """A pass failed; the message names the pass and those that ran before it."""


class PreconditionError(PassError):
    """The graph handed to a pass does not satisfy what the pass requires."""


class PostconditionError(PassError):
    """The graph a pass returned does not satisfy what the pass promises."""


class CaptureError(AdapterCompilerError):
    """A module could not be turned into a graph that computes the same numbers."""


class SiteError(AdapterCompilerError, ValueError):
    """No site, an unknown site, or a weight that cannot carry an adapter was asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassResult:
    """What a pass returns: the graph and whether anything in it was changed."""

    graph_module: GraphModule
    modified: bool


class GraphPass(abc.ABC):
    """Base of all passes. Subclasses are frozen dataclasses whose fields are their options.

    The graph verifies before and after a pass, not necessarily during it. A pass edits the graph
    module that it is given and returns it.
    """

    @property
    def name(self) -> str:
        """The class name, as errors and observers show it."""
        return type(self).__name__

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Check the precondition, run, check the postcondition on the result.

        Raises:
            PreconditionError: the input graph does not meet the contract.
            PostconditionError: the result does not meet the contract.
        """
        result = self.edit(graph_module)
        if result.modified:
            _recompile(result.graph_module)
        return result

    def edit(self, graph_module: GraphModule) -> PassResult:
        """The same without code for the changed graph, which only its last pass needs to generate."""
        _check(self, "requires", graph_module, PreconditionError)
        result = self.call(graph_module)
        _check(self, "ensures", result.graph_module, PostconditionError)
        return result

    @abc.abstractmethod
    def call(self, graph_module: GraphModule) -> PassResult:
        """Do the work."""

    def requires(self, graph_module: GraphModule) -> None:
        """Raise if ``graph_module`` is not one this pass accepts. By default: it lints."""
        graph_module.graph.lint()

    def ensures(self, graph_module: GraphModule) -> None:
        """Raise if the result breaks the contract. By default: it and its regions lint."""
        for body in find_graph_modules(graph_module):
            body.graph.lint()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassManager(GraphPass):
    """Runs passes in order; itself a pass. Code is generated once, at the end, or for each result that is observed.

    Attributes:
        passes: the passes, first to last.
        observer: called as ``observer(pass, result)`` after each pass.
    """

    passes: Sequence[GraphPass]
    observer: Callable[[GraphPass, PassResult], None] | None = None

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run the passes; an error names the passes that ran before."""
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
        """Nothing of its own: each pass checks what it is given."""

    def ensures(self, graph_module: GraphModule) -> None:
        """Nothing of its own: each pass checks what it returns."""


def find_graph_modules(graph_module: GraphModule) -> list[GraphModule]:
    """The graph module itself and the bodies of the regions inside it; each holds those that it calls."""
    bodies = {graph_module: None}
    for child in graph_module.children():
        if isinstance(child, GraphModule):
            bodies |= dict.fromkeys(find_graph_modules(child))
    return list(bodies)


def clone_graph_module(graph_module: GraphModule) -> GraphModule:
    """A graph module whose graphs may be edited without changing the original; parameters are shared."""
    clone = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    for name, child in graph_module.named_children():
        if isinstance(child, GraphModule):
            setattr(clone, name, clone_graph_module(child))
    return clone


def make_containers(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path below ``root``, which an empty path means; made of empty ones where there is none."""
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
