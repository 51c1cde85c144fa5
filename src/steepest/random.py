"""Counter-based noise: a pure function of (key, element index), with the same bits on every device.

The same seed, step and element give the same bits in eager and compiled code, on a CPU, on a GPU and on a
shard; torch's global generator is never used. All arithmetic multiplies non-negative int64 values below 2**32
by constants below 2**31: no product overflows and no right shift moves a sign bit.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "Key",
    "Words",
    "bits32",
    "derive_key",
    "element_words",
    "normal",
    "stochastic_floor",
    "stochastic_round",
    "stream_bits",
    "stream_uniform",
    "tensor_word",
    "uniform",
]

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: spreads consecutive integers over the range

# Modules that wrap others and put their name into the names of all parameters.
_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module"})

Word = TypeVar("Word", int, Tensor)
Key = tuple[int | Tensor, int | Tensor]
Words = tuple[Tensor, int | Tensor]


def _mix(x: Word) -> Word:
    """Mix by a bijection of 32-bit words (Wellons, "hash-prospector", 2018); overwrites a tensor."""
    x ^= x >> 16
    x *= 0x21F0AAAD
    x &= _MASK
    x ^= x >> 15
    x *= 0x735A2D97
    x &= _MASK
    x ^= x >> 15
    return x


def derive_key(seed: int, *words: int | Tensor) -> Key:
    """Derive two 32-bit key words from a seed and words such as (tensor, step): ints or int64 tensors.

    >>> derive_key(0, 1, 2) == derive_key(0, 1, 2), derive_key(0, 1, 2) == derive_key(0, 2, 1)
    (True, False)
    """
    first: Any = _mix(seed & _MASK)
    second: Any = _mix(((seed >> 32) ^ 0x5851F42D) & _MASK)
    for word in words:
        # Mix the whole word into each half of the key, so that keys differ in 64 bits and not in 32.
        first = _mix((second + _mix((word ^ first) & _MASK)) & _MASK)
        second = _mix((first + _mix(((word >> 32) + second + _GOLDEN) & _MASK)) & _MASK)
    return first, second


def tensor_word(name: str) -> int:
    """Hash a parameter's name into a word for :func:`derive_key`: 64 bits, signed, as int64 tensors are.

    The names of wrappers (``module.``, ``_orig_mod.``, ``_checkpoint_wrapped_module.``) do not count.

    >>> tensor_word("module.head._orig_mod.weight") == tensor_word("head.weight")
    True
    """
    *path, last = name.split(".")
    plain = ".".join([*(part for part in path if part not in _WRAPPERS), last])
    digest = hashlib.blake2b(plain.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def bits32(key: Key, index: Tensor, stream: int = 0) -> Tensor:
    """Draw 32 random bits for every element index: int64 values in [0, 2**32) of ``index``'s shape.

    ``index`` is int64, or int32 if all are below 2**31, which is faster. ``stream`` distinguishes several
    draws for the same element in the same step.

    >>> index = torch.arange(6)
    >>> torch.equal(bits32((1, 2), index)[2:], bits32((1, 2), index[2:]))
    True
    """
    return stream_bits(element_words(key, index), stream)


def element_words(key: Key, index: Tensor) -> Words:
    """Compute the part of :func:`bits32` that all streams share."""
    if index.dtype == torch.int32:
        return _mix(index.to(torch.int64) ^ key[0]), key[1]
    return _mix((index & _MASK) ^ key[0]), key[1] + (index >> 32) * 0x2545F491


def stream_bits(words: Words, stream: int) -> Tensor:
    """Compute :func:`bits32` of one stream from the result of :func:`element_words`."""
    word, other = words
    mixed = word + ((other + stream * _GOLDEN) & _MASK)
    mixed &= _MASK
    return _mix(mixed)


def uniform(key: Key, index: Tensor, stream: int = 0) -> Tensor:
    """Draw uniform float32 values in [0, 1), one per element index: 24 random bits, the same everywhere."""
    return stream_uniform(element_words(key, index), stream)


def stream_uniform(words: Words, stream: int) -> Tensor:
    """Compute :func:`uniform` of one stream from the result of :func:`element_words`."""
    bits = stream_bits(words, stream)
    bits >>= 8
    return _unit(bits)


def _unit(bits24: Tensor) -> Tensor:
    # CPUs convert int64 to floating point element by element, but vectorize int32.
    u = bits24.to(torch.int32).to(torch.float32)
    u *= 2.0**-24
    return u


def normal(key: Key, index: Tensor, stream: int = 0) -> Tensor:
    """Draw standard normal float32 values, one per element index: √(−2 ln u)·cos(2π u′).

    Box and Muller's transform of one 32-bit draw, with 16 bits each for u and u′, so |z| < 4.9. Logarithm and
    cosine may round differently on another device.

    >>> index = torch.arange(6)
    >>> torch.equal(normal((1, 2), index)[2:], normal((1, 2), index[2:]))
    True
    """
    bits = bits32(key, index, stream)
    radius, angle = ((half.to(torch.float32) + 0.5) * 2.0**-16 for half in (bits >> 16, bits & 0xFFFF))
    return (-2.0 * radius.log()).sqrt() * (2.0 * math.pi * angle).cos()


def stochastic_floor(x: Tensor, u: Tensor) -> Tensor:
    """Round x to ⌊x⌋ or ⌊x⌋ + 1 by u, uniform in [0, 1), with expectation x; integers do not change.

    >>> stochastic_floor(torch.tensor([2.0, 2.25, 2.25]), torch.tensor([0.99, 0.2, 0.3]))
    tensor([2., 3., 2.])
    """
    # ⌊x + u⌋ would be wrong: the sum can round up to the next integer.
    low = torch.floor(x)
    # Add a 0/1 tensor: torch.where takes 30 times as long on a CPU if the condition is unpredictable.
    up = x - low
    up.gt_(u)
    low += up
    return low


def stochastic_round(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 ``x`` to one of its two neighbors in bfloat16 or float16 so that the expectation is x.

    ``bits`` are :func:`bits32` of x's shape. Values that ``dtype`` represents exactly do not change,
    including zeros, infinities and NaN. Values beyond its largest finite value are rounded to nearest.

    >>> x = torch.full((4,), 1.0 + 2.0**-8)
    >>> stochastic_round(x, torch.bfloat16, torch.tensor([0, 1 << 14, 1 << 15, 65535])).tolist()
    [1.0, 1.0, 1.0078125, 1.0078125]
    """
    dropped = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    noise = (bits & ((1 << dropped) - 1)).to(torch.int32)
    noise += x.view(torch.int32)
    noise &= -(1 << dropped)
    rounded = noise.view(torch.float32)
    if dtype == torch.float16:
        # Below 2**-14 float16 is subnormal, with a fixed spacing of 2**-24.
        tiny = torch.copysign(stochastic_floor(x.abs() * 2.0**24, _unit(bits >> 8)) * 2.0**-24, x)
        rounded = torch.where(x.abs() < 2.0**-14, tiny, rounded)
    # Values above the largest finite one have no second neighbor, and adding to the bits of inf gives NaN.
    return torch.where(x.abs() <= torch.finfo(dtype).max, rounded, x).to(dtype)
