"""attention_varlen: every sequence by itself, whatever lies in the padding."""

from __future__ import annotations

import itertools

import pytest
import torch

from attention_cases import DTYPES, name_of, quick_interpreted
from conftest import skip_unless
from oracle import check
from transfuse import attention, attention_varlen
from transfuse.ops.attention import registration, torch_sequences
from transfuse.ops.attention.variant import Variant

LENGTHS = {
    "mixed": ([3, 3, 0, 15], [14, 14, 6, 5]),
    "one": ([1], [17]),
    "no_keys": ([2, 0, 2], [0, 3, 2]),
    "equal": ([8, 8, 8], [8, 8, 8]),
    "self": ([7, 1, 30], [7, 1, 30]),
    "nothing": ([], []),
    "empty_rows": ([0, 0], [0, 0]),
}
FEATURES = ["plain", "mask-bias", "alibi-window", "softcap-sinks", "mask-bias-alibi-window-softcap-sinks"]


def ends(lengths, device="cpu", dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], device=device, dtype=dtype)


def make(lengths, dtype, device, feature, poison=float("nan")):
    """(tensors, options): packed rows with two or three more that belong to no sequence."""
    q_lengths, k_lengths = lengths
    batch, heads, kv_heads = len(q_lengths), 4, 2
    longest_q, longest_k = max(q_lengths, default=0), max(k_lengths, default=0)
    sizes = {
        "q": (sum(q_lengths), 2, heads, 16),
        "k": (sum(k_lengths), 3, kv_heads, 16),
        "v": (sum(k_lengths), 3, kv_heads, 8),
    }
    tensors = {}
    for name, (total, extra, h, d) in sizes.items():
        x = torch.randn(total + extra, h, d, device=device).to(dtype)
        x[total:] = poison
        tensors[name] = x
    if "mask" in feature:
        tensors["mask"] = torch.rand(batch, 1, longest_q, longest_k, device=device) > 0.3
    if "bias" in feature:
        tensors["bias"] = torch.randn(batch, heads, 1, longest_k, device=device).to(dtype)
    if "alibi" in feature:
        tensors["alibi_slopes"] = torch.rand(batch, heads, device=device) / 4
    if "sinks" in feature:
        tensors["sinks"] = torch.randn(heads, device=device)
    options = {
        "cu_seqlens_q": ends(q_lengths, device),
        "cu_seqlens_k": ends(k_lengths, device),
        "max_q": longest_q,
        "max_k": longest_k,
    }
    if "window" in feature:
        options["window"] = (5, 2)
    if "softcap" in feature:
        options["softcap"] = 1.5
    return tensors, options


def supported(backend, tensors):
    q, k, v = (tensors[n] for n in "qkv")
    skip_unless(registration.why_not(backend, "attention_varlen", q, k, v, Variant()))


@pytest.fixture(params=["run", "padded"])
def way(request, monkeypatch, backend):
    """The torch path's two ways: one call a run of equal lengths, or padded and masked as inside a trace."""
    if backend != "torch" and request.param == "padded":
        pytest.skip("the torch path's choice")
    if request.param == "padded":
        monkeypatch.setattr(torch_sequences, "_transformed", lambda: True)
    return request.param


@quick_interpreted(
    # each feature, alignment, kind of lengths and dtype
    lambda p: (
        (p["case"] == "mixed" and p["feature"] == FEATURES[-1])
        or (
            p["dtype"] == torch.float32
            and p["causal"] == "lower_right"
            and (p["case"] == "mixed" or p["feature"] == "plain")
        )
    )
)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("causal", [False, True, "lower_right"], ids=str)
@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_values_and_gradients(case, causal, feature, dtype, way, backend, device, poisoned):
    if dtype != torch.float32 and case not in ("mixed", "self"):
        pytest.skip("these lengths differ in indexing alone")
    tensors, options = make(LENGTHS[case], dtype, device, feature)
    supported(backend, tensors)
    grads = [n for n, t in tensors.items() if t.is_floating_point()]
    if dtype != torch.float32:  # sums of few elements: judged in fp32 alone
        grads = [n for n in grads if n in "qkv"]
    check(
        lambda **kw: attention_varlen(**kw, backend=backend, return_lse=True),
        lambda **kw: attention_varlen(**kw, backend="reference", return_lse=True),
        tensors,
        grads=grads,
        names=("out", "lse"),
        sizes=sizes(tensors, dtype),
        causal=causal,
        **options,
    )


def sizes(tensors, dtype):
    """Gradients are sums over a whole sequence of terms of order one, which cancel; lse is rounded to dtype by luck."""
    rows = tensors["q"].shape[0]
    found = {f"d{n}": 4.0 * rows for n in ("bias", "alibi_slopes", "sinks")}
    found.update({f"d{n}": 8.0 for n in "qkv"})
    if dtype != torch.float32:
        found["lse"] = 4 * torch.finfo(dtype).eps / 2 / (8 * torch.finfo(torch.float32).eps)
    return found


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=name_of)
def test_equals_one_call_a_sequence(dtype, way, backend, device):
    lengths = [5, 9, 2]
    tensors, options = make((lengths, lengths), torch.float32, device, "plain")
    supported(backend, tensors)
    options.update(cu_seqlens_q=ends(lengths, device, dtype), cu_seqlens_k=ends(lengths, device, dtype))
    out, lse = attention_varlen(**tensors, **options, causal=True, return_lse=True, backend=backend)
    low = 0
    for length in lengths:
        rows = slice(low, low + length)
        q, k, v = (tensors[n][rows].transpose(0, 1)[None] for n in "qkv")
        expected, expected_lse = attention(q, k, v, causal=True, return_lse=True)
        torch.testing.assert_close(out[rows].transpose(0, 1)[None], expected)
        torch.testing.assert_close(lse[None, :, rows], expected_lse)
        low += length
    assert out[low:].eq(0).all()
    assert lse[:, low:].eq(-torch.inf).all()


def test_strides(way, backend, device):
    # q, k and v interleaved as one projection leaves them
    qkv = torch.randn(12, 3, 4, 16, device=device, requires_grad=True)
    bounds = ends([5, 7], device)
    q, k, v = qkv.unbind(1)
    supported(backend, {"q": q, "k": k, "v": v})
    out = attention_varlen(q, k, v, bounds, bounds, 7, 7, backend=backend)
    same = attention_varlen(*(x.contiguous() for x in (q, k, v)), bounds, bounds, 7, 7, backend="reference")
    torch.testing.assert_close(out, same)
    (got,) = torch.autograd.grad(out.square().sum(), qkv)
    (expected,) = torch.autograd.grad(same.square().sum(), qkv)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_larger_maxima_are_fine(way, backend, device):
    tensors, options = make(LENGTHS["mixed"], torch.float32, device, "plain")
    supported(backend, tensors)
    out = attention_varlen(**tensors, **options, backend=backend)
    options.update(max_q=40, max_k=50)
    torch.testing.assert_close(attention_varlen(**tensors, **options, backend=backend), out)


def test_dropout_follows_the_seed(way, backend, device):
    tensors, options = make(LENGTHS["self"], torch.float32, device, "plain")
    supported(backend, tensors)

    def draw(seed):
        torch.manual_seed(seed)
        return attention_varlen(**tensors, **options, dropout_p=0.5, backend=backend)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_autocast():
    tensors, options = make(LENGTHS["self"], torch.float32, "cpu", "plain")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention_varlen(**tensors, **options)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention_varlen(**{n: t.bfloat16() for n, t in tensors.items()}, **options))
