"""Adaptive low-rank adapters for any PyTorch model, folded into its weights and exported to ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING

import passes as _passes

if not getattr(_passes, "ADAPTER_COMPILER_PASSES", False):
    _found = _passes.__file__ or list(_passes.__path__)
    raise ImportError(
        f"adapter_compiler needs its own package 'passes', but Python found another one at {_found}; "
        "rename your folder or module 'passes', or run from another directory"
    )

from adapter_compiler.compile import compile_with_adapters
from adapter_compiler.config.adapter_config import AdapterConfig
from adapter_compiler.config.mixture import Mixture
from adapter_compiler.config.progress import set_progress
from adapter_compiler.errors import AdapterCompilerError
from adapter_compiler.load_folder import load
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.model.optimizers import AdapterMuon, AdapterNormalized
from adapter_compiler.onnx.lazy_imports import import_on_demand
from adapter_compiler.saving.adapters import load_adapters
from passes.planning.plan import AdapterPlan
from passes.planning.rules import AdapterRule

if TYPE_CHECKING:
    from adapter_compiler.onnx import (
        ExportReport,
        OnnxAdapters,
        OnnxDecoder,
        export_decoder,
        export_onnx,
        save_onnx_adapter,
    )
    from adapter_compiler.report.ranks import plot_ranks
    from adapter_compiler.report.weight_changes import WeightChange, measure_weight_changes, plot_weight_changes
    from adapter_compiler.training.auxiliary.block_distillation import BlockDistillation
    from adapter_compiler.training.auxiliary.router_balance import RouterBalance, load_balancing_loss, measure_routing
    from adapter_compiler.training.budget import Allocation, BudgetSchedule, RankBudget
    from adapter_compiler.training.calibration.allocate_ranks import StaticAllocation, allocate_ranks
    from adapter_compiler.training.calibration.joint_start import JointStart, initialize_jointly
    from adapter_compiler.training.calibration.realign import Realigner, rediagonalize
    from adapter_compiler.training.calibration.start_from_data import (
        DataStart,
        InitializationReport,
        initialize_adapters,
    )
    from adapter_compiler.training.make_optimizer import make_optimizer
    from adapter_compiler.training.training_state import load_training_state, save_training_state
    from adapter_compiler.training.tuning.find_combination import Combination, find_combination
    from adapter_compiler.training.tuning.find_rate import RateSearch, find_rate
    from adapter_compiler.training.tuning.find_smallest import find_smallest
    from adapter_compiler.training.tuning.intrinsic_dimension import IntrinsicDimension, measure_intrinsic_dimension
    from adapter_compiler.training.tuning.size_search import SizePoint, SizeSearch
else:
    # What a program that serves adapters, or only compiles, may never use.
    __getattr__ = import_on_demand(
        __name__,
        {
            name: f"adapter_compiler.{module}"
            for module, names in {
                "onnx": (
                    "ExportReport",
                    "OnnxAdapters",
                    "OnnxDecoder",
                    "export_decoder",
                    "export_onnx",
                    "save_onnx_adapter",
                ),
                "report.ranks": ("plot_ranks",),
                "report.weight_changes": ("WeightChange", "measure_weight_changes", "plot_weight_changes"),
                "training.auxiliary.block_distillation": ("BlockDistillation",),
                "training.auxiliary.router_balance": ("RouterBalance", "load_balancing_loss", "measure_routing"),
                "training.budget": ("Allocation", "BudgetSchedule", "RankBudget"),
                "training.calibration.allocate_ranks": ("StaticAllocation", "allocate_ranks"),
                "training.calibration.joint_start": ("JointStart", "initialize_jointly"),
                "training.calibration.realign": ("Realigner", "rediagonalize"),
                "training.calibration.start_from_data": ("DataStart", "InitializationReport", "initialize_adapters"),
                "training.make_optimizer": ("make_optimizer",),
                "training.training_state": ("load_training_state", "save_training_state"),
                "training.tuning.find_combination": ("Combination", "find_combination"),
                "training.tuning.find_rate": ("RateSearch", "find_rate"),
                "training.tuning.find_smallest": ("find_smallest",),
                "training.tuning.intrinsic_dimension": ("IntrinsicDimension", "measure_intrinsic_dimension"),
                "training.tuning.size_search": ("SizePoint", "SizeSearch"),
            }.items()
            for name in names
        },
    )

__version__ = "0.1.0"

__all__ = [
    "AdaptedModel",
    "AdapterCompilerError",
    "AdapterConfig",
    "AdapterMuon",
    "AdapterNormalized",
    "AdapterPlan",
    "AdapterRule",
    "Allocation",
    "BlockDistillation",
    "BudgetSchedule",
    "Combination",
    "DataStart",
    "ExportReport",
    "InitializationReport",
    "IntrinsicDimension",
    "JointStart",
    "Mixture",
    "OnnxAdapters",
    "OnnxDecoder",
    "RankBudget",
    "RateSearch",
    "Realigner",
    "RouterBalance",
    "SizePoint",
    "SizeSearch",
    "StaticAllocation",
    "WeightChange",
    "allocate_ranks",
    "compile_with_adapters",
    "export_decoder",
    "export_onnx",
    "find_combination",
    "find_rate",
    "find_smallest",
    "initialize_adapters",
    "initialize_jointly",
    "load",
    "load_adapters",
    "load_balancing_loss",
    "load_training_state",
    "make_optimizer",
    "measure_intrinsic_dimension",
    "measure_routing",
    "measure_weight_changes",
    "plot_ranks",
    "plot_weight_changes",
    "rediagonalize",
    "save_onnx_adapter",
    "save_training_state",
    "set_progress",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
