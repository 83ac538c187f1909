"""FSDP2 around an adapted model: the base is sharded, the adapters are whole on every rank.

``shard(adapted)`` takes the place of ``fully_shard``; the optimizer and the rank budget are made after it as ever.
Adapters are small, and what scores and cuts them needs them whole. Their gradients are summed over the ranks in one
all-reduce before each optimizer step.
"""

from adapter_compiler.integrations.fsdp.shard import shard
from adapter_compiler.integrations.fsdp.sharded_adapters import ShardedAdapters
from adapter_compiler.integrations.fsdp.state.load_state import load_sharded_state

__all__ = ["ShardedAdapters", "load_sharded_state", "shard"]
