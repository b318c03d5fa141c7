"""Calls that between them launch every Triton kernel, and what the machine code of each kernel looks like.

As a program (in a process of its own, since kernels are compiled in it and not interpreted) it reads JSON lines
[case, dtype, [major, minor]] and answers each with a line: what :func:`examined` tells about each kernel, or
{"error": ...}. The line "list" is answered with the kernels there are and those that each case launches.
`python tests/triton_kernels.py table > docs/kernels.md` writes the page that shows what each kernel takes.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

import transfuse
from transfuse.ops.rotary import cache_append, rotary_append, rotary_embedding

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], bool]  # function, args, kwargs, with backward


def empty(*shape: int, dtype: torch.dtype, grad: bool = True) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def norm(dtype: torch.dtype, width: int, *, rms: bool = False, residual: bool = False, rows: int = 4096) -> Call:
    x, weight, bias = (empty(*shape, dtype=dtype) for shape in ((rows, width), (width,), (width,)))
    given = {"residual": empty(rows, width, dtype=dtype)} if residual else {}
    if rms:
        return transfuse.rms_norm, (x, weight), given, True
    return transfuse.layer_norm, (x, weight, bias), given, True


def softmax(dtype: torch.dtype, k_len: int, *, mask: bool = False, bias: bool = False) -> Call:
    given: dict[str, Any] = {"mask": empty(2, 1, 1, k_len, dtype=torch.bool, grad=False)} if mask else {}
    if bias:
        given["bias"] = empty(1, 4, 256, k_len, dtype=dtype)
    return transfuse.causal_softmax, (empty(2, 4, 256, k_len, dtype=dtype),), given, True


def ffn(dtype: torch.dtype, rows: int = 4096, *, gated: bool = False, activation: str = "gelu", **given: Any) -> Call:
    d, d_ff = 1024, 4096
    x, w1, b1, w2, b2 = (empty(*s, dtype=dtype) for s in ((rows, d), (d_ff, d), (d_ff,), (d, d_ff), (d,)))
    if gated:
        given["w_gate"] = empty(d_ff, d, dtype=dtype)
    return transfuse.ffn, (x, w1, b1, w2, b2), {"activation": activation, **given}, True


def linear(dtype: torch.dtype, rows: int = 4096) -> Call:
    x, w, b = (empty(*shape, dtype=dtype) for shape in ((rows, 1024), (1024, 1024), (1024,)))
    return transfuse.linear_act, (x, w, b, "gelu_tanh"), {}, True


def qkv(dtype: torch.dtype, length: int, head_dim: int, kv_heads: int = 16) -> tuple[torch.Tensor, ...]:
    heads = (16, kv_heads, kv_heads)
    return tuple(empty(2, h, length, head_dim, dtype=dtype) for h in heads)


def attention(dtype: torch.dtype, head_dim: int = 64, kv_heads: int = 16, **given: Any) -> Call:
    return transfuse.attention, qkv(dtype, 1024, head_dim, kv_heads), given, True


def with_scores(dtype: torch.dtype, head_dim: int = 64) -> Call:
    """Everything that changes a score, each with its gradient."""
    given = {
        "mask": empty(2, 1, 1, 1024, dtype=torch.bool, grad=False),
        "bias": empty(1, 16, 1024, 1024, dtype=dtype),
        "alibi_slopes": empty(16, dtype=torch.float32),
        "sinks": empty(16, dtype=torch.float32),
        "softcap": 30.0,
        "window": (256, 0),
    }
    return attention(dtype, head_dim, **given)


def weights(dtype: torch.dtype, head_dim: int = 64) -> Call:
    q, k, _ = qkv(dtype, 1024, head_dim)
    lse = empty(2, 16, 1024, dtype=torch.float32)
    return transfuse.attention_weights, (q, k, lse), {"causal": True}, False


def varlen(dtype: torch.dtype, head_dim: int = 64) -> Call:
    packed = tuple(empty(4096, 16, head_dim, dtype=dtype) for _ in range(3))
    bounds = empty(9, dtype=torch.int32, grad=False)
    return transfuse.attention_varlen, (*packed, bounds, bounds, 1024, 1024), {"causal": True}, True


def decode(dtype: torch.dtype, head_dim: int = 128, q_len: int = 1, max_len: int = 8192) -> Call:
    q = empty(2, 32, q_len, head_dim, dtype=dtype, grad=False)
    k, v = (empty(2, 8, max_len, head_dim, dtype=dtype, grad=False) for _ in range(2))
    lengths = empty(2, dtype=torch.int32, grad=False)
    return transfuse.attention_decode, (q, k, v, lengths), {"causal": True}, False


def rotary(dtype: torch.dtype, head_dim: int = 128) -> Call:
    q, k = empty(2, 1024, 16, head_dim, dtype=dtype), empty(2, 1024, 4, head_dim, dtype=dtype)
    cos, sin = (empty(1, 1024, 1, head_dim, dtype=torch.float32, grad=False) for _ in range(2))
    return rotary_embedding, (q, k, cos, sin), {}, True


def append(dtype: torch.dtype) -> Call:
    new = [empty(2, 8, 1, 128, dtype=dtype, grad=False) for _ in range(2)]
    caches = [empty(2, 8, 8192, 128, dtype=dtype, grad=False) for _ in range(2)]
    return cache_append, (*new, *caches, empty(2, dtype=torch.int32, grad=False)), {}, False


def rotary_both(dtype: torch.dtype) -> Call:
    q, k = empty(2, 1, 32, 128, dtype=dtype, grad=False), empty(2, 1, 8, 128, dtype=dtype, grad=False)
    cos, sin = (empty(1, 1, 1, 128, dtype=dtype, grad=False) for _ in range(2))
    caches = [empty(2, 8, 8192, 128, dtype=dtype, grad=False) for _ in range(2)]
    return rotary_append, (q, k, k, cos, sin, *caches, 7), {}, False


CASES: dict[str, Callable[[torch.dtype], Call]] = {
    "norm": functools.partial(norm, width=1024, residual=True),
    "norm_rms_unaligned": functools.partial(norm, width=1001, rms=True),
    "norm_wide": functools.partial(norm, width=65536, rows=64),
    "softmax": functools.partial(softmax, k_len=1024),
    "softmax_bias": functools.partial(softmax, k_len=1000, mask=True, bias=True),
    "softmax_wide": functools.partial(softmax, k_len=65536),
    "softmax_wide_bias": functools.partial(softmax, k_len=65536, mask=True, bias=True),
    "ffn": ffn,
    "ffn_gated": functools.partial(ffn, gated=True, activation="silu"),
    "ffn_dropout": functools.partial(ffn, activation="relu", dropout_p=0.1),
    "ffn_few_rows": functools.partial(ffn, rows=8),
    "ffn_gated_few_rows": functools.partial(ffn, rows=8, gated=True, activation="gelu_tanh"),
    "linear": linear,
    "attention": functools.partial(attention, causal=True),
    "attention_80": functools.partial(attention, head_dim=80),
    "attention_128": functools.partial(attention, head_dim=128, kv_heads=4, causal=True),
    "attention_256": functools.partial(attention, head_dim=256),
    "attention_dropout": functools.partial(attention, dropout_p=0.1),
    "attention_scores": with_scores,
    "attention_scores_128": functools.partial(with_scores, head_dim=128),
    "attention_weights": weights,
    "varlen": varlen,
    "varlen_128": functools.partial(varlen, head_dim=128),
    "rotary": rotary,
    "cache_append": append,
    "rotary_append": rotary_both,
    "decode": decode,
    "decode_64": functools.partial(decode, head_dim=64),
    "decode_few": functools.partial(decode, q_len=4),
}


def kernels_there_are() -> set[str]:
    """The ``triton.jit`` functions of the ops that no other of them calls: what is launched, and what nobody uses."""
    from triton.runtime.jit import JITFunction

    found: dict[str, Any] = {}
    for info in pkgutil.walk_packages(transfuse.ops.__path__, "transfuse.ops."):
        if "triton" in info.name.rsplit(".", 1)[1]:
            members = vars(importlib.import_module(info.name)).values()
            found |= {f"{f.module}.{f.fn.__name__}": f for f in members if isinstance(f, JITFunction)}
    called = {name for f in found.values() for name in f.fn.__code__.co_names}
    return {name for name in found if name.rsplit(".")[-1] not in called}


def launched(name: str) -> set[str]:
    """Which kernels a case launches in half precision; nothing is compiled."""
    from triton.runtime.jit import JITFunction

    from transfuse.ops import _triton

    found: set[str] = set()
    run = JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: found.add(f"{self.module}.{self.fn.__name__}")
    function, args, kwargs, backward = CASES[name](torch.float16)
    try:
        with _triton.compiling():
            outputs = function(*args, backend="triton", **kwargs)
            if backward:
                outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
                torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
    finally:
        JITFunction.run = run
    return found


def compile_case(name: str, dtype: torch.dtype, capability: tuple[int, int]) -> list[dict[str, Any]]:
    """What :func:`examined` says of each kernel of a case."""
    from transfuse import ahead

    dots: dict[bytes, bool] = {}
    facts = ahead._facts

    def noting(kernel: Any) -> Any:
        dots[kernel.asm["cubin"]] = "tt.dot" in kernel.asm["ttir"]
        return facts(kernel)

    function, args, kwargs, backward = CASES[name](dtype)
    ahead._facts = noting
    try:
        kernels = transfuse.warmup(function, *args, backward=backward, target=capability, backend="triton", **kwargs)
    finally:
        ahead._facts = facts
    about = {"case": name, "dtype": str(dtype).removeprefix("torch."), "capability": list(capability)}
    return [about | examined(kernel) | {"dot": dots[kernel.cubin]} for kernel in kernels]


def examined(kernel: Any) -> dict[str, Any]:
    """Resources and the instructions that matter: tensor cores, 16-byte loads, local memory."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.cubin)
        file.flush()
        tool = triton.knobs.nvidia.nvdisasm.path
        code = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return {
        "kernel": f"{kernel.module}.{kernel.name}",
        "registers": kernel.registers,
        "spilled_bytes": kernel.spilled_bytes,
        "shared_bytes": kernel.shared_bytes,
        "warps": kernel.warps,
        "constants": {name: str(value) for name, value in kernel.constants.items()},
        "tensor_core": len(re.findall(r"\s(?:HMMA|HGMMA)\.", code)),
        "local": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "loads": len(re.findall(r"\bLDG(?:STS)?\b", code)),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.\S*128\b", code)),
    }


