"""What the attention ops say when they are called wrongly: one clear error each."""

from __future__ import annotations

import pytest
import torch

from transfuse import (
    attention,
    attention_decode,
    attention_varlen,
    attention_weights,
    scaled_dot_product_attention,
    use_backend,
)
from transfuse.errors import ArgumentError, BackendError, DeviceError, DtypeError

Q, K, V = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
P, PK, PV = torch.randn(6, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 6)
ENDS, K_ENDS = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
LENGTHS = torch.tensor([7, 3])


def dense(q=Q, k=K, v=V, **options):
    return lambda: attention(q, k, v, **options)


def packed(q=P, k=PK, v=PV, ends=ENDS, k_ends=K_ENDS, max_q=4, max_k=5, **options):
    return lambda: attention_varlen(q, k, v, ends, k_ends, max_q, max_k, **options)


def decode(q=Q[:, :, :2], k=K, v=V, lengths=LENGTHS, **options):
    return lambda: attention_decode(q, k, v, lengths, **options)


def as_torch(q=Q, k=K, v=V, *rest, **options):
    return lambda: scaled_dot_product_attention(q, k, v, *rest, **options)


def test_the_calls_below_are_right_but_for_their_mistake():
    for call in (dense(), packed(), decode(), as_torch(enable_gqa=True)):
        call()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (dense(q=Q.to_sparse()), DtypeError, "attention: q must be a dense tensor, got layout torch.sparse_coo"),
        (dense(window=(float("inf"), 0)), ArgumentError, r"window must be two integers .*got \(inf, 0\)"),
        (dense(softcap="a"), ArgumentError, "softcap must be positive and finite, got 'a'"),
        (dense(scale="a"), ArgumentError, "scale must be a finite number, got 'a'"),
        (dense(dropout_p=None), ArgumentError, "dropout_p must be at least 0 and below 1, got None"),
        (packed(max_q=None), ArgumentError, "max_q must be an integer of at least 0, got None"),
        (as_torch(Q, K, V, "x"), DtypeError, "scaled_dot_product_attention: attn_mask must be a tensor, got str"),
        (
            as_torch(Q, K, V, torch.randn(5, 5), enable_gqa=True),
            ArgumentError,
            r"scaled_dot_product_attention: attn_mask must broadcast to shape \(2, 4, 5, 7\), got \(5, 5\)",
        ),
        (dense(q=[1.0]), DtypeError, "attention: q must be a tensor, got list"),
        (dense(k=None), DtypeError, "attention: k must be a tensor, got NoneType"),
        (dense(q=Q.int()), DtypeError, "q must be float32, .* got int32"),
        (dense(k=K.half()), DtypeError, r"attention: k must be float32 \(q's dtype\), got float16"),
        (dense(v=V.double()), DtypeError, "v must be float32 .*got float64"),
        (dense(v=V.to("meta")), DeviceError, "v must be on cpu like q, got meta"),
        (dense(q=Q[0]), ArgumentError, r"q must have shape \(batch, heads, q_len, head_dim\), got \(4, 5, 8\)"),
        (dense(k=K[..., :7]), ArgumentError, r"k must have shape \(2, kv_heads, k_len, 8\) .*got \(2, 2, 7, 7\)"),
        (dense(k=K[:1]), ArgumentError, r"k must have shape \(2, kv_heads, k_len, 8\) .*got \(1, 2, 7, 8\)"),
        (dense(v=V[:, :, :6]), ArgumentError, r"v must have shape \(2, 2, 7, v_head_dim\) like k, got \(2, 2, 6, 6\)"),
        (
            dense(k=torch.randn(2, 3, 7, 8), v=torch.randn(2, 3, 7, 6)),
            ArgumentError,
            "q's 4 heads must be a multiple of k's heads, got 3",
        ),
        (dense(causal="upper"), ArgumentError, "causal must be False, True or 'lower_right', got 'upper'"),
        (dense(mask=torch.ones(5, 7)), DtypeError, "mask must be a bool tensor, True = attend, got float32.*bias"),
        (dense(mask=True), DtypeError, "mask must be a bool tensor.*got bool"),
        (
            dense(mask=torch.ones(5, 6, dtype=torch.bool)),
            ArgumentError,
            r"mask must broadcast to shape \(2, 4, 5, 7\), got \(5, 6\)",
        ),
        (dense(mask=torch.ones(7, dtype=torch.bool, device="meta")), DeviceError, "mask must be on cpu like q"),
        (dense(bias=torch.ones(5, 7).int()), DtypeError, "bias must be float32.*got int32"),
        (dense(bias=torch.ones(5, 7).half()), DtypeError, "bias must be float32 .*got float16"),
        (dense(bias=torch.ones(1, 2, 4, 5, 7)), ArgumentError, r"bias must broadcast to shape \(2, 4, 5, 7\)"),
        (
            dense(alibi_slopes=torch.ones(3)),
            ArgumentError,
            r"alibi_slopes must have shape \(4,\) or \(2, 4\), got \(3,\)",
        ),
        (dense(sinks=torch.ones(2, 4)), ArgumentError, r"sinks must have shape \(4,\), got \(2, 4\)"),
        (dense(sinks=torch.ones(4, dtype=torch.int64)), DtypeError, "sinks must be float32"),
        (dense(window=(-2, 0)), ArgumentError, r"window must be two integers .*, got \(-2, 0\)"),
        (dense(window=4), ArgumentError, "window must be two integers .*, got 4"),
        (dense(window=(1.5, 0)), ArgumentError, "window must be two integers"),
        (dense(softcap=0.0), ArgumentError, "softcap must be positive and finite, got 0.0"),
        (dense(softcap=float("nan")), ArgumentError, "softcap must be positive and finite, got nan"),
        (dense(scale=float("inf")), ArgumentError, "scale must be a finite number, got inf"),
        (dense(dropout_p=1.0), ArgumentError, "dropout_p must be at least 0 and below 1, got 1.0"),
        (dense(dropout_p=-0.1), ArgumentError, "dropout_p must be at least 0 and below 1, got -0.1"),
        (dense(backend="tpu"), BackendError, "unknown backend 'tpu': expected one of cuda, triton, torch, reference"),
        (
            lambda: attention_weights(Q, K, torch.zeros(2, 4, 6)),
            ArgumentError,
            r"attention_weights: lse must have shape \(2, 4, 5\), got \(2, 4, 6\)",
        ),
        (packed(q=Q), ArgumentError, r"attention_varlen: q must have shape \(total_q, heads, head_dim\), got"),
        (packed(k=PK[..., :7]), ArgumentError, r"k must have shape \(total_k, kv_heads, 8\), got \(9, 2, 7\)"),
        (packed(v=PV[:8]), ArgumentError, r"v must have shape \(9, 2, v_head_dim\) like k, got \(8, 2, 6\)"),
        (packed(ends=ENDS.float()), DtypeError, "cu_seqlens_q must be an int32 or int64 tensor, got float32"),
        (packed(k_ends=[0, 4, 9]), DtypeError, "cu_seqlens_k must be an int32 or int64 tensor, got list"),
        (packed(ends=ENDS.to("meta")), DeviceError, "cu_seqlens_q must be on cpu like q, got meta"),
        (packed(ends=ENDS[:2]), ArgumentError, r"cu_seqlens_k must have shape \(2,\) like cu_seqlens_q, got \(3,\)"),
        (packed(ends=ENDS[None]), ArgumentError, r"cu_seqlens_q must have shape \(batch \+ 1,\), got \(1, 3\)"),
        (packed(ends=ENDS + 1), ArgumentError, r"cu_seqlens_q must start at 0, .* got \[1, 3, 7\]"),
        (packed(k_ends=K_ENDS + torch.tensor([0, 0, 1])), ArgumentError, r"end at 9 \(k's rows\) at most"),
        (packed(ends=torch.tensor([0, 4, 3])), ArgumentError, "never fall"),
        (packed(max_q=3), ArgumentError, "max_q must be at least the longest sequence of cu_seqlens_q, 4, got 3"),
        (packed(max_k=-1), ArgumentError, "max_k must be an integer of at least 0, got -1"),
        (
            packed(mask=torch.ones(2, 1, 4, 4, dtype=torch.bool)),
            ArgumentError,
            r"mask must broadcast to shape \(2, 4, 4, 5\)",
        ),
        (decode(lengths=torch.tensor([7.0, 3.0])), DtypeError, "cache_lengths must be an int32 or int64 tensor"),
        (decode(lengths=torch.tensor([7])), ArgumentError, r"cache_lengths must have shape \(2,\), got \(1,\)"),
        (decode(lengths=torch.tensor([8, 3])), ArgumentError, r"cache_lengths must be from 0 to 7 .*, got 8"),
        (decode(lengths=torch.tensor([-1, 3])), ArgumentError, r"cache_lengths must be from 0 to 7 .*, got -1"),
        (decode(k=K.half()), DtypeError, "attention_decode: k_cache must be float32"),
        (decode(v=V[:, :1]), ArgumentError, r"v_cache must have shape \(2, 2, 7, v_head_dim\) like k_cache"),
        (
            as_torch(Q, Q, Q, torch.ones(5, 5).bool(), 0.0, True),
            ArgumentError,
            "attn_mask and is_causal exclude each other.*transfuse.attention",
        ),
        (as_torch(), ArgumentError, r"leading dimensions of query, key and value must broadcast.*enable_gqa=True"),
        (as_torch(Q[0, 0, 0]), ArgumentError, r"query must have at least two dimensions, got \(8,\)"),
        (as_torch(Q, Q, Q, torch.ones(5, 6)), ArgumentError, r"must broadcast to shape \(2, 4, 5, 5\), got \(5, 6\)"),
        (as_torch(Q[0, 0], Q[0, 0], Q[0, 0], enable_gqa=True), ArgumentError, "enable_gqa needs a dimension of heads"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_backend_without_a_kernel_says_so():
    exact = (Q.double(), K.double(), V.double())
    with pytest.raises(BackendError, match=r"attention: backend 'triton' cannot run this call: .*float64.*\("):
        attention(*exact, backend="triton")
    with use_backend("cuda"), pytest.raises(BackendError, match="attention_decode: backend 'cuda' cannot run"):
        attention_decode(exact[0][:, :, :1], *exact[1:], LENGTHS)
