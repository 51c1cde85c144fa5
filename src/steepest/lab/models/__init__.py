"""The lab's own models, small enough to read in one sitting."""

from .digits import DigitConvNet, digit_mlp
from .gpt import GPT, GPTConfig

__all__ = ["GPT", "DigitConvNet", "GPTConfig", "digit_mlp"]
