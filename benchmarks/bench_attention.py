"""What F.scaled_dot_product_attention cannot say, beside the torch code one would write for it.

    python benchmarks/bench_attention.py [--json FILE] [--rounds N] [--threads N]

Windows, ALiBi, soft capping, sinks and gradients of biases; bench_ops.py has the plain cases, packed batches and
decoding. Measured and checked as there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

import transfuse as tf
from bench_ops import Case, environment, measure, tensors, trained


def explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape_scores: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """softmax(f(scale q k^T)) v, as people write it."""
    return torch.softmax(shape_scores(q @ k.mT * q.shape[-1] ** -0.5), -1) @ v


def cases() -> list[Case]:
    """Each feature at a BERT- or GPT-2-like size; masks and biases that depend on positions are built in the call."""
    q, k, v = (tensors(1, 12, 1024, 64) for _ in range(3))
    slopes = 2.0 ** -torch.arange(1, 13) / 2
    i = torch.arange(1024)
    hidden = i[None] > i[:, None]

    def near() -> torch.Tensor:
        return ~hidden & (i[None] >= i[:, None] - 128)

    def slanted() -> torch.Tensor:
        return (-slopes[:, None, None] * (i[:, None] - i[None]).abs()).masked_fill(hidden, -torch.inf)

    def capped(s: torch.Tensor) -> torch.Tensor:
        return (30 * torch.tanh(s / 30)).masked_fill(hidden, -torch.inf)

    sdpa = F.scaled_dot_product_attention
    return [
        Case(
            "causal window of 128, 1x12x1024x64",
            lambda: tf.attention(q, k, v, causal=True, window=(128, 0)),
            lambda: sdpa(q, k, v, attn_mask=near()),
        ),
        Case(
            "causal ALiBi, 1x12x1024x64",
            lambda: tf.attention(q, k, v, causal=True, alibi_slopes=slopes),
            lambda: sdpa(q, k, v, attn_mask=slanted()),
        ),
        Case(
            "causal soft capping, 1x12x1024x64",
            lambda: tf.attention(q, k, v, causal=True, softcap=30.0),
            lambda: explicit(q, k, v, capped),
        ),
        *training(),
    ]


def training() -> list[Case]:
    """Forward and backward."""
    found = []
    for label, shape in {"8x12x128x64": (8, 12, 128, 64), "1x12x1024x64": (1, 12, 1024, 64)}.items():
        q, k, v = (tensors(*shape, grad=True) for _ in range(3))
        bias = tensors(1, 12, shape[2], shape[2], grad=True)
        sinks = tensors(12, grad=True)
        found += [
            Case(
                f"bias with a gradient, forward+backward {label}",
                trained(lambda q, k, v, b: tf.attention(q, k, v, bias=b), q, k, v, bias),
                trained(lambda q, k, v, b: explicit(q, k, v, lambda s: s + b), q, k, v, bias),
            ),
            Case(
                f"sinks with a gradient, forward+backward {label}",
                trained(lambda q, k, v, s: tf.attention(q, k, v, sinks=s), q, k, v, sinks),
                trained(_with_sinks, q, k, v, sinks),
            ),
        ]
    return found


def _with_sinks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    s = q @ k.mT * q.shape[-1] ** -0.5
    s = torch.cat([s, sinks[:, None, None].expand(*s.shape[:3], 1)], -1)
    return torch.softmax(s, -1)[..., :-1] @ v


def main() -> None:
    """Measure every case, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    print(f"{'case':52} {'ours us':>10} {'torch us':>10} {'ratio':>6}  p20-p80")
    for case in cases():
        row = measure(case, args.rounds)
        rows.append(row)
        print(
            f"{row.name:52} {row.ours_us:10.1f} {row.plain_us:10.1f} {row.ratio:6.2f}"
            f"  {row.ratio_p20:.2f}-{row.ratio_p80:.2f}"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"environment": environment(), "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
