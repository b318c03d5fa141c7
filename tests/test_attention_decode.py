"""attention_decode: every row against its own valid keys, whatever stands after them in the cache."""

from __future__ import annotations

import pytest
import torch

from attention_cases import DTYPES, name_of
from conftest import skip_unless
from oracle import check
from transfuse import attention, attention_decode
from transfuse.ops.attention import registration, torch_sequences
from transfuse.ops.attention.variant import Variant

LENGTHS = {"mixed": [5, 19, 19, 0], "full": [24, 24], "equal": [12, 12, 12], "one": [7], "short": [1, 2], "none": []}
FEATURES = ["plain", "mask-bias", "alibi-window", "softcap-sinks", "mask-bias-alibi-window-softcap-sinks"]


@pytest.fixture(params=["run", "masked"])
def way(request, monkeypatch, backend):
    """The torch path's two ways: one call a run of equal lengths, or masked as inside a trace."""
    if backend != "torch" and request.param == "masked":
        pytest.skip("the torch path's choice")
    if request.param == "masked":
        monkeypatch.setattr(torch_sequences, "_transformed", lambda: True)
    return request.param


def make(lengths, q_len, dtype, device, feature, room=24):
    """(tensors, options); the caches hold NaN after their valid keys."""
    batch, heads, kv_heads = len(lengths), 4, 2
    tensors = {
        "q": torch.randn(batch, heads, q_len, 16, device=device).to(dtype),
        "k_cache": torch.randn(batch, kv_heads, room, 16, device=device).to(dtype),
        "v_cache": torch.randn(batch, kv_heads, room, 8, device=device).to(dtype),
    }
    for b, length in enumerate(lengths):
        for name in ("k_cache", "v_cache"):
            tensors[name][b, :, length:] = torch.nan
    if "mask" in feature:
        tensors["mask"] = torch.rand(batch, 1, q_len, room, device=device) > 0.3
    if "bias" in feature:
        tensors["bias"] = torch.randn(1, heads, 1, room, device=device).to(dtype)
    if "alibi" in feature:
        tensors["alibi_slopes"] = torch.rand(heads, device=device) / 4
    if "sinks" in feature:
        tensors["sinks"] = torch.randn(heads, device=device)
    options = {"cache_lengths": torch.tensor(lengths, dtype=torch.int32, device=device)}
    if "window" in feature:
        options["window"] = (5, 2)
    if "softcap" in feature:
        options["softcap"] = 1.5
    return tensors, options


def supported(backend, tensors):
    q, k, v = (tensors[n] for n in ("q", "k_cache", "v_cache"))
    skip_unless(registration.why_not(backend, "attention_decode", q, k, v, Variant()))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("causal", [False, True], ids=str)
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_values_and_gradients(case, q_len, causal, feature, dtype, way, backend, device, poisoned):
    if dtype != torch.float32 and case not in (("mixed", "full") if backend == "torch" else ("mixed",)):
        pytest.skip("these lengths differ in indexing alone")
    if backend != "torch" and case != "mixed" and feature not in (FEATURES[0], FEATURES[-1]):
        pytest.skip("each feature by itself is tested with mixed lengths")
    tensors, options = make(LENGTHS[case], q_len, dtype, device, feature)
    supported(backend, tensors)
    grads = [n for n, t in tensors.items() if t.is_floating_point()]
    sizes = {f"d{n}": 40.0 for n in tensors}  # gradients are sums of terms of order one, which cancel
    if dtype != torch.float32:
        grads = ["q", "k_cache", "v_cache"]  # sums of few elements are judged in fp32 alone
        sizes["lse"] = 4 * torch.finfo(dtype).eps / 2 / (8 * torch.finfo(torch.float32).eps)
        sizes.update({f"d{n}": sizes["lse"] for n in grads})
    if backend != "torch" and (case not in ("mixed", "none") or q_len == 1 or causal):
        grads = []  # the backward kernels are test_attention's; here only where their rows end
    check(
        lambda **kw: attention_decode(**kw, backend=backend, return_lse=True),
        lambda **kw: attention_decode(**kw, backend="reference", return_lse=True),
        tensors,
        grads=grads,
        names=("out", "lse"),
        sizes=sizes,
        causal=causal,
        **options,
    )


@pytest.mark.parametrize("causal", [False, True, "lower_right"], ids=str)
def test_equals_attention_over_the_valid_keys(causal, way, backend, device):
    tensors, options = make([9, 17], 2, torch.float32, device, "plain")
    supported(backend, tensors)
    out = attention_decode(**tensors, **options, causal=causal, window=(4, 0), backend=backend)
    for b, length in enumerate([9, 17]):
        k, v = (tensors[n][b : b + 1, :, :length] for n in ("k_cache", "v_cache"))
        expected = attention(tensors["q"][b : b + 1], k, v, causal="lower_right", window=(4, 0))
        torch.testing.assert_close(out[b : b + 1], expected)


def test_the_cache_grows_as_decoding_goes(way, backend, device):
    # one token at a time gives what all of them at once give
    q, k, v = (torch.randn(2, 4, 12, 16, device=device) for _ in range(3))
    supported(backend, {"q": q, "k_cache": k, "v_cache": v})
    whole = attention(q, k, v, causal=True)
    caches = [torch.full((2, 4, 20, 16), torch.nan, device=device) for _ in range(2)]
    for i in range(12):
        caches[0][:, :, i], caches[1][:, :, i] = k[:, :, i], v[:, :, i]
        lengths = torch.full((2,), i + 1, device=device)
        out = attention_decode(q[:, :, i : i + 1], *caches, lengths, causal=True, backend=backend)
        torch.testing.assert_close(out, whole[:, :, i : i + 1])


def test_a_transposed_cache(way, backend, device):
    tensors, options = make([9, 17], 1, torch.float32, device, "plain")
    supported(backend, tensors)
    expected = attention_decode(**tensors, **options, backend=backend)
    for name in ("k_cache", "v_cache"):  # (batch, room, heads, dim) in memory
        tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(attention_decode(**tensors, **options, backend=backend), expected)


def test_autocast():
    tensors, options = make([9, 17], 1, torch.float32, "cpu", "plain")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention_decode(**tensors, **options)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention_decode(**{n: t.bfloat16() for n, t in tensors.items()}, **options))
