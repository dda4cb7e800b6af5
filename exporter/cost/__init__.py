"""What a piece costs, and whether it fits its device. Pure: runs on saved graphs, no TensorFlow."""

from .budget import (
    BUDGET_RULES,
    BudgetRule,
    Finding,
    check_budgets,
    flash_fits,
    memory_fits,
    ram_fits,
    refuse,
)
from .piece import Basis, Numbers, PieceCost, peak_activation_elements, piece_cost, together
from .traffic import (
    TierTraffic,
    bytes_per_sample,
    fleet_bytes_per_sample,
    score_message_bytes,
)

__all__ = [
    "BUDGET_RULES",
    "Basis",
    "BudgetRule",
    "Finding",
    "Numbers",
    "PieceCost",
    "TierTraffic",
    "bytes_per_sample",
    "check_budgets",
    "flash_fits",
    "fleet_bytes_per_sample",
    "memory_fits",
    "peak_activation_elements",
    "piece_cost",
    "ram_fits",
    "refuse",
    "score_message_bytes",
    "together",
]
