"""Inputs and options of the attention tests, and a brute-force evaluation that shares no code with the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from transfuse import attention, attention_weights

T = TypeVar("T")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    dim: int
    v_dim: int

    def __str__(self) -> str:
        b, h, g, m, n, d, dv = self
        groups = f"H{h}" if h == g else f"H{h}x{g}"
        lengths = f"L{m}" if m == n else f"L{m}x{n}"
        return f"B{b}-{groups}-{lengths}-D{d}" if d == dv else f"B{b}-{groups}-{lengths}-D{d}x{dv}"


SHAPES = [
    Shape(2, 2, 2, 16, 16, 32, 32),
    Shape(1, 4, 2, 37, 53, 64, 64),
    Shape(2, 4, 1, 53, 37, 24, 24),
    Shape(2, 4, 2, 1, 70, 64, 64),
    Shape(1, 2, 1, 67, 67, 80, 40),
    Shape(1, 1, 1, 70, 5, 13, 29),
]
SMALL = SHAPES[:3]
FEATURES = [
    "plain",
    "causal",
    "lower_right",
    "mask",
    "key_mask",
    "causal-mask",
    "bias",
    "fp32_bias",
    "key_bias",
    "alibi",
    "window",
    "left_window",
    "causal-window-alibi",
    "softcap",
    "sinks",
    "lower_right-mask-sinks",
    "lower_right-mask-bias-alibi-window-softcap-sinks",
]


EVERYTHING = FEATURES[-1]


def quick_interpreted(points: Callable[[dict[str, Any]], bool]) -> Callable[[T], T]:
    """Kernels on a CPU, Triton's or CUDA's, take long over a test's whole grid: only points(params) are not slow."""

    def remember(test: T) -> T:
        test.quick_interpreted = points  # type: ignore[attr-defined]
        return test

    return remember


def name_of(value: object) -> str:
    """Readable test ids."""
    return str(value).removeprefix("torch.")


def inputs(shape: Shape, dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, torch.Tensor | None]:
    """q, k, v of a shape."""
    b, h, g, m, n, d, dv = shape
    sizes = {"q": (b, h, m, d), "k": (b, g, n, d), "v": (b, g, n, dv)}
    return {name: torch.randn(size, device=device).to(dtype) for name, size in sizes.items()}


