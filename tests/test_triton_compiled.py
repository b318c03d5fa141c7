"""Every Triton kernel, compiled for GPUs that need not be here: what its machine code must have and must not have."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from triton_kernels import CASES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is missing")

SHARED = {(8, 0): 163 * 1024, (9, 0): 227 * 1024}  # bytes that a block may use
# The 16-bit types give the same code but for the conversions, so each stands for both on one GPU.
WHOLE = [
    (case, dtype, capability)
    for capability, dtypes in (((8, 0), ("bfloat16", "float32")), ((9, 0), ("float16", "float32")))
    for dtype in dtypes
    for case in CASES
]
# Every kernel once, each op on both GPUs and in 16 and 32 bits; the rest is slow.
QUICK = {
    *((case, "float16", (9, 0)) for case in ("norm", "norm_wide", "softmax_bias", "softmax_wide_bias", "ffn_gated")),
    *((case, "float16", (9, 0)) for case in ("ffn_few_rows", "attention_scores", "attention_weights", "varlen")),
    *((case, "float16", (9, 0)) for case in ("decode", "rotary", "cache_append", "rotary_append")),
    *((case, "bfloat16", (8, 0)) for case in ("norm", "softmax", "ffn_gated", "attention_128", "decode")),
    *((case, "float32", (8, 0)) for case in ("attention", "norm_rms_unaligned")),
    *((case, "float32", (9, 0)) for case in ("ffn", "softmax_bias", "decode_64")),
}
Ask = Callable[[Any], Any]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Sends a line to a process that compiles, with a cache of its own, and gives its answer."""
    variables = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRANSFUSE_TUNING": "off"}
    variables.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("triton_kernels.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def send(line: Any) -> Any:
            print(json.dumps(line), file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline())
            assert "error" not in answer, answer["error"]
            return answer

        yield send
        process.stdin.close()


def _id(value: Any) -> str:
    return f"sm_{value[0]}{value[1]}" if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(
    "case, dtype, capability",
    [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow, id="-".join(map(_id, c))) for c in WHOLE],
)
def test_machine_code(ask, case, dtype, capability):
    kernels = ask([case, dtype, capability])
    assert kernels, "nothing was launched"
    wrong = []
    for kernel in kernels:
        name = f"{kernel['kernel']} {kernel['constants']}"
        if kernel["spilled_bytes"] or kernel["local"]:
            wrong.append(f"{name} spills {kernel['spilled_bytes']} bytes of registers")
        if kernel["shared_bytes"] > SHARED[capability]:
            wrong.append(f"{name} takes {kernel['shared_bytes']} bytes of shared memory")
        if kernel["dot"] and not kernel["tensor_core"]:
            wrong.append(f"{name} multiplies matrices without tensor cores")
        if kernel["loads"] and not kernel["wide_loads"] and "unaligned" not in case:
            wrong.append(f"{name} has no load of 16 bytes")
    assert not wrong, "\n".join(wrong)


def test_no_kernel_is_forgotten(ask):
    there, launched = ask("list")
    missing = sorted(set(there).difference(*(launched[case] for case, _, _ in QUICK)))
    assert not missing, f"no quick case of triton_kernels.CASES launches {missing}"
