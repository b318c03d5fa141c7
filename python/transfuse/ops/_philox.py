"""Which probabilities dropout keeps, as a function of a seed: the same wherever a seed is given, in any order.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a 64-bit key
and a 128-bit counter into four 32-bit words. The word of the probability of query row r = (b * heads + h) * q_len + i
and key j has key = seed, counter = (j // 4, r mod 2^32, r // 2^32, offset) and index j mod 4. It is dropped if
word < p * 2^32. So a kernel draws one counter for four neighbouring keys, and the mask depends on neither tiles nor
k_len. For packed sequences q_len is max_q, and i and j count inside the sequence.
"""

from __future__ import annotations

import torch

_LOW = 0xFFFFFFFF


def keep_mask(
    seed: torch.Tensor, p: float, batch: int, heads: int, q_len: int, k_len: int, device: torch.device
) -> torch.Tensor:
    """bool (batch, heads, q_len, k_len), True = kept; seed: int64 (2,) = (seed, offset)."""
    groups = -(-k_len // 4)
    row = torch.arange(batch * heads * q_len, device=device)[:, None]
    seed = seed.to(device)
    counter = (torch.arange(groups, device=device)[None, :], row & _LOW, row >> 32, seed[1] & _LOW)
    words = philox4x32((seed[0] & _LOW, seed[0] >> 32 & _LOW), counter)
    word = torch.stack(torch.broadcast_tensors(*words), -1).flatten(-2)[:, :k_len]
    return (word >= round(p * 2**32)).reshape(batch, heads, q_len, k_len)


def philox4x32(
    key: tuple[torch.Tensor, torch.Tensor], counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds; every word is held in an int64 between 0 and 2^32 - 1."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low0, high0 = _multiply(c0, 0xD2511F53)
        low1, high1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return c0, c1, c2, c3


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    # The 64-bit product wraps in int64; its low and high halves are right all the same.
    product = a * b
    return product & _LOW, product >> 32 & _LOW


def draw_seed(device: torch.device | None = None) -> torch.Tensor:
    """A fresh seed, int64 (2,), from torch's generator of that device (the CPU's by default).

    On a GPU it stays there, so that a captured graph draws anew at each replay.
    """
    return torch.randint(0, 2**63 - 1, (2,), device=device)
