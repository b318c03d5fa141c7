"""What the machine code of each CUDA kernel in ``_C`` takes of a GPU, and what its launches ask for.

`python tests/cuda_kernels.py > docs/cuda-kernels.md` writes the page that shows it. That needs ``_C`` (nvcc builds it),
g++ for the launches, which tests/cuda_on_cpu notes without running them, and no GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import transfuse
from cuda_on_cpu import build
from triton_kernels import (
    CASES,
    Call,
    attention,
    decode,
    empty,
    ffn,
    norm,
    rotary,
    softmax,
    varlen,
    weights,
    with_scores,
)

ARCHITECTURES = ("sm_80", "sm_90a")
SHARED = {
    "sm_80": 164 << 10,
    "sm_90a": 228 << 10,
}  # bytes of a multiprocessor; a block takes 1 KB more than it asks for
REGISTERS = 65536  # of a multiprocessor, in four parts; a warp takes multiples of 256


@dataclass
class Kernel:
    """One instantiation, as compiled for one architecture."""

    name: str
    registers: int
    stack: int  # bytes of a thread in local memory
    shared: int  # static bytes of a block
    threads: int = 0  # at most, by __launch_bounds__
    blocks: int = 1  # of a multiprocessor, which __launch_bounds__ promises
    tensor_core: int = 0  # instructions
    local: int = 0  # loads and stores of local memory
    loads: list[int] = field(default_factory=list)  # bytes of each instruction that reads global memory
    stores: list[int] = field(default_factory=list)

    def fits(self, architecture: str, launched: Launch | None) -> int:
        """Blocks that a multiprocessor has room for: by registers, threads and shared memory."""
        threads, dynamic = launched or (self.threads, 0)
        warps = -(-threads // 32)
        warp_registers = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // 4 // warp_registers * 4 // warps
        return min(by_registers, 64 // warps, SHARED[architecture] // (self.shared + dynamic + 1024), 32)


Launch = tuple[int, int]  # threads of a block, bytes of its dynamic shared memory


# --- machine code ---------------------------------------------------------------------------------------------------


def cuobjdump() -> str | None:
    """NVIDIA's disassembler: from a toolkit, or the one that the triton package carries."""
    found = shutil.which("cuobjdump")
    spec = importlib.machinery.PathFinder.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(bundled) if bundled.is_file() else None
    return found


