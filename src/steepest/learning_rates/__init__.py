"""Learning rates: from AdamW's to another rule's, from a running optimizer's, and from a model alone."""

from steepest.learning_rates.range_test import Suggestion, suggest_lr
from steepest.learning_rates.shadows import Shadow, ShadowReport, ShadowRow, shadow

__all__ = ["Shadow", "ShadowReport", "ShadowRow", "Suggestion", "shadow", "suggest_lr"]
