"""The calls that the demo checks: each op with inputs, and what a PyTorch user would write instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from transfuse import ops

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One op and its inputs.

    Attributes:
        name, shape: for the table.
        tensors: named inputs; the floating-point ones get gradients.
        op: the call of the op, given the tensors and the ``backend=`` argument; gives one tensor.
        torch_op: the same in plain PyTorch.
        output_shape: of what both give.
    """

    name: str
    shape: str
    tensors: Tensors
    op: Callable[[Tensors, str | None], torch.Tensor]
    torch_op: Callable[[Tensors], torch.Tensor]
    output_shape: tuple[int, ...]


def cases(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Case]:
    """Every op once, on seeded normal inputs.

    >>> [case.name for case in cases(torch.device("cpu"), torch.float32, seed=0)][:3]
    ['attention', 'attention_varlen', 'attention_decode']
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    yield _attention(normal)
    yield _attention_varlen(normal, device)
    yield _attention_decode(normal, device)
    yield _attention_weights(normal)
    yield _scaled_dot_product_attention(normal, device)
    yield _causal_softmax(normal)
    yield _layer_norm(normal)
    yield _rms_norm(normal)
    yield _ffn(normal)
    yield _linear_act(normal)


Normal = Callable[..., torch.Tensor]


def _attention(normal: Normal) -> Case:
    # Grouped queries, causal, a bias of one head's size with its gradient.
    batch, heads, kv_heads, length, dim = 2, 8, 2, 256, 64
    tensors = {
        "q": normal(batch, heads, length, dim),
        "k": normal(batch, kv_heads, length, dim),
        "v": normal(batch, kv_heads, length, dim),
        "bias": normal(1, heads, length, length),
    }
    hidden = torch.ones(length, length, dtype=torch.bool, device=tensors["q"].device).triu(1)

    def op(t: Tensors, backend: str | None) -> torch.Tensor:
        return ops.attention(t["q"], t["k"], t["v"], causal=True, bias=t["bias"], backend=backend)

    def plain(t: Tensors) -> torch.Tensor:
        mask = t["bias"].masked_fill(hidden, -math.inf).expand(batch, -1, -1, -1)
        return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], attn_mask=mask, enable_gqa=True)

    return Case(
        "attention", f"B{batch} H{heads}/{kv_heads} L{length} D{dim}", tensors, op, plain, (batch, heads, length, dim)
    )


def _attention_varlen(normal: Normal, device: torch.device) -> Case:
    lengths, heads, dim = [200, 31, 117, 64, 100], 4, 64
    total, longest = sum(lengths), max(lengths)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    tensors = {name: normal(total, heads, dim) for name in ("q", "k", "v")}

    def op(t: Tensors, backend: str | None) -> torch.Tensor:
        return ops.attention_varlen(t["q"], t["k"], t["v"], ends, ends, longest, longest, causal=True, backend=backend)

    def plain(t: Tensors) -> torch.Tensor:
        outs = []
        for q, k, v in zip(*(t[name].transpose(0, 1)[None].split(lengths, 2) for name in ("q", "k", "v")), strict=True):
            outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return torch.cat(outs, 2)[0].transpose(0, 1)

    return Case("attention_varlen", f"{len(lengths)} rows, {total} tokens", tensors, op, plain, (total, heads, dim))


def _attention_decode(normal: Normal, device: torch.device) -> Case:
    batch, heads, kv_heads, room, dim = 4, 8, 2, 512, 64
    lengths = torch.tensor([512, 77, 300, 40], dtype=torch.int32, device=device)
    tensors = {
        "q": normal(batch, heads, 1, dim),
        "k": normal(batch, kv_heads, room, dim),
        "v": normal(batch, kv_heads, room, dim),
    }
    valid = torch.arange(room, device=device) < lengths[:, None, None, None]

    def op(t: Tensors, backend: str | None) -> torch.Tensor:
        return ops.attention_decode(t["q"], t["k"], t["v"], lengths, causal=True, backend=backend)

    def plain(t: Tensors) -> torch.Tensor:
        return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], attn_mask=valid, enable_gqa=True)

    return Case(
        "attention_decode", f"B{batch} H{heads}/{kv_heads} L{room} D{dim}", tensors, op, plain, (batch, heads, 1, dim)
    )


def _attention_weights(normal: Normal) -> Case:
    batch, heads, length, dim = 2, 8, 128, 64
    q, k, v = (normal(batch, heads, length, dim) for _ in range(3))
    lse = ops.attention(q, k, v, causal=True, return_lse=True, backend="reference")[1]
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)

    def op(t: Tensors, backend: str | None) -> torch.Tensor:
        return ops.attention_weights(t["q"], t["k"], t["lse"], causal=True, backend=backend)

    def plain(t: Tensors) -> torch.Tensor:
        return (t["q"] @ t["k"].mT / math.sqrt(dim)).masked_fill(hidden, -math.inf).softmax(-1)

    tensors = {"q": q, "k": k, "lse": lse}
    return Case(
        "attention_weights", f"B{batch} H{heads} L{length} D{dim}", tensors, op, plain, (batch, heads, length, length)
    )


def _scaled_dot_product_attention(normal: Normal, device: torch.device) -> Case:
    batch, heads, length, dim = 2, 8, 256, 64
    tensors = {name: normal(batch, heads, length, dim) for name in ("q", "k", "v")}
    padding = (torch.arange(length, device=device) < torch.tensor([length, 100], device=device)[:, None])[:, None, None]

    def op(t: Tensors, backend: str | None) -> torch.Tensor:
        # torch's own signature has no backend argument
        if backend is None:
            return ops.scaled_dot_product_attention(t["q"], t["k"], t["v"], attn_mask=padding)
        return ops.attention(t["q"], t["k"], t["v"], mask=padding, backend=backend)

    def plain(t: Tensors) -> torch.Tensor:
        return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], attn_mask=padding)

    return Case(
        "scaled_dot_product_attention",
        f"B{batch} H{heads} L{length} D{dim}",
        tensors,
        op,
        plain,
        (batch, heads, length, dim),
    )


def _causal_softmax(normal: Normal) -> Case:
    shape, scale = (2, 8, 256, 256), 0.125
    hidden: dict[torch.device, torch.Tensor] = {}

    def op(t: Tensors, backend: str | None) -> torch.Tensor:
        return ops.causal_softmax(t["scores"], scale=scale, backend=backend)

    def plain(t: Tensors) -> torch.Tensor:
        scores = t["scores"]
        if scores.device not in hidden:
            hidden[scores.device] = torch.ones(shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return (scores * scale).masked_fill(hidden[scores.device], -math.inf).softmax(-1)

    return Case("causal_softmax", "B2 H8 L256", {"scores": normal(*shape, scale=8.0)}, op, plain, shape)


def _layer_norm(normal: Normal) -> Case:
    rows, hidden = 256, 768
    tensors = {"x": normal(rows, hidden), "r": normal(rows, hidden), "w": normal(hidden), "b": normal(hidden)}

    def op(t: Tensors, backend: str | None) -> torch.Tensor:
        y, summed = ops.layer_norm(t["x"], t["w"], t["b"], residual=t["r"], backend=backend)
        return y + summed

    def plain(t: Tensors) -> torch.Tensor:
        summed = t["x"] + t["r"]
        return F.layer_norm(summed, (hidden,), t["w"], t["b"]) + summed

    return Case("layer_norm", f"{rows} x {hidden}, residual", tensors, op, plain, (rows, hidden))


def _rms_norm(normal: Normal) -> Case:
    rows, hidden = 256, 768
    tensors = {"x": normal(rows, hidden), "r": normal(rows, hidden), "w": normal(hidden)}

    def op(t: Tensors, backend: str | None) -> torch.Tensor:
        y, summed = ops.rms_norm(t["x"], t["w"], residual=t["r"], backend=backend)
        return y + summed

    def plain(t: Tensors) -> torch.Tensor:
        summed = t["x"] + t["r"]
        return F.rms_norm(summed, (hidden,), t["w"], 1e-6) + summed

    return Case("rms_norm", f"{rows} x {hidden}, residual", tensors, op, plain, (rows, hidden))


def _ffn(normal: Normal) -> Case:
    rows, d, d_ff = 256, 256, 704
    tensors = {
        "x": normal(rows, d),
        "w1": normal(d_ff, d, scale=d**-0.5),
        "w2": normal(d, d_ff, scale=d_ff**-0.5),
        "w_gate": normal(d_ff, d, scale=d**-0.5),
    }

    def op(t: Tensors, backend: str | None) -> torch.Tensor:
        return ops.ffn(t["x"], t["w1"], None, t["w2"], None, activation="silu", w_gate=t["w_gate"], backend=backend)

    def plain(t: Tensors) -> torch.Tensor:
        return F.linear(F.silu(F.linear(t["x"], t["w_gate"])) * F.linear(t["x"], t["w1"]), t["w2"])

    return Case("ffn", f"{rows} x {d} -> {d_ff}, SwiGLU", tensors, op, plain, (rows, d))


def _linear_act(normal: Normal) -> Case:
    rows, d, d_out = 256, 256, 1024
    tensors = {"x": normal(rows, d), "w": normal(d_out, d, scale=d**-0.5), "b": normal(d_out)}

    def op(t: Tensors, backend: str | None) -> torch.Tensor:
        return ops.linear_act(t["x"], t["w"], t["b"], "gelu", backend=backend)

    def plain(t: Tensors) -> torch.Tensor:
        return F.gelu(F.linear(t["x"], t["w"], t["b"]))

    return Case("linear_act", f"{rows} x {d} -> {d_out}, GELU", tensors, op, plain, (rows, d_out))
