"""Scores that need no model: SQL execution and exact match, multiple choice, and tables for the terminal.

This is an island: it imports nothing of the package but its errors, and needs no torch. Only `scoring.table` imports
rich.
"""

from __future__ import annotations

from megatron_replay.scoring.choice import Proportion, choose, proportion, score_choices
from megatron_replay.scoring.sql import (
    Match,
    Outcome,
    Sandbox,
    exact_match,
    execute,
    execution_match,
    extract_sql,
    gold_fault,
    has_order_by,
    same_result,
)
from megatron_replay.scoring.sql_hardness import LEVELS, hardness
from megatron_replay.scoring.sql_rules import RULES, find_rule

__all__ = [
    "LEVELS",
    "RULES",
    "Match",
    "Outcome",
    "Proportion",
    "Sandbox",
    "choose",
    "exact_match",
    "execute",
    "execution_match",
    "extract_sql",
    "find_rule",
    "gold_fault",
    "hardness",
    "has_order_by",
    "proportion",
    "same_result",
    "score_choices",
]