def dump(file: Path, *options: str) -> Iterator[str]:
    """The lines that cuobjdump writes; there may be millions."""
    with subprocess.Popen(
        [cuobjdump() or "cuobjdump", *options, str(file)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
    assert process.returncode == 0, f"cuobjdump {options} failed"


@functools.cache
def kernels(file: Path, architecture: str) -> dict[str, Kernel]:
    """Every kernel of the extension ``file`` by its name."""
    found: dict[str, Kernel] = {}
    name = ""
    for line in dump(file, "-res-usage", "-arch", architecture):
        if match := re.match(r"\s*Function (\S+):", line):
            name = readable(match[1])
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            if architecture == "sm_90a" and shared:  # counts the 1 KB that the system takes of each block
                shared -= 1024
            found[name] = Kernel(name, registers, stack + local, shared)
    _read_launch_bounds(file, found)
    kernel = None
    access = re.compile(r"\b(LDG|LDGSTS|STG)\.(\S+)|\b([HI]?G?MMA)\.|\b(LDL|STL)\b")
    for line in dump(file, "-sass", "-arch", architecture):
        if "Function : " in line:
            kernel = found[readable(line.split(" : ")[1].strip())]
        elif kernel is not None and (match := access.search(line)):
            if match[3]:
                kernel.tensor_core += 1
            elif match[4]:
                kernel.local += 1
            else:
                width = re.search(r"\b(128|64|[US]16|[US]8)\b", match[2])
                size = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[width[1]] if width else 4
                (kernel.stores if match[1] == "STG" else kernel.loads).append(size)
    return found


def _read_launch_bounds(file: Path, into: dict[str, Kernel]) -> None:
    """__launch_bounds__ stand in the PTX, which is there for one architecture and holds for all."""
    name = ""
    for line in dump(file, "-ptx"):
        if match := re.match(r"(?:\.visible )?\.entry (\w+)", line):
            name = readable(match[1])
        elif match := re.match(r"\.maxntid (\d+), (\d+), (\d+)", line):
            x, y, z = map(int, match.groups())
            into[name].threads = x * y * z
        elif match := re.match(r"\.minnctapersm (\d+)", line):
            into[name].blocks = int(match[1])


@functools.cache
def readable(symbol: str) -> str:
    """_ZN9transfuse4norm14layer_norm_rowI6__halfS2_Li8EEEv... -> norm::layer_norm_row<__half, __half, 8>"""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_char_p
    name = demangle(symbol.encode(), None, None, None).decode()
    name = re.sub(r"\((anonymous namespace)\)::|_(GLOBAL__N|INTERNAL)_\w+::", "", name)
    return (
        re.sub(r"\((?:int|unsigned int|bool)\)", "", name.removeprefix("void "))
        .split("(")[0]
        .removeprefix("transfuse::")
    )


# --- launches -------------------------------------------------------------------------------------------------------


def wide(case: Callable[..., Call], **options: Any) -> Callable[[torch.dtype], Call]:
    """The case with everything but its first tensor in float32, as parameters of half-precision models often are."""

    def make(dtype: torch.dtype) -> Call:
        function, args, kwargs, backward = case(dtype, **options)
        rest = [t.detach().to(torch.float32).requires_grad_() for t in args[1:]]
        kwargs = {n: t.detach().to(torch.float32) if t.is_floating_point() else t for n, t in kwargs.items()}
        return function, (args[0], *rest), kwargs, backward

    return make


def key_bias(dtype: torch.dtype, k_len: int) -> Call:
    """causal_softmax with a bias of keys alone, whose gradient is summed in two steps."""
    function, args, kwargs, backward = softmax(dtype, k_len)
    return function, args, {**kwargs, "bias": empty(1, 4, 1, k_len, dtype=dtype)}, backward


def narrow(dtype: torch.dtype) -> Call:
    """linear_act with so few tiles that its product is split over K."""
    return transfuse.linear_act, (*(empty(*s, dtype=dtype) for s in ((8, 1024), (64, 1024), (64,))), "gelu"), {}, True


WIDTHS = (1024, 1001, 65536, 65535)  # a row in registers, or in a loop; with and without 16-byte accesses
MORE_CASES = {  # than Triton's: CUDA's kernels are instantiated by width and by the dtype of parameters
    **{f"norm_{width}": functools.partial(norm, width=width, rows=64) for width in WIDTHS},
    **{f"norm_wide_{width}": wide(norm, width=width, rows=64) for width in WIDTHS},
    **{f"softmax_bias_{width}": functools.partial(softmax, k_len=width, bias=True) for width in WIDTHS},
    **{f"softmax_wide_bias_{width}": wide(softmax, k_len=width, bias=True) for width in WIDTHS},
    **{f"softmax_key_bias_{width}": functools.partial(key_bias, k_len=width) for width in WIDTHS},
    **{f"attention_{d}": functools.partial(attention, head_dim=d) for d in (16, 32, 64, 96, 128, 192, 256)},
    **{f"scores_{d}": functools.partial(with_scores, head_dim=d) for d in (16, 32, 64, 96, 128, 192, 256)},
    **{f"varlen_{d}": functools.partial(varlen, head_dim=d) for d in (32, 256)},
    **{f"weights_{d}": functools.partial(weights, head_dim=d) for d in (32, 64, 128, 256)},
    **{f"decode_{d}_{q}": functools.partial(decode, head_dim=d, q_len=q) for d in (32, 64, 128, 256) for q in (1, 8)},
    **{f"rotary_{d}": functools.partial(rotary, head_dim=d) for d in (20, 64, 80)},
    **{f"ffn_{a}": functools.partial(ffn, activation=a) for a in ("relu", "gelu", "gelu_tanh", "silu")},
    **{f"ffn_gated_{a}": functools.partial(ffn, activation=a, gated=True) for a in ("relu", "gelu", "gelu_tanh")},
    **{f"ffn_{rows}": functools.partial(ffn, rows=rows) for rows in (8, 40)},  # tiles of fewer rows
    "linear_narrow": narrow,
}


# Sizes that choose no kernel are cut, in all dimensions and in the last: what is not a kernel's work is done.
MOST = {"attention": (256, 256), "attention_varlen": (256, 256), "attention_weights": (256, 256)}
MOST["causal_softmax"] = (16, 65536)


def launches() -> dict[str, Launch]:
    """The most threads and dynamic shared memory of each kernel, over the cases in each dtype."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "launches"
        environment = {"TRANSFUSE_CUDA_ON_CPU": str(build.build()), "TRANSFUSE_CUDA_ON_CPU_LAUNCHES": str(notes)}
        command = [sys.executable, __file__, "launch"]
        subprocess.run(command, env={**os.environ, **environment}, check=True, stdout=sys.stderr)
        found: dict[str, Launch] = {}
        for line in notes.read_text().splitlines():
            name, threads, shared = line.rsplit(" ", 2)
            before = found.get(name.removeprefix("transfuse::"), (0, 0))
            found[name.removeprefix("transfuse::")] = (max(before[0], int(threads)), max(before[1], int(shared)))
        return found


def launch_all() -> None:
    """Makes the call of every case on the CUDA backend, with memory that nobody reads or writes."""
    for name, case in {**CASES, **MORE_CASES}.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            reason = _launch(case(dtype))
            if reason is not None:
                print(f"{name} {dtype}: {reason}")


def _launch(call: Call) -> str | None:
    """Why there is no kernel for it, or None."""
    from transfuse.errors import BackendError

    function, args, kwargs, backward = call
    try:
        real = functools.partial(_real, most=MOST.get(function.__name__, ()))
        outputs = function(*map(real, args), backend="cuda", **{n: real(t) for n, t in kwargs.items()})
    except BackendError as error:
        return str(error)
    if backward:
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
    return None


def _real(value: Any, most: Sequence[int]) -> Any:
    """A tensor on the CPU for one on the meta device."""
    if not isinstance(value, torch.Tensor):
        return value
    make = torch.empty if value.is_floating_point() else torch.zeros
    shape = [min(n, most[-1] if d == value.dim() - 1 else most[0]) if most else n for d, n in enumerate(value.shape)]
    return make(shape, dtype=value.dtype, requires_grad=value.requires_grad)


# --- the page -------------------------------------------------------------------------------------------------------

PAGE = """# What each CUDA kernel takes of a GPU

Written by `python tests/cuda_kernels.py > docs/cuda-kernels.md` from the machine code of `transfuse._C`; no GPU is
needed. tests/test_extension.py holds the kernels to: no local memory, tensor cores for every matrix product, 16-byte
loads and stores where tensors are aligned, room for the blocks that `__launch_bounds__` promises, and this list to be
complete.

- threads: of a block, at most; x blocks that `__launch_bounds__` promises to fit a multiprocessor
- sm_80 (A100), sm_90a (H100): registers of a thread / blocks that fit a multiprocessor; "local" where a thread's
  variables had to be kept in memory
- shared: bytes of a block, static + dynamic (the most that the calls of that file ask for; "?": none launches it)
- bytes: widest load / widest store of global memory
- mma: whether tensor cores are used

| kernel | threads | sm_80 | sm_90a | shared | bytes | mma |
|---|---|---|---|---|---|---|"""


def table(file: Path) -> Iterator[str]:
    """The lines of docs/cuda-kernels.md."""
    yield PAGE
    launched = launches()
    compiled = {architecture: kernels(file, architecture) for architecture in ARCHITECTURES}
    for name in sorted(set().union(*compiled.values())):
        there = {a: k[name] for a, k in compiled.items() if name in k}
        first, launch = next(iter(there.values())), launched.get(name)
        taken = [_taken(there[a], a, launch) if a in there else "" for a in ARCHITECTURES]
        shared = f"{max(k.shared for k in there.values())} + {launch[1] if launch else '?'}"
        widest = f"{max(first.loads, default=0)} / {max(first.stores, default=0)}"
        products = "yes" if first.tensor_core else ""
        yield f"| {name} | {first.threads} x {first.blocks} | {' | '.join(taken)} | {shared} | {widest} | {products} |"


def _taken(kernel: Kernel, architecture: str, launch: Launch | None) -> str:
    local = " local" if kernel.stack or kernel.local else ""
    return f"{kernel.registers} / {kernel.fits(architecture, launch)}{local}"


def listed(page: Path) -> set[str]:
    """The kernels that the page names."""
    return set(re.findall(r"^\| (\w+::.+?) \| ", page.read_text(), re.MULTILINE))


if __name__ == "__main__":
    from transfuse import _extension

    if sys.argv[1:] == ["launch"]:
        launch_all()
    else:
        for row in table(Path(str(_extension.kernels().__file__))):
            print(row, flush=True)
