"""Learning rates: from AdamW's to another rule's, beside a running optimizer, and from a model alone."""

from steepest.learning_rates.range_test import Suggestion, suggest_lr
from steepest.learning_rates.shadows import Shadow, ShadowReport, ShadowRow, shadow
from steepest.learning_rates.translations import TRANSLATIONS, Translation, from_adamw

__all__ = [
    "TRANSLATIONS",
    "Shadow",
    "ShadowReport",
    "ShadowRow",
    "Suggestion",
    "Translation",
    "from_adamw",
    "shadow",
    "suggest_lr",
]