PAGE = """# What each Triton kernel takes of a GPU

Registers of a thread / bytes of shared memory of a block / warps of a block, as compiled by Triton {version} for sm_80
(A100) and sm_90 (H100); "spills" stands where registers had to be kept in memory. One row for each kernel of a call, in
{dtype}. `python tests/triton_kernels.py table > docs/kernels.md` writes this page, without a GPU; the calls are among
CASES of that file. tests/test_triton_compiled.py holds the kernels to: no spills, tensor cores for every matrix
product, 16-byte loads where the tensors allow.

| call | kernel | sm_80 | sm_90 |
|---|---|---|---|"""


SHOWN = ("norm", "norm_wide", "softmax_bias", "softmax_wide_bias", "ffn", "ffn_gated", "ffn_few_rows", "rotary")
SHOWN += ("cache_append", "rotary_append", "decode", "attention_weights", "attention", "attention_128")
SHOWN += ("attention_scores",)


def table(dtype: str = "float16") -> Iterator[str]:
    """The lines of docs/kernels.md."""
    import triton

    yield PAGE.format(version=triton.__version__, dtype=dtype)
    for case in SHOWN:
        both = [compile_case(case, getattr(torch, dtype), gpu) for gpu in ((8, 0), (9, 0))]
        for kernels in itertools.zip_longest(*both):
            name = next(kernel["kernel"] for kernel in kernels if kernel)
            cells = ["" if kernel is None else _taken(kernel) for kernel in kernels]
            yield f"| {case} | {name.removeprefix('transfuse.ops.')} | {' | '.join(cells)} |"


def _taken(kernel: dict[str, Any]) -> str:
    spills = " spills" if kernel["spilled_bytes"] else ""
    return f"{kernel['registers']} / {kernel['shared_bytes']} / {kernel['warps']}{spills}"


def main() -> None:
    if sys.argv[1:] == ["table"]:
        for row in table():
            print(row, flush=True)
        return
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if asked == "list":
                answer: Any = [sorted(kernels_there_are()), {name: sorted(launched(name)) for name in CASES}]
            else:
                case, dtype, capability = asked
                answer = compile_case(case, getattr(torch, dtype), tuple(capability))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
