"""What bench_gpu.py measures: each case an op at one size, ours on every kernel backend and its peers, ready to call.

A case's limit is what the hardware must at least do: floating-point operations of a product, bytes of the rest (every
input read once, every output written once).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import transfuse as tf
from transfuse import ops
from transfuse.backends import why_not

Function = Callable[..., torch.Tensor]


@dataclass
class Case:
    """Variants are functions of the inputs, in order; those of ``grads`` get a gradient in the backward runs."""

    op: str
    name: str
    inputs: dict[str, torch.Tensor]
    variants: dict[str, Function]
    reference: Function
    """The formulas, of the inputs' own precision or of their fp64 copies; gives the ``part`` of the output."""
    flops: float = 0.0
    bytes: float = 0.0
    grads: Sequence[str] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    part: Function = lambda out: out
    """What of an output is compared: all scores of a long sequence would not fit."""


def ours(device: torch.device, op: Function, **options: Any) -> dict[str, Function]:
    """The op on each kernel backend that can run here."""
    return {b: functools.partial(op, backend=b, **options) for b in ("cuda", "triton") if why_not(b, device) is None}


# --- attention ------------------------------------------------------------------------------------------------------

FEATURES = ("full", "causal", "key mask", "bias", "alibi", "window", "softcap", "sinks", "grouped")


