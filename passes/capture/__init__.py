"""Turn a call of a module into a graph, and check the graph against the module.

Also the state of modules (attributes, buffers, random generators) that captures must restore or refuse. Nothing here
knows of adapters.
"""
