"""Rank budget: which triplets live, decided while the user's own loop trains."""

from adapter_compiler.budget.allocation import Allocation
from adapter_compiler.budget.checks import MaskingRecord
from adapter_compiler.budget.observers import TensorBoardObserver
from adapter_compiler.budget.runtime import RankBudget
from adapter_compiler.budget.schedule import BudgetSchedule

__all__ = ["Allocation", "BudgetSchedule", "MaskingRecord", "RankBudget", "TensorBoardObserver"]
