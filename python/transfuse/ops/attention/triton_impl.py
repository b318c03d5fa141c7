"""Attention in Triton: which kernels take a call."""

from __future__ import annotations

import torch

from transfuse.ops.attention import triton_backward, triton_decode, triton_forward
from transfuse.ops.attention.kernels import Kernels, Rows
from transfuse.ops.attention.torch_chunks import Gradients
from transfuse.ops.attention.triton_scores import Lengths
from transfuse.ops.attention.variant import Variant


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, seed: torch.Tensor | None, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor]:
    few = triton_decode.use_splits if rows.k_lengths is None else triton_decode.few_rows
    if rows.q_starts is None and few(q, k):
        return triton_decode.decode_forward(q, k, v, variant, seed, rows.k_lengths)
    return triton_forward.forward(q, k, v, variant, seed, Lengths(*rows[2:]), rows.max_q, rows.max_k)


def _backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    variant: Variant,
    seed: torch.Tensor | None,
    want: tuple[bool, bool, bool],
    rows: Rows,
) -> Gradients:
    lengths = Lengths(*rows[2:])
    return triton_backward.backward(
        dout, dlse, q, k, v, out, lse, variant, seed, want, lengths, rows.max_q, rows.max_k
    )  # fmt: skip


KERNELS = Kernels(_forward, _backward, triton_forward.weights)