def attention(
    device: torch.device, dtype: torch.dtype, tokens: int, width: int, lengths: Sequence[int]
) -> Iterator[Case]:
    """batch * length = tokens, heads * head_dim = width: plain and causal at every length, the features at three."""
    for dim in (64, 128):
        for length in lengths:
            for feature in FEATURES[:2]:
                yield _attention(device, dtype, tokens // length, width // dim, length, dim, feature)
    for length in lengths[:3]:
        for feature in FEATURES[2:]:
            yield _attention(device, dtype, tokens // length, width // 64, length, 64, feature)


def _attention(
    device: torch.device, dtype: torch.dtype, batch: int, heads: int, length: int, dim: int, feature: str
) -> Case:
    make = functools.partial(torch.randn, device=device, dtype=dtype)
    kv_heads = max(1, heads // 8) if feature == "grouped" else heads
    inputs = {
        "q": make(batch, heads, length, dim),
        "k": make(batch, kv_heads, length, dim),
        "v": make(batch, kv_heads, length, dim),
    }
    options: dict[str, Any] = {"causal": feature in ("causal", "window", "softcap", "sinks", "grouped")}
    if feature == "key mask":
        lengths = torch.randint(length // 4, length + 1, (batch, 1, 1, 1), device=device)
        options["mask"] = torch.arange(length, device=device) < lengths
    elif feature == "bias":
        inputs["bias"] = make(1, heads, length, length)
    elif feature == "alibi":
        options["alibi_slopes"] = 2.0 ** (-8 * torch.arange(1, heads + 1, device=device) / heads)
    elif feature == "window":
        options["window"] = (max(1, length // 8), -1)
    elif feature == "softcap":
        options["softcap"] = 30.0
    elif feature == "sinks":
        inputs["sinks"] = torch.randn(heads, device=device)
    names = list(inputs)

    def op(*tensors: torch.Tensor, backend: str) -> torch.Tensor:
        return tf.attention(**dict(zip(names, tensors, strict=True)), **options, backend=backend)

    compared = heads if length <= 2048 else 1  # of the first batch row

    def reference(*tensors: torch.Tensor) -> torch.Tensor:
        t = dict(zip(names, tensors, strict=True))
        t["q"] = t["q"][:1, :compared]
        t["k"], t["v"] = (t[n][:1] if compared == heads else t[n][:1, :1] for n in ("k", "v"))
        shaping = {**options, "mask": options["mask"][:1]} if "mask" in options else options
        return tf.attention(**t, **shaping, backend="reference")

    peers, skipped = _attention_peers(feature, options, inputs)
    keys = length / 2 if feature in ("causal", "softcap", "sinks", "grouped") else length
    if feature == "window":
        keys = min(options["window"][0], length / 2)
    return Case(
        op="attention",
        name=f"B{batch}-H{heads}x{kv_heads}-L{length}-D{dim} {feature}",
        inputs=inputs,
        variants=ours(device, op) | peers,
        reference=reference,
        part=lambda out: out[:1, :compared],
        flops=4.0 * batch * heads * length * keys * dim,
        grads=names,
        skipped=skipped,
    )


def _attention_peers(
    feature: str, options: dict[str, Any], inputs: dict[str, torch.Tensor]
) -> tuple[dict[str, Function], dict[str, str]]:
    """What a torch user has for the same result: SDPA's backends one by one, FlexAttention, eager torch.compile."""
    length = inputs["q"].shape[2]
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    if feature in ("full", "causal", "grouped"):
        backends["flash"] = SDPBackend.FLASH_ATTENTION
    peers: dict[str, Function] = {}
    if feature not in ("softcap", "sinks"):
        for name, backend in backends.items():
            peers[f"sdpa {name}"] = functools.partial(_sdpa, backend, feature, options)
    if feature != "sinks":
        peers["flex"] = _flex(feature, options, inputs)
    if length <= 2048:
        peers["compile"] = torch.compile(functools.partial(_eager, feature, options), dynamic=False)
        return peers, {}
    return peers, {"compile": "keeps all scores: not at this length"}


def _hidden_or_added(
    feature: str, options: dict[str, Any], length: int, like: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """What F.scaled_dot_product_attention takes as attn_mask."""
    if bias is not None:
        return bias
    if feature == "key mask":
        return options["mask"]
    distance = torch.arange(length, device=like.device)[:, None] - torch.arange(length, device=like.device)
    if feature == "alibi":
        return (-options["alibi_slopes"][:, None, None] * distance.abs())[None].to(like.dtype)
    if feature == "window":
        return (distance >= 0) & (distance <= options["window"][0])
    return None


def _sdpa(backend: SDPBackend, feature: str, options: dict[str, Any], *tensors: torch.Tensor) -> torch.Tensor:
    q, k, v, *rest = tensors
    added = _hidden_or_added(feature, options, q.shape[2], q, rest[0] if rest else None)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q, k, v, added, is_causal=added is None and options["causal"], enable_gqa=feature == "grouped"
        )


def _eager(feature: str, options: dict[str, Any], *tensors: torch.Tensor) -> torch.Tensor:
    q, k, v, *rest = tensors
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
    s = (q @ k.mT).float() * q.shape[-1] ** -0.5
    if feature == "softcap":
        s = options["softcap"] * torch.tanh(s / options["softcap"])
    added = _hidden_or_added(feature, options, length, q, rest[0] if rest and feature == "bias" else None)
    if added is not None:
        s = s.masked_fill(~added, -torch.inf) if added.dtype == torch.bool else s + added
    elif options["causal"]:
        s = s.masked_fill(torch.ones(length, length, device=q.device, dtype=torch.bool).triu(1), -torch.inf)
    if feature == "sinks":
        s = torch.cat([s, rest[0][:, None, None].expand(*s.shape[:3], 1)], -1)
        return torch.softmax(s, -1)[..., :-1].to(v.dtype) @ v
    return torch.softmax(s, -1).to(v.dtype) @ v


def _flex(feature: str, options: dict[str, Any], inputs: dict[str, torch.Tensor]) -> Function:
    """FlexAttention, compiled; the block mask is made beforehand and not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q = inputs["q"]
    batch, length = q.shape[0], q.shape[2]
    of_batch = None
    mask_mod: Any = None
    if feature == "key mask":
        mask, of_batch = options["mask"].view(batch, length), batch
        mask_mod = lambda b, h, i, j: mask[b, j]  # noqa: E731
    elif feature == "window":
        left = options["window"][0]
        mask_mod = lambda b, h, i, j: (i >= j) & (i - j <= left)  # noqa: E731
    elif options["causal"]:
        mask_mod = lambda b, h, i, j: i >= j  # noqa: E731
    compiled = torch.compile(flex_attention, dynamic=False)

    @functools.cache
    def blocks() -> Any:
        return None if mask_mod is None else create_block_mask(mask_mod, of_batch, None, length, length, q.device)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        q, k, v, *rest = tensors
        score_mod: Any = None
        if feature == "bias":
            score_mod = lambda s, b, h, i, j: s + rest[0][0, h, i, j]  # noqa: E731
        elif feature == "alibi":
            slopes = options["alibi_slopes"]
            score_mod = lambda s, b, h, i, j: s - slopes[h] * (i - j).abs()  # noqa: E731
        elif feature == "softcap":
            cap = options["softcap"]
            score_mod = lambda s, b, h, i, j: cap * torch.tanh(s / cap)  # noqa: E731
        return compiled(q, k, v, score_mod=score_mod, block_mask=blocks(), enable_gqa=feature == "grouped")

    return run


def decode(device: torch.device, dtype: torch.dtype, lengths: Sequence[int]) -> Iterator[Case]:
    """One query row over a cache: bytes of the keys and values decide."""
    for batch, heads, kv_heads in ((1, 32, 8), (8, 32, 8), (32, 32, 32), (16, 12, 12)):
        for length in lengths:
            make = functools.partial(torch.randn, device=device, dtype=dtype)
            q, k, v = make(batch, heads, 1, 128), make(batch, kv_heads, length, 128), make(batch, kv_heads, length, 128)
            filled = torch.full((batch,), length, device=device, dtype=torch.int32)

            def op(q, k, v, *, filled=filled, backend):
                return tf.attention_decode(q, k, v, filled, backend=backend)

            def sdpa(q, k, v, *, grouped=heads != kv_heads):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

            yield Case(
                op="attention_decode",
                name=f"B{batch}-H{heads}x{kv_heads}-L{length}-D128",
                inputs={"q": q, "k": k, "v": v},
                variants=ours(device, op) | {"sdpa": sdpa},
                reference=functools.partial(op, backend="reference"),
                bytes=float((k.numel() + v.numel()) * k.element_size()),
            )


def rotary(device: torch.device, dtype: torch.dtype, tokens: Sequence[int]) -> Iterator[Case]:
    """Turned heads, a cache's write, and both at once: one new token of some rows, and whole prompts."""
    for new in tokens:
        batch, heads, kv_heads, dim, room = (8 if new == 1 else 1), 32, 8, 128, max(tokens)
        packed = torch.randn(batch, new, heads + 2 * kv_heads, dim, device=device, dtype=dtype)
        q, k, v = packed.split((heads, kv_heads, kv_heads), 2)
        angles = torch.rand(1, new, 1, dim // 2, device=device).repeat(1, 1, 1, 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        caches = torch.zeros(2, batch, kv_heads, room, dim, device=device, dtype=dtype)

        def turn(q, k, cos, sin, *, backend):
            return ops.rotary_embedding(q, k, cos, sin, backend=backend)[0]

        def append(k, v, *, caches=caches, new=new, backend):
            own = caches.to(k.dtype)  # itself, but for the formulas in fp64
            ops.cache_append(k.transpose(1, 2), v.transpose(1, 2), *own, 0, backend=backend)
            return own[:, :, :, :new]

        def both(q, k, v, cos, sin, *, caches=caches, new=new, backend):
            own = caches.to(k.dtype)
            ops.rotary_append(q, k, v, cos, sin, *own, 0, backend=backend)
            return own[:, :, :, :new]

        inputs = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin}
        kinds = {
            "rotary_embedding": (turn, "q k cos sin"),
            "cache_append": (append, "k v"),
            "rotary_append": (both, "q k v cos sin"),
        }
        for name, (op, names) in kinds.items():
            of_op = {n: inputs[n] for n in names.split()}
            moved = sum(t.numel() * (2 if n in "qkv" else 1) for n, t in of_op.items())
            yield Case(
                op=name,
                name=f"B{batch}-L{new}-H{heads}x{kv_heads}-D{dim}",
                inputs=of_op,
                variants=ours(device, op) | {"torch": functools.partial(op, backend="torch")},
                reference=functools.partial(op, backend="reference"),
                bytes=float(moved * q.element_size()),
            )


def varlen(device: torch.device, dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    """Packed rows of very different lengths beside the same rows padded."""
    for longest, causal in ((128, False), (512, False), (512, True), (2048, True)):
        lengths = torch.randint(1, longest + 1, (max(1, 2 * tokens // longest),))
        starts = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
        total, batch = int(lengths.sum()), len(lengths)
        q, k, v = (torch.randn(total, 12, 64, device=device, dtype=dtype) for _ in range(3))

        def op(q, k, v, *, starts=starts, longest=longest, causal=causal, backend):
            return tf.attention_varlen(q, k, v, starts, starts, longest, longest, causal=causal, backend=backend)

        mask = torch.arange(longest, device=device) < lengths.to(device)[:, None]

        def padded(q, k, v, *, mask=mask, causal=causal, batch=batch, longest=longest):
            rows = []
            for t in (q, k, v):
                row = t.new_zeros(batch, longest, 12, 64)
                row[mask] = t
                rows.append(row.transpose(1, 2))
            seen = mask[:, None, None]
            if causal:
                seen = seen & torch.ones(longest, longest, device=mask.device, dtype=torch.bool).tril()
            return F.scaled_dot_product_attention(*rows, seen).transpose(1, 2)[mask]

        half = 2 if causal else 1
        yield Case(
            op="attention_varlen",
            name=f"{batch} rows to {longest}{' causal' if causal else ''}",
            inputs={"q": q, "k": k, "v": v},
            variants=ours(device, op) | {"sdpa padded": padded},
            reference=functools.partial(op, backend="reference"),
            flops=4.0 * 12 * 64 * float(lengths.double().square().sum()) / half,
            grads=("q", "k", "v"),
        )


# --- norms and softmax ----------------------------------------------------------------------------------------------


def norms(device: torch.device, dtype: torch.dtype, elements: int, widths: Sequence[int]) -> Iterator[Case]:
    """layer_norm and rms_norm, plain and with a residual."""
    for width in widths:
        for kind in ("layer_norm", "rms_norm"):
            for residual in (False, True):
                yield _norm(device, dtype, max(1, elements // width), width, kind, residual)


def _norm(device: torch.device, dtype: torch.dtype, rows: int, width: int, kind: str, residual: bool) -> Case:
    make = functools.partial(torch.randn, device=device, dtype=dtype)
    inputs = {"x": make(rows, width), "weight": make(width)}
    if kind == "layer_norm":
        inputs["bias"] = make(width)
    if residual:
        inputs["residual"] = make(rows, width)
    names = list(inputs)
    function = getattr(tf, kind)

    def op(*tensors: torch.Tensor, backend: str) -> torch.Tensor:
        named = {"bias": None, **dict(zip(names, tensors, strict=True))} if kind == "layer_norm" else None
        out = function(**(named or dict(zip(names, tensors, strict=True))), backend=backend)
        return out[0] if residual else out

    def plain(*tensors: torch.Tensor) -> torch.Tensor:
        t = dict(zip(names, tensors, strict=True))
        x = t["x"] + t["residual"] if residual else t["x"]
        if kind == "layer_norm":
            return F.layer_norm(x, (width,), t["weight"], t["bias"])
        return F.rms_norm(x, (width,), t["weight"], 1e-6)

    peers: dict[str, Function] = {"torch": plain, "compile": torch.compile(plain, dynamic=False)}
    skipped = {}
    if importlib.util.find_spec("liger_kernel") is None:
        skipped["liger"] = "the package liger_kernel is not installed"
    elif not residual:
        peers["liger"] = _liger(kind)
    return Case(
        op=kind,
        name=f"{rows}x{width}{' +residual' if residual else ''}",
        inputs=inputs,
        variants=ours(device, op) | peers,
        reference=functools.partial(op, backend="reference"),
        bytes=float(rows * width * inputs["x"].element_size() * (4 if residual else 2)),
        grads=names,
        skipped=skipped,
    )


def _liger(kind: str) -> Function:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if kind == "layer_norm":
        return lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-5)
    return lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)


def softmaxes(device: torch.device, dtype: torch.dtype, elements: int, widths: Sequence[int]) -> Iterator[Case]:
    """causal_softmax over square scores and over plain rows."""
    for width in widths:
        for causal in (False, True):
            heads = max(1, elements // width**2)
            scores = torch.randn(heads, width, width, device=device, dtype=dtype)

            def op(scores, *, causal=causal, backend):
                return tf.causal_softmax(scores, causal=causal, backend=backend)

            def plain(scores, *, causal=causal):
                if causal:
                    hidden = torch.ones(scores.shape[-2:], device=scores.device, dtype=torch.bool).triu(1)
                    scores = scores.masked_fill(hidden, -torch.inf)
                return torch.softmax(scores, -1)

            yield Case(
                op="causal_softmax",
                name=f"{heads}x{width}x{width}{' causal' if causal else ''}",
                inputs={"scores": scores},
                variants=ours(device, op) | {"torch": plain, "compile": torch.compile(plain, dynamic=False)},
                reference=functools.partial(op, backend="reference"),
                bytes=float(scores.numel() * scores.element_size()) * (1.5 if causal else 2),
                grads=("scores",),
            )


# --- feed-forward ---------------------------------------------------------------------------------------------------


def feed_forward(device: torch.device, dtype: torch.dtype, sizes: Sequence[tuple[int, int, int]]) -> Iterator[Case]:
    """linear_act and ffn (plain and gated) at (rows, d, d_ff)."""
    for rows, d, d_ff in sizes:
        make = functools.partial(torch.randn, device=device, dtype=dtype)
        x, w1, b1 = make(rows, d), make(d_ff, d) * d**-0.5, make(d_ff)
        w2, b2, w_gate = make(d, d_ff) * d_ff**-0.5, make(d), make(d_ff, d) * d**-0.5
        label = f"{rows}x{d}x{d_ff}"

        def linear(x, w, b, *, backend):
            return tf.linear_act(x, w, b, "gelu", backend=backend)

        def ffn(x, w1, b1, w2, b2, *, backend):
            return tf.ffn(x, w1, b1, w2, b2, activation="gelu", backend=backend)

        def gated(x, w1, w2, w_gate, *, backend):
            return tf.ffn(x, w1, None, w2, None, activation="silu", w_gate=w_gate, backend=backend)

        def plain_gated(x, w1, w2, w_gate):
            return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w1), w2)

        one = 2.0 * rows * d * d_ff
        for op, function, plain, inputs, flops in (
            ("linear_act gelu", linear, lambda x, w, b: F.gelu(F.linear(x, w, b)), {"x": x, "w": w1, "b": b1}, one),
            (
                "ffn gelu",
                ffn,
                lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
                {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2},
                2 * one,
            ),
            ("ffn swiglu", gated, plain_gated, {"x": x, "w1": w1, "w2": w2, "w_gate": w_gate}, 3 * one),
        ):
            yield Case(
                op=op,
                name=label,
                inputs=inputs,
                variants=ours(device, function) | {"torch": plain, "compile": torch.compile(plain, dynamic=False)},
                reference=functools.partial(function, backend="reference"),
                flops=flops,
                grads=list(inputs),
            )
