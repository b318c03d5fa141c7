"""Every op on a GPU: the CUDA and Triton kernels beside what torch users have, each time behind a check against fp64.

    python benchmarks/bench_gpu.py [--op attention decode varlen rotary norm softmax ffn] [--json FILE] [--seconds N]
    python benchmarks/bench_gpu.py --op ffn --tune       # first the tiles and plans of each launch, by autotune
    python benchmarks/bench_gpu.py --rehearse            # tiny sizes, a CPU will do: does every case run?

Times are medians with the 20th and 80th percentile over runs with a cold L2 cache (triton.testing.do_bench). The
limits that shares refer to are measured first: a large copy, a large bf16 product. A variant whose error exceeds twice
that of the formulas in the same precision, plus rounding, is marked WRONG and gets no time. What was skipped says why.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa

import gpu_cases
import transfuse
from gpu_cases import Case
from transfuse.backends import backends, why_not
from transfuse.errors import BackendError

OPS = ("attention", "decode", "varlen", "rotary", "norm", "softmax", "ffn")


def cases(ops: list[str], device: torch.device, dtype: torch.dtype, tiny: bool) -> Iterator[Case]:
    """In the order of OPS; each is made when its turn comes, so that memory holds one."""
    lengths = [16, 32] if tiny else [512, 1024, 2048, 4096, 8192, 16384]
    made: dict[str, Callable[[], Iterator[Case]]] = {
        "attention": lambda: gpu_cases.attention(device, dtype, 32 if tiny else 16384, 128 if tiny else 2048, lengths),
        "decode": lambda: gpu_cases.decode(device, dtype, [40] if tiny else [512, 2048, 8192, 32768]),
        "varlen": lambda: gpu_cases.varlen(device, dtype, 64 if tiny else 16384),
        "rotary": lambda: gpu_cases.rotary(device, dtype, [1, 3] if tiny else [1, 4096]),
        "norm": lambda: gpu_cases.norms(
            device, dtype, 512 if tiny else 2**25, [64, 96] if tiny else [256, 768, 1024, 4096, 8192, 16384]
        ),
        "softmax": lambda: gpu_cases.softmaxes(device, dtype, 2048 if tiny else 2**26, [24] if tiny else [512, 2048]),
        "ffn": lambda: gpu_cases.feed_forward(
            device,
            dtype,
            [(5, 16, 32)] if tiny else [(16, 768, 3072), (2048, 768, 3072), (8192, 1024, 4096), (8192, 4096, 11008)],
        ),
    }
    for name in ops:
        yield from made[name]()


def milliseconds(function: Callable[[], object], tiny: bool) -> list[float]:
    """Median, 20th and 80th percentile."""
    if tiny:
        start = time.perf_counter()
        function()
        return [1e3 * (time.perf_counter() - start)] * 3
    from triton.testing import do_bench

    return list(do_bench(function, warmup=15, rep=60, quantiles=[0.5, 0.2, 0.8]))


def error_of(case: Case, out: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    return (case.part(out).double() - truth).abs().nan_to_num(torch.inf).max().item()


def measure(case: Case, tiny: bool, limits: dict[str, float], tune: bool = False) -> list[dict[str, Any]]:
    """One record a variant; with ``tune``, ours by the fastest of the tiles and plans that its launches can take."""
    inputs = list(case.inputs.values())
    truth = case.reference(*(t.double() for t in inputs))
    unit = torch.finfo(inputs[0].dtype).eps * truth.abs().max().item()
    budget = 2 * (case.reference(*inputs).double() - truth).abs().max().item() + unit
    records: list[dict[str, Any]] = [{"variant": n, "skipped": why} for n, why in case.skipped.items()]
    for name, function in case.variants.items():
        record: dict[str, Any] = {"variant": name, "error_budget": budget}
        try:
            if tune and name in ("cuda", "triton"):
                record["tuned"] = tuned(case, function)
            record["max_error"] = error_of(case, function(*inputs), truth)
            record["wrong"] = record["max_error"] > budget
            if not record["wrong"] or name not in ("cuda", "triton"):
                record.update(times(case, function, tiny, limits))  # pair by pair
        except BackendError as error:
            record["skipped"] = str(error)
        except Exception as error:  # a peer that refuses a case, or a kernel that fails: in the record, and on with it
            record["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        records.append(record)
    return [{"op": case.op, "case": case.name, **record} for record in records]


def tuned(case: Case, function: gpu_cases.Function) -> list[dict[str, Any]]:
    """What transfuse.autotune found for each launch, from then on in use."""
    leaves = [t.detach().requires_grad_(n in case.grads) for n, t in case.inputs.items()]
    found = transfuse.autotune(function, *leaves, backward=bool(case.grads))
    return [
        {
            "launch": m.op,
            "key": repr(m.key),
            "us": m.microseconds,
            "tiles": m.tiles,
            "default_us": m.default_microseconds,
        }
        for m in found
    ]


def times(
    case: Case, function: gpu_cases.Function, tiny: bool, limits: dict[str, float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Forward alone, then backward alone where the case has gradients: what refuses the second keeps the first."""
    inputs = list(case.inputs.values())
    yield "forward", timing(case, milliseconds(lambda: function(*inputs), tiny), 1.0, 1.0, limits)
    if case.grads:
        leaves = [t.detach().requires_grad_(n in case.grads) for n, t in case.inputs.items()]
        out = function(*leaves)
        dout = torch.randn_like(out)
        wanted = [t for t in leaves if t.requires_grad]
        ms = milliseconds(lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True), tiny)
        yield "backward", timing(case, ms, 2.5 if "attention" in case.op else 2.0, 1.5, limits)


