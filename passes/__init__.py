"""Graph passes of adapter-compiler: graph in, graph out, plain data, no training.

Users import everything from :mod:`adapter_compiler`; whoever writes a pass imports from
the modules of this package. It depends on torch and networkx only.
"""

#: Identifies this package to ``adapter_compiler``, which refuses a user's own ``passes`` folder.
ADAPTER_COMPILER_PASSES = True
