"""What generation gives back besides tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Generated:
    """Texts with their scores, as ``generate(..., output_scores=True)`` gives them.

    Attributes:
        sequences: (rows, length + new) int64: what generate gives without scores.
        scores: (rows, new) fp32: the log-probability of each new token after all processing, 0 for padding. Of beams:
            what the token added to its beam's score.
        sequences_scores: (rows,) fp32: the sum of a row's scores / its new tokens ** length_penalty.
    """

    sequences: torch.Tensor
    scores: torch.Tensor
    sequences_scores: torch.Tensor
