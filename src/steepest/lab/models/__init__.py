"""The lab's models: a small GPT and two classifiers of digits."""

from .digits import DigitConvNet, digit_mlp
from .gpt import GPT, GPTConfig

__all__ = ["GPT", "DigitConvNet", "GPTConfig", "digit_mlp"]
