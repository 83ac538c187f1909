"""How the model's Python runs with adapters: every read of an adapted weight gives W + ΔW.

``attach`` adds adapters to a model and removes them. ``classes`` makes the subclasses of module classes in which
weights read as W + ΔW. ``weights`` has the tensor that a read gives. ``slots`` holds the adapters of a weight.
``scope`` tells whether a thread sees adapters. ``memory`` lets activations keep less for backward. Nothing here
captures a graph.
"""
