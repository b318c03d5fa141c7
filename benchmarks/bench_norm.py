"""Layer norm forward on a GPU: the CUDA kernel beside PyTorch, each time behind a check against fp64.

    python benchmarks/bench_norm.py [--json FILE] [--quick]

The kernel reads x (and the residual) once and writes y (and the sum) once, so bytes decide: each row gives the bytes
moved, GB/s and the share of what a device-to-device copy of the same machine reaches. Times are medians with the 20th
and 80th percentile; the L2 cache is emptied before each run.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import transfuse
from transfuse.backends import backends, why_not
from transfuse.ops.norm import cuda_impl, reference

SHAPES = [(4096, 256), (4096, 768), (8192, 1024), (8192, 4096), (8192, 8192), (1024, 16384), (32, 4096)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def milliseconds(function: Callable[[], object]) -> list[float]:
    """Median, 20th and 80th percentile, with a cold L2 cache."""
    from triton.testing import do_bench

    return list(do_bench(function, warmup=20, rep=80, quantiles=[0.5, 0.2, 0.8]))


def copy_bandwidth() -> float:
    """GB/s of a 2 GiB device-to-device copy, bytes read and written both counted: the limit here."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source))[0] / 1e6


def host_microseconds(function: Callable[[], object], calls: int = 2000) -> float:
    """What one call costs the host, the GPU being faster than that: a tiny tensor, no waiting in between."""
    for _ in range(100):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def machine() -> dict[str, Any]:
    """The environment block of a record."""
    query = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    smi = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    facts = backends()[0].facts
    return {
        "gpu": torch.cuda.get_device_name(),
        "nvidia_smi": {query: _output(smi)},
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "transfuse": transfuse.__version__,
        "extension": {name: str(value) for name, value in facts.items() if name != "file"},
        "python": platform.python_version(),
        "commit": _output(["git", "rev-parse", "--short", "HEAD"]),
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def measure(rows: int, hidden: int, dtype: torch.dtype, with_residual: bool, limit: float) -> dict[str, Any]:
    """One record: the error first, then both times. x: (rows, hidden)."""
    x = torch.randn(rows, hidden, device="cuda", dtype=dtype)
    weight, bias = (torch.randn(hidden, device="cuda", dtype=dtype) for _ in range(2))
    residual = torch.randn_like(x) if with_residual else None

    def ours() -> torch.Tensor:
        return cuda_impl.layer_norm_forward(x, weight, bias, 1e-5, residual)[0]

    def plain() -> torch.Tensor:
        return F.layer_norm(x if residual is None else x + residual, (hidden,), weight, bias)

    given = x if residual is None else x + residual
    truth = reference.layer_norm(given.double(), weight.double(), bias.double(), 1e-5, None)[0]
    error, plain_error = ((f().double() - truth).abs().max().item() for f in (ours, plain))
    moved = x.numel() * x.element_size() * (4 if with_residual else 2)
    time_ours, time_plain = milliseconds(ours), milliseconds(plain)
    rate = moved / time_ours[0] / 1e6
    return {
        "op": "layer_norm_forward",
        "rows": rows,
        "hidden": hidden,
        "dtype": str(dtype).removeprefix("torch."),
        "residual": with_residual,
        "ms_p50_p20_p80": time_ours,
        "torch_ms_p50_p20_p80": time_plain,
        "speedup": time_plain[0] / time_ours[0],
        "bytes": moved,
        "gb_per_s": rate,
        "share_of_copy": rate / limit,
        "max_error": error,
        "torch_max_error": plain_error,
        "correct": error <= 2 * plain_error + torch.finfo(dtype).eps * truth.abs().max().item(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--quick", action="store_true", help="bf16 alone")
    options = parser.parse_args()
    reason = "no CUDA GPU" if not torch.cuda.is_available() else why_not("cuda", torch.device("cuda"))
    if reason is not None:
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    limit = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: a device-to-device copy moves {limit:.0f} GB/s")
    cases = [(s, d, r) for d in DTYPES[: 1 if options.quick else None] for s in SHAPES for r in (False, True)]
    records = []
    for (rows, hidden), dtype, with_residual in cases:
        record = measure(rows, hidden, dtype, with_residual, limit)
        records.append(record)
        print(
            f"{record['dtype']:8} {rows:5} x {hidden:5} {'+ residual' if with_residual else '          '}"
            f" {record['ms_p50_p20_p80'][0] * 1e3:8.1f} us, torch {record['torch_ms_p50_p20_p80'][0] * 1e3:8.1f} us,"
            f" {record['gb_per_s']:5.0f} GB/s ({record['share_of_copy']:4.0%} of copy),"
            f" error {record['max_error']:.1e} {'' if record['correct'] else 'WRONG'}",
            flush=True,
        )
    x, w = torch.randn(8, 768, device="cuda"), torch.randn(768, device="cuda")
    host = {
        "implementation": host_microseconds(lambda: cuda_impl.layer_norm_forward(x, w, w, 1e-5, None)),
        "public op": host_microseconds(lambda: transfuse.layer_norm(x, w, w, backend="cuda")),
        "torch": host_microseconds(lambda: F.layer_norm(x, (768,), w, w)),
    }
    print("host time a call: " + ", ".join(f"{name} {value:.1f} us" for name, value in host.items()))
    if options.json:
        result = {"machine": machine(), "copy_gb_per_s": limit, "host_us": host, "records": records}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(record["correct"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
