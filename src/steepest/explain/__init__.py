"""Explain the rule and options of each tensor of an optimizer: rows, totals, warnings, and a table."""

from steepest.explain.explanation import Explanation, explain
from steepest.explain.rows import BY_NAME, Reasons, Row, Total, starred
from steepest.explain.sharded import byte_words
from steepest.explain.summary import summarize

__all__ = [
    "BY_NAME",
    "Explanation",
    "Reasons",
    "Row",
    "Total",
    "byte_words",
    "explain",
    "starred",
    "summarize",
]
