"""scaled_dot_product_attention against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attention_cases import quick_interpreted
from conftest import skip_unless
from oracle import judge
from transfuse import scaled_dot_product_attention
from transfuse.ops.attention import registration
from transfuse.ops.attention.variant import Variant

CASES = {
    "2d": ((5, 8), (7, 8), (7, 6)),
    "3d": ((3, 5, 8), (3, 7, 8), (3, 7, 6)),
    "4d": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "5d": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8)),
    "one_key_head": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "shared_batch": ((2, 4, 5, 8), (1, 4, 7, 8), (2, 1, 7, 8)),
    "no_batch": ((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 8)),
    "no_query": ((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "no_key": ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8)),
}
GROUPED = {
    "3d": ((4, 5, 8), (2, 7, 8), (2, 7, 8)),
    "4d": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
    "5d": ((2, 3, 4, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 8)),
}
MASKS = {
    "none": lambda lead, m, n: {},
    "causal": lambda lead, m, n: {"is_causal": True},
    "bool": lambda lead, m, n: {"attn_mask": torch.rand(m, n) > 0.3},
    "keys": lambda lead, m, n: {"attn_mask": torch.randn(n)},
    "one_column": lambda lead, m, n: {"attn_mask": torch.randn(m, 1)},
    "lead": lambda lead, m, n: {"attn_mask": torch.randn(*lead, m, n)},
    "first_lead": lambda lead, m, n: {"attn_mask": torch.randn(*lead[:1], *(1 for _ in lead[1:]), m, n)},
}


def compare(shapes, backend, device, **options):
    """Output and gradients of out^2 against torch's own in fp64, judged by what torch's own makes of them in fp32."""
    q, k, v = (torch.randn(s, device=device) for s in shapes)
    skip_unless(registration.why_not(backend, "attention", q, k, v, Variant()))
    options = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    mask = options.get("attn_mask")
    inputs = [q, k, v, mask] if mask is not None and mask.is_floating_point() else [q, k, v]

    def run(function, dtype, **more):
        leaves = [t.to(dtype).clone().requires_grad_() for t in inputs]
        out = function(*leaves[:3], **options | ({"attn_mask": leaves[3]} if len(leaves) > 3 else {}), **more)
        # on empty tensors torch's own does not use the mask
        grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        return [t.detach() for t in (out, *grads)]

    got = run(scaled_dot_product_attention, torch.float32, backend=backend)
    truth, plain = (
        run(F.scaled_dot_product_attention, torch.float64),
        run(F.scaled_dot_product_attention, torch.float32),
    )
    sizes = [0.0, *sizes_of_terms([t.double() for t in inputs], truth[0], options)]
    names = ("out", "dq", "dk", "dv", "dmask")
    verdicts = [
        judge(n, g, t.cpu(), p, size) for n, g, t, p, size in zip(names, got, truth, plain, sizes, strict=False)
    ]
    assert all(v.ok for v in verdicts), verdicts


def sizes_of_terms(inputs, out, options):
    """The largest sum of magnitudes that a gradient is made of: the terms may cancel."""
    q, k, v = inputs[:3]
    n, group = k.shape[-2], q.shape[-3] // k.shape[-3] if options.get("enable_gqa") else 1
    if not out.numel() or not n:
        return [0.0] * len(inputs)
    added = {"attn_mask": inputs[3].expand(*out.shape[:-1], n)} if len(inputs) > 3 else {}
    p = F.scaled_dot_product_attention(q, k, torch.eye(n, dtype=q.dtype, device=q.device).expand(*k.shape[:-1], n),
                                       **options | added)  # fmt: skip
    leaves = [t.abs().requires_grad_() for t in inputs]
    every = [leaves[0], *(t.repeat_interleave(group, -3) if group > 1 else t for t in leaves[1:3])]
    v = v.repeat_interleave(group, -3) if group > 1 else v
    ds = p * ((2 * out @ v.mT).abs() + (2 * out * out).sum(-1, keepdim=True))
    scale = options.get("scale") or q.shape[-1] ** -0.5
    total = (ds * scale * (every[0] @ every[1].mT)).sum() + (p * (2 * out.abs() @ every[2].mT)).sum()
    total = total + (ds * leaves[3]).sum() if added else total
    return [g.max().item() for g in torch.autograd.grad(total, leaves)]


@quick_interpreted(lambda p: p["case"] == "shared_batch" or p["mask"] == "first_lead")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_as_torch(case, mask, backend, device):
    shapes = CASES[case]
    lead = torch.broadcast_shapes(*(s[:-2] for s in shapes))
    compare(shapes, backend, device, **MASKS[mask](lead, shapes[0][-2], shapes[1][-2]))


@quick_interpreted(lambda p: p["mask"] == "lead")
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "lead"])
@pytest.mark.parametrize("case", GROUPED)
def test_fewer_key_heads(case, mask, backend, device):
    shapes = GROUPED[case]
    options = MASKS[mask](shapes[0][:-2], shapes[0][-2], shapes[1][-2])
    compare(shapes, backend, device, **options, enable_gqa=True, scale=0.7)


def test_a_hidden_row_is_zero_with_finite_gradients(backend, device):
    q, k, v = (torch.randn(2, 4, 5, 8, device=device, requires_grad=True) for _ in range(3))
    skip_unless(registration.why_not(backend, "attention", q, k, v, Variant()))
    mask = torch.ones(5, 5, dtype=torch.bool, device=device)
    mask[2] = False
    for attn_mask in (mask, torch.zeros(5, 5, device=device).masked_fill(~mask, -torch.inf)):
        out = scaled_dot_product_attention(q, k, v, attn_mask, backend=backend)
        assert out[:, :, 2].eq(0).all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_dropout_applies_whoever_calls(backend, device):
    q = torch.randn(1, 1, 64, 64, device=device)
    skip_unless(registration.why_not(backend, "attention", q, q, q, Variant(dropout_p=0.5)))
    out = scaled_dot_product_attention(q, q, torch.eye(64, device=device)[None, None], dropout_p=0.5, backend=backend)
    assert 0.4 < out.eq(0).float().mean() < 0.6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
def test_other_dtypes(dtype):
    q, k, v = (torch.randn(2, 4, 33, 16).to(dtype) for _ in range(3))
    with torch.no_grad():
        assert torch.equal(scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
