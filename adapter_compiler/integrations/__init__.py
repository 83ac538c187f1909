"""One line each for the libraries in which people train; each is imported when it is asked for.

``pip install adapter-compiler[integrations]`` brings them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapter_compiler.onnx.lazy_imports import import_on_demand

if TYPE_CHECKING:
    from adapter_compiler.integrations.fsdp import ShardedAdapters, load_sharded_state, shard
    from adapter_compiler.integrations.lightning import LightningBudget
    from adapter_compiler.integrations.trainer import TrainerBudget
else:
    __getattr__ = import_on_demand(
        __name__,
        {
            "LightningBudget": "adapter_compiler.integrations.lightning",
            "ShardedAdapters": "adapter_compiler.integrations.fsdp",
            "load_sharded_state": "adapter_compiler.integrations.fsdp",
            "TrainerBudget": "adapter_compiler.integrations.trainer",
            "shard": "adapter_compiler.integrations.fsdp",
        },
    )

__all__ = ["LightningBudget", "ShardedAdapters", "TrainerBudget", "load_sharded_state", "shard"]
