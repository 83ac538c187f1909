"""How Python runs with adapters: every read of an adapted weight, by whoever and wherever, gives W + ΔW.

``scope`` says which threads see adapters at the moment, ``slots`` keeps what stands at a weight, ``adapted_weight`` is
the tensor that a read gives, ``classes`` makes modules give it, ``attach`` puts it all into a model and takes it out,
``memory`` lets activations keep less for backward. Nothing here captures a graph.
"""
