"""Causal softmax as formulas, in any precision: the specification.

    s[i, j] = scale * scores[i, j] + bias[i, j]      where query i may see key j
    s[i, j] = -inf                                   where it may not
    out[i, j] = exp(s[i, j] - max_j s[i, j]) / sum_j exp(s[i, j] - max_j s[i, j])

A row whose every s is -inf (nothing to see) is 0 and passes a zero gradient.
"""

from __future__ import annotations

import torch

NEG_INF = float("-inf")


def visible(q_len: int, k_len: int, causal: bool | str, device: torch.device | str = "cpu") -> torch.Tensor:
    """Which keys each query may see: bool (q_len, k_len).

    ``True`` aligns the diagonal with the top-left corner (query i sees keys 0..i), ``"lower_right"`` with the
    lower-right one (the last query sees the last key), ``False`` shows everything.
    """
    everything = torch.ones(q_len, k_len, dtype=torch.bool, device=device)
    if not causal:
        return everything
    return everything.tril(k_len - q_len if causal == "lower_right" else 0)


def causal_softmax(
    scores: torch.Tensor,  # (..., q_len, k_len)
    scale: float,
    causal: bool | str,
    mask: torch.Tensor | None,  # bool, True = attend, broadcast to scores
    bias: torch.Tensor | None,  # broadcast to scores
) -> torch.Tensor:
    """Returns the probabilities, (..., q_len, k_len) in scores' dtype."""
    logits = scores * scale
    if bias is not None:
        logits = logits + bias
    seen = visible(scores.shape[-2], scores.shape[-1], causal, scores.device)
    if mask is not None:
        seen = seen & mask
    logits = logits.masked_fill(~seen, NEG_INF)
    nothing = (logits == NEG_INF).all(-1, keepdim=True)
    return logits.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0).to(scores.dtype)
