"""Adaptive low-rank adapters for any PyTorch model, folded into its weights and exported to ONNX."""

from __future__ import annotations

import passes as _passes

if not getattr(_passes, "ADAPTER_COMPILER_PASSES", False):
    _found = _passes.__file__ or list(_passes.__path__)
    raise ImportError(
        f"adapter_compiler needs its own package 'passes', but Python found {_found}; "
        "rename your folder or module 'passes', or run from another directory"
    )

from adapter_compiler.adapted import AdaptedModel
from adapter_compiler.budget import Allocation, BudgetSchedule, RankBudget
from adapter_compiler.checkpoint import load_adapters
from adapter_compiler.compiler import compile_with_adapters
from adapter_compiler.config import AdapterConfig
from adapter_compiler.errors import AdapterCompilerError
from adapter_compiler.initialise import DataStart, InitialisationReport, initialise_adapters
from adapter_compiler.onnx import ExportReport, OnnxAdapters, export_onnx, save_onnx_adapter
from adapter_compiler.realign import Realigner, rediagonalise
from adapter_compiler.report.ranks import plot_ranks
from adapter_compiler.static_allocation import StaticAllocation, allocate_ranks
from adapter_compiler.training_state import load_training_state, save_training_state
from passes.plan import AdapterPlan
from passes.rules import AdapterRule

__all__ = [
    "AdaptedModel",
    "AdapterCompilerError",
    "AdapterConfig",
    "AdapterPlan",
    "AdapterRule",
    "Allocation",
    "BudgetSchedule",
    "DataStart",
    "ExportReport",
    "InitialisationReport",
    "OnnxAdapters",
    "RankBudget",
    "Realigner",
    "StaticAllocation",
    "allocate_ranks",
    "compile_with_adapters",
    "export_onnx",
    "initialise_adapters",
    "load_adapters",
    "load_training_state",
    "plot_ranks",
    "rediagonalise",
    "save_onnx_adapter",
    "save_training_state",
]