def timing(case: Case, ms: list[float], flops: float, size: float, limits: dict[str, float]) -> dict[str, Any]:
    """Backward reads what forward read, and the gradient; products count 2 or 2.5 times."""
    found: dict[str, Any] = {"ms_p50_p20_p80": ms}
    if case.flops:
        found["tflops"] = case.flops * flops / ms[0] / 1e9
        found["share"] = found["tflops"] / limits["bf16_tflops"]
    if case.bytes:
        found["gb_per_s"] = case.bytes * size / ms[0] / 1e6
        found["share"] = found["gb_per_s"] / limits["copy_gb_per_s"]
    return found


def measured_limits(tiny: bool) -> dict[str, float]:
    """A copy of 1 GiB, both ways counted, and a bf16 product of 8192^3."""
    if tiny:
        return {"copy_gb_per_s": 1.0, "bf16_tflops": 1.0}
    source = torch.randint(0, 255, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {
        "copy_gb_per_s": 2 * source.numel() / milliseconds(lambda: target.copy_(source), False)[0] / 1e6,
        "bf16_tflops": 2 * 8192**3 / milliseconds(lambda: a @ b, False)[0] / 1e9,
    }


def host_microseconds(device: torch.device, calls: int) -> dict[str, float]:
    """What one call on tiny tensors costs the host, which never waits for the GPU in between."""
    x, w, q = (
        torch.randn(8, 64, device=device),
        torch.randn(64, device=device),
        torch.randn(1, 2, 16, 16, device=device),
    )
    functions = {"F.layer_norm": lambda: F.layer_norm(x, (64,), w, w), "F.sdpa": lambda: sdpa(q, q, q)}
    for b in (b for b in ("cuda", "triton") if why_not(b, device) is None):
        functions[f"layer_norm {b}"] = lambda b=b: transfuse.layer_norm(x, w, w, backend=b)
        functions[f"attention {b}"] = lambda b=b: transfuse.attention(q, q, q, backend=b)
    found = {}
    for name, function in functions.items():
        try:
            for _ in range(1 + calls // 20):
                function()
        except BackendError:
            continue
        start = time.perf_counter()
        for _ in range(calls):
            function()
        found[name] = (time.perf_counter() - start) / calls * 1e6
        if device.type == "cuda":
            torch.cuda.synchronize()
    return found


def machine() -> dict[str, Any]:
    """The environment block of a record."""
    query = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    triton = next(b for b in backends() if b.name == "triton")
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "nvidia_smi": {query: _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])},
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "transfuse": transfuse.__version__,
        "triton": {"usable": triton.usable, "reason": triton.reason, **triton.facts},
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


def line(record: dict[str, Any]) -> str:
    """One line of the table, and one for each tuned launch."""
    start = f"{record['op']:16} {record['case']:34} {record['variant']:14}"
    if "max_error" not in record:
        return f"{start} {'skipped: ' + record['skipped'] if 'skipped' in record else 'FAILED: ' + record['failed']}"
    parts = []
    for direction in ("forward", "backward"):
        found = record.get(direction)
        if found is not None:
            rate = f"{found['tflops']:6.0f} TF" if "tflops" in found else f"{found['gb_per_s']:6.0f} GB/s"
            parts.append(f"{direction} {found['ms_p50_p20_p80'][0] * 1e3:9.1f} us {rate} {found['share']:4.0%}")
    wrong = " WRONG" if record.get("wrong") else ""
    failed = f"  then FAILED: {record['failed']}" if "failed" in record else ""
    lines = [f"{start} {'  '.join(parts)}  error {record['max_error']:.1e}{wrong}{failed}"]
    lines += [
        f"  {m['launch']} {m['key']}: {m['tiles']} {m['us']:.1f} us, by the rule {m['default_us']:.1f} us"
        for m in record.get("tuned", ())
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the record here, also when time runs out")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after this long")
    parser.add_argument("--tune", action="store_true", help="measure every launch's tiles and plans first")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on whatever device there is")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.rehearse:
        print("nothing to measure: no CUDA GPU (--rehearse runs every case at tiny sizes on a CPU)", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    limits = measured_limits(options.rehearse)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU, a rehearsal'}: {limits}")
    started, records, stopped = time.perf_counter(), [], False
    for case in cases(options.op, device, getattr(torch, options.dtype), options.rehearse):
        stopped = time.perf_counter() - started > options.seconds
        if stopped:
            print(f"stopped after {options.seconds} s, before {case.op} {case.name}")
            break
        found = measure(case, options.rehearse, limits, options.tune)
        records += found
        print(*map(line, found), sep="\n", flush=True)
        torch._dynamo.reset()  # one compiled peer a case: no recompilation limit, no guards to walk
    host = host_microseconds(device, 5 if options.rehearse else 2000)
    print("host time a call: " + ", ".join(f"{name} {us:.1f} us" for name, us in host.items()))
    if options.json:
        result = {"machine": machine(), "limits": limits, "host_us": host, "stopped_early": stopped, "records": records}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    bad = [r for r in records if r["variant"] in ("cuda", "triton") and (r.get("wrong") or "failed" in r)]
    print(f"{len(records)} records, {len(bad)} of ours wrong or failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