def features(
    names: str, shape: Shape, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[dict[str, torch.Tensor | None], dict[str, object]]:
    """(tensors, options) that the dash-separated names stand for; masks hide some rows entirely."""
    b, h, _, m, n, _, _ = shape
    tensors: dict[str, torch.Tensor | None] = {}
    options: dict[str, object] = {}
    for name in names.split("-"):
        if name == "causal":
            options["causal"] = True
        elif name == "lower_right":
            options["causal"] = "lower_right"
        elif name == "mask":
            mask = torch.rand(b, 1, m, n, device=device) > 0.4
            mask[:, :, m // 2] = False
            tensors["mask"] = mask
        elif name == "key_mask":
            tensors["mask"] = torch.arange(n, device=device) < torch.randint(1, n + 1, (b, 1, 1, 1), device=device)
        elif name == "bias":
            tensors["bias"] = torch.randn(1, h, m, n, device=device).to(dtype)
        elif name == "fp32_bias":
            tensors["bias"] = torch.randn(h, m, n, device=device)
        elif name == "key_bias":
            tensors["bias"] = torch.randn(b, 1, 1, n, device=device).to(dtype)
        elif name == "alibi":
            tensors["alibi_slopes"] = torch.rand(h, device=device) / 4
        elif name == "window":
            options["window"] = (5, 3)
        elif name == "left_window":
            options["window"] = (4, -1)
        elif name == "softcap":
            options["softcap"] = 1.5
        elif name == "sinks":
            tensors["sinks"] = torch.randn(h, device=device)
        else:
            assert name == "plain", name
    return tensors, options


def brute_force(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool | str = False,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) one query, one key at a time, in Python's own floats."""
    batch, heads, q_len, dim = q.shape
    k_len, group = k.shape[2], heads // k.shape[1]
    out, lse = q.new_zeros(batch, heads, q_len, v.shape[3]), q.new_zeros(batch, heads, q_len)
    mask = None if mask is None else mask.expand(batch, heads, q_len, k_len)
    bias = None if bias is None else bias.expand(batch, heads, q_len, k_len)
    left, right = window or (-1, -1)
    for b in range(batch):
        for h in range(heads):
            for i in range(q_len):
                position = i + k_len - q_len if causal == "lower_right" else i
                weights = []
                for j in range(k_len):
                    s = (dim**-0.5 if scale is None else scale) * sum(
                        x * y for x, y in zip(q[b, h, i].tolist(), k[b, h // group, j].tolist(), strict=True)
                    )
                    s = s if softcap is None else softcap * math.tanh(s / softcap)
                    s += 0.0 if bias is None else bias[b, h, i, j].item()
                    s -= 0.0 if alibi_slopes is None else alibi_slopes[h].item() * abs(position - j)
                    hidden = (
                        (mask is not None and not mask[b, h, i, j])
                        or (causal and j > position)
                        or (left >= 0 and j < position - left)
                        or (right >= 0 and j > position + right)
                    )
                    weights.append(0.0 if hidden else math.exp(s))
                total = sum(weights) + (0.0 if sinks is None else math.exp(sinks[h].item()))
                lse[b, h, i] = math.log(total) if total else -math.inf
                for j, w in enumerate(weights):
                    out[b, h, i] += (w / total if total else 0.0) * v[b, h // group, j]
    return out, lse


def sizes_of_intermediates(
    tensors: dict[str, torch.Tensor | None], options: dict[str, object], grad_outputs: list[torch.Tensor | None]
) -> dict[str, float]:
    """How large the terms are whose sums the gradients are, for :func:`oracle.judge`: they may cancel.

    dS = P * (dP - delta) with dP = dO V^T and delta = rowsum(P * dP) - dlse; dQ, dK and the others are sums of dS times
    something.
    """
    exact = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}
    q, k, v = (exact[n].detach() for n in "qkv")  # type: ignore[union-attr]
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return {}
    out, lse = attention(**exact, **options, return_lse=True, backend="reference")  # type: ignore[call-overload]
    shaping = {n: t for n, t in exact.items() if n not in ("q", "k", "v", "sinks")}
    p = attention_weights(q, k, lse, **shaping, **options, backend="reference")  # type: ignore[arg-type]
    found = {}
    if q.numel() and tensors["q"].dtype in (torch.float16, torch.bfloat16):  # type: ignore[union-attr]
        # the same formulas end in an lse of q's dtype: half its unit, where a lucky rounding shows less
        unit = torch.finfo(tensors["q"].dtype).eps * lse.nan_to_num(1, 1, 1).abs().max().clamp(min=1.0).item()  # type: ignore[union-attr]
        found["lse"] = unit / 2 / (8 * torch.finfo(torch.float32).eps)
    dout, dlse = (None if g is None else g.double() for g in grad_outputs)
    dout = torch.zeros_like(out) if dout is None else dout
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    dp = (dout @ v.mT).abs()
    delta = (p * dp).sum(-1) + (0 if dlse is None else dlse.abs())
    ds = p * (dp + delta[..., None])
    scale = q.shape[3] ** -0.5 if options.get("scale") is None else abs(options["scale"])  # type: ignore[arg-type]
    if "lse" not in found:  # a score may be less than the terms of its sum, which fp32 adds in any order
        found["lse"] = scale * (q.abs() @ k.abs().mT).max().item()
    found["dq"] = scale * (ds @ k.abs()).max().item()
    found["dk"] = scale * group * (ds.mT @ q.abs()).max().item()
    found["dv"] = group * (p.mT @ dout.abs()).max().item()
    # low-precision implementations round dP, and read an O that was rounded: every term of a sum is off on its own
    dtype = tensors["q"].dtype  # type: ignore[union-attr]
    if exact.get("bias") is not None:
        size = exact["bias"].shape  # type: ignore[union-attr]
        found["dbias"] = max(ds.sum_to_size(size).max().item(), _rounding(dtype, (p * dp).square().sum_to_size(size)))
    if exact.get("alibi_slopes") is not None:
        longest = max(q.shape[2], k.shape[2])
        terms = (p * dp * longest).square().sum((-2, -1))
        found["dalibi_slopes"] = max((ds.sum((-2, -1)) * longest).max().item(), _rounding(dtype, terms))
    if exact.get("sinks") is not None:
        share = (exact["sinks"][:, None] - lse).exp()  # type: ignore[index]
        terms = share[..., None] * dout * out
        largest = (terms.abs().sum(-1) + (0 if dlse is None else share * dlse.abs())).sum((0, 2)).max().item()
        found["dsinks"] = max(largest, _rounding(dtype, terms.square().sum((0, 2, 3))))
    return found


def _rounding(dtype: torch.dtype, squares: torch.Tensor) -> float:
    """Four standard deviations of a sum of rounded terms, given the sum of their squares.

    A term is off by up to half a unit. judge() allows eight fp32 units of what this returns.
    """
    spread = torch.finfo(dtype).eps * squares.max().sqrt().item() / 12**0.5
    return 4 * spread / (8 * torch.finfo(torch.float32).eps)
