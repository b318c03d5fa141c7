"""Every op beside what a torch user would write, in one process, interleaved: is our plain-PyTorch path never slower?

    python benchmarks/bench_ops.py [--json FILE] [--rounds N] [--threads N]

Each case first checks that both give the same result. Times are medians over rounds in which both run alternately;
the ratio is the median of the rounds' own ratios, with its 20th and 80th percentile, and is what counts: absolute times
on a shared machine drift. "tiny" cases show what validation and dispatch cost.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import transfuse as tf


@dataclass
class Case:
    """One op at one shape: ours and the plain torch code beside it, each a call without arguments."""

    name: str
    ours: Callable[[], torch.Tensor]
    plain: Callable[[], torch.Tensor]


@dataclass
class Row:
    """One measured case; times in microseconds, ratio = ours / plain."""

    name: str
    ours_us: float
    plain_us: float
    ratio: float
    ratio_p20: float
    ratio_p80: float
    max_difference: float


def tensors(*shape: int, grad: bool = False) -> torch.Tensor:
    """Random data; zeros would flatter."""
    return torch.randn(*shape, requires_grad=grad)


def trained(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Forward and backward of a function of tensors that want a gradient; returns the first gradient."""

    def run() -> torch.Tensor:
        out = function(*inputs)
        return torch.autograd.grad(out, [t for t in inputs if t.requires_grad], torch.ones_like(out))[0]

    return run


def attention_cases() -> list[Case]:
    """BERT-like, GPT-2-like, grouped, masked, decode and packed attention."""
    sdpa = F.scaled_dot_product_attention
    cases = []
    for label, shape in {
        "tiny 1x2x4x8": (1, 2, 4, 8),
        "8x12x128x64": (8, 12, 128, 64),
        "2x12x512x64": (2, 12, 512, 64),
    }.items():
        q, k, v = tensors(*shape), tensors(*shape), tensors(*shape)
        mask = torch.rand(shape[0], 1, 1, shape[2]) > 0.3
        mask[..., 0] = True
        cases += [
            Case(
                f"attention {label}", lambda q=q, k=k, v=v: tf.attention(q, k, v), lambda q=q, k=k, v=v: sdpa(q, k, v)
            ),
            Case(
                f"attention causal {label}",
                lambda q=q, k=k, v=v: tf.attention(q, k, v, causal=True),
                lambda q=q, k=k, v=v: sdpa(q, k, v, is_causal=True),
            ),
            Case(
                f"attention padding mask {label}",
                lambda q=q, k=k, v=v, m=mask: tf.attention(q, k, v, mask=m),
                lambda q=q, k=k, v=v, m=mask: sdpa(q, k, v, attn_mask=m),
            ),
        ]
    q, k, v = (tensors(4, 12, 256, 64, grad=True) for _ in range(3))
    cases.append(
        Case(
            "attention causal forward+backward 4x12x256x64",
            trained(lambda q, k, v: tf.attention(q, k, v, causal=True), q, k, v),
            trained(lambda q, k, v: sdpa(q, k, v, is_causal=True), q, k, v),
        )
    )
    q, k, v = tensors(4, 9, 1, 64), tensors(4, 3, 1024, 64), tensors(4, 3, 1024, 64)
    lengths = torch.tensor([1000, 600, 800, 1024])
    valid = (torch.arange(1024) < lengths[:, None])[:, None, None, :]
    cases.append(
        Case(
            "attention_decode grouped 4x9/3x1024x64",
            lambda: tf.attention_decode(q, k, v, lengths),
            lambda: sdpa(q, k, v, attn_mask=valid, enable_gqa=True),
        )
    )
    return [*cases, _packed_case()]


def _packed_case() -> Case:
    lengths = [128, 17, 60, 33, 90, 41, 55, 20]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    q, k, v = (tensors(sum(lengths), 12, 64) for _ in range(3))
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    columns = torch.cat([torch.arange(n) for n in lengths])
    valid = (torch.arange(128) < torch.tensor(lengths)[:, None])[:, None, None, :]

    def padded() -> torch.Tensor:
        full = [q.new_zeros(8, 128, 12, 64).index_put((rows, columns), t).transpose(1, 2) for t in (q, k, v)]
        return F.scaled_dot_product_attention(*full, attn_mask=valid).transpose(1, 2)[rows, columns]

    return Case(
        "attention_varlen 8 sequences, 444 of 1024 tokens",
        lambda: tf.attention_varlen(q, k, v, bounds, bounds, 128, 128),
        padded,
    )


