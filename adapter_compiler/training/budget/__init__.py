"""The rank budget, which prunes triplets while the user's own loop trains."""

from adapter_compiler.training.budget.allocation import Allocation
from adapter_compiler.training.budget.masking_record import MaskingRecord
from adapter_compiler.training.budget.observers import TensorBoardObserver
from adapter_compiler.training.budget.rank_budget import RankBudget
from adapter_compiler.training.budget.schedule import BudgetSchedule

__all__ = ["Allocation", "BudgetSchedule", "MaskingRecord", "RankBudget", "TensorBoardObserver"]
