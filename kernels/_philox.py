"""Philox-4x32-10 counter-based random bits, in plain PyTorch: the same numbers as Triton's `tl.rand`.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. One counter word (the element's offset) and one
64-bit seed give one uniform number, so a draw does not depend on the device, the launch shape or the order of work.
"""

from __future__ import annotations

import torch
from torch import Tensor

_KEY = (0x9E3779B9, 0xBB67AE85)
_ROUND = (0xD2511F53, 0xCD9E8D57)
_WORD = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of the product of two 32-bit numbers held in int64."""
    # Split b: a * b does not fit a signed 64-bit integer.
    low = a * (b & 0xFFFF)
    high = a * (b >> 16)
    middle = (high & 0xFFFF) << 16
    total = middle + low
    return (high >> 16) + (total >> 32), total & _WORD


def uniform(seed: Tensor, count: int) -> Tensor:
    """fp32 numbers in [0, 1) for the offsets 0..count-1 under an int64 seed of one element."""
    offset = torch.arange(count, device=seed.device, dtype=torch.int64)
    c0, c1 = offset & _WORD, torch.zeros_like(offset)
    c2, c3 = torch.zeros_like(offset), torch.zeros_like(offset)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high_b, low_b = _mulhilo(_ROUND[1], c2)
        high_a, low_a = _mulhilo(_ROUND[0], c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY[0]) & _WORD, (k1 + _KEY[1]) & _WORD
    # Signed words folded onto [0, 2^31), then scaled below one, as Triton does.
    signed = torch.where(c0 >= 2**31, c0 - 2**32, c0)
    folded = torch.where(signed < 0, -signed - 1, signed)
    return folded.to(torch.float32) * 4.6566127342e-10