def norm_cases() -> list[Case]:
    """Both norms, tiny and at model widths, with the residual that a block has."""
    cases = []
    for rows, hidden in ((2, 8), (1024, 768), (2048, 576)):
        x, r, w, b = tensors(rows, hidden), tensors(rows, hidden), tensors(hidden), tensors(hidden)
        label = f"{rows}x{hidden}"
        cases += [
            Case(
                f"layer_norm {label}",
                lambda x=x, w=w, b=b: tf.layer_norm(x, w, b),
                lambda x=x, w=w, b=b: F.layer_norm(x, w.shape, w, b),
            ),
            Case(
                f"layer_norm with residual {label}",
                lambda x=x, r=r, w=w, b=b: tf.layer_norm(x, w, b, residual=r)[0],
                lambda x=x, r=r, w=w, b=b: F.layer_norm(x + r, w.shape, w, b),
            ),
            Case(
                f"rms_norm {label}",
                lambda x=x, w=w: tf.rms_norm(x, w, 1e-6),
                lambda x=x, w=w: F.rms_norm(x, w.shape, w, 1e-6),
            ),
        ]
    x, w, b = tensors(1024, 768, grad=True), tensors(768, grad=True), tensors(768, grad=True)
    cases.append(
        Case(
            "layer_norm forward+backward 1024x768",
            trained(tf.layer_norm, x, w, b),
            trained(lambda x, w, b: F.layer_norm(x, w.shape, w, b), x, w, b),
        )
    )
    return cases


def ffn_cases() -> list[Case]:
    """BERT's and Llama's feed-forward networks, one row and many, and the single layer."""
    cases = []
    for rows, d, f in ((2, 8, 16), (1, 768, 3072), (512, 768, 3072)):
        x, w1, b1, w2, b2, gate = tensors(rows, d), tensors(f, d), tensors(f), tensors(d, f), tensors(d), tensors(f, d)
        label = f"{rows}x{d}x{f}"
        cases += [
            Case(
                f"ffn gelu {label}",
                lambda x=x, w1=w1, b1=b1, w2=w2, b2=b2: tf.ffn(x, w1, b1, w2, b2),
                lambda x=x, w1=w1, b1=b1, w2=w2, b2=b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
            ),
            Case(
                f"ffn swiglu {label}",
                lambda x=x, w1=w1, w2=w2, g=gate: tf.ffn(x, w1, None, w2, None, activation="silu", w_gate=g),
                lambda x=x, w1=w1, w2=w2, g=gate: F.linear(F.silu(F.linear(x, g)) * F.linear(x, w1), w2),
            ),
            Case(
                f"linear_act relu {label}",
                lambda x=x, w1=w1, b1=b1: tf.linear_act(x, w1, b1, "relu"),
                lambda x=x, w1=w1, b1=b1: F.relu(F.linear(x, w1, b1)),
            ),
        ]
    x, w1, w2 = tensors(256, 512, grad=True), tensors(2048, 512, grad=True), tensors(512, 2048, grad=True)
    cases.append(
        Case(
            "ffn gelu forward+backward 256x512x2048",
            trained(lambda x, w1, w2: tf.ffn(x, w1, None, w2, None), x, w1, w2),
            trained(lambda x, w1, w2: F.linear(F.gelu(F.linear(x, w1)), w2), x, w1, w2),
        )
    )
    return cases


def softmax_cases() -> list[Case]:
    """Scale, causal mask and softmax in one call."""
    cases = []
    for shape in ((1, 2, 4, 4), (8, 12, 128, 128), (2, 12, 512, 512)):
        scores = tensors(*shape)
        hidden = torch.ones(shape[-2:], dtype=torch.bool).triu(1)
        cases.append(
            Case(
                f"causal_softmax {'x'.join(map(str, shape))}",
                lambda s=scores: tf.causal_softmax(s, scale=0.125),
                lambda s=scores, h=hidden: (s * 0.125).masked_fill(h, float("-inf")).softmax(-1),
            )
        )
    return cases


def measure(case: Case, rounds: int) -> Row:
    """Warm up, check, then time both in turn; each round is long enough (5 ms or more) for the clock."""
    difference = (case.ours().detach() - case.plain().detach()).abs().max().item()
    scale = case.plain().detach().abs().max().item()
    if not difference <= 1e-4 * max(scale, 1.0):
        raise SystemExit(f"{case.name}: results differ by {difference:.2e} at size {scale:.2e}; no time is given")
    start = time.perf_counter()
    case.ours(), case.plain()
    repeats = max(1, int(0.005 / max(time.perf_counter() - start, 1e-6) * 2))
    ours, plain = [], []
    for i in range(rounds):
        pair = [(case.ours, ours), (case.plain, plain)]
        for function, times in pair if i % 2 else reversed(pair):
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            times.append((time.perf_counter() - start) / repeats * 1e6)
    a, b = torch.tensor(ours), torch.tensor(plain)
    p20, p50, p80 = (a / b).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return Row(case.name, a.median().item(), b.median().item(), p50, p20, p80, difference)


def environment() -> dict[str, object]:
    """What a reader needs to judge the numbers."""
    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "cpu": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transfuse": tf.__version__,
    }


def main() -> None:
    """Measure every case, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    print(f"{'case':52} {'ours us':>10} {'torch us':>10} {'ratio':>6}  p20-p80")
    for case in attention_cases() + norm_cases() + ffn_cases() + softmax_cases():
        row = measure(case, args.rounds)
        rows.append(row)
        spread = f"{row.ratio_p20:.2f}-{row.ratio_p80:.2f}"
        print(f"{row.name:52} {row.ours_us:10.1f} {row.plain_us:10.1f} {row.ratio:6.2f}  {spread}")
    if args.json:
        record = {"environment": environment(), "rows": [asdict(r) for r in rows]}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
