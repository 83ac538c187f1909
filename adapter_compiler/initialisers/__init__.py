"""Starting values of adapters."""

from adapter_compiler.initialisers.gaussian import initialise_gaussian

__all__ = ["initialise_gaussian"]
