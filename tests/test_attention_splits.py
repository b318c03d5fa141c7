"""Few queries over many keys in kernels: split over keys or not, one result, and no key too many is read."""

from __future__ import annotations

import importlib

import pytest
import torch

from attention_cases import DTYPES, name_of
from oracle import judge, to_fp64
from transfuse import attention
from transfuse.ops import _philox
from transfuse.ops.attention import reference
from transfuse.ops.attention.splits import MOST_SPLITS, choose_splits
from transfuse.ops.attention.variant import Variant

LENGTHS = [5, 150, 0]
ROOM = 160


@pytest.fixture
def kernels(backend):
    """The module of a backend that splits."""
    if backend == "torch":
        pytest.skip("nothing is split")
    return importlib.import_module(f"transfuse.ops.attention.{backend}_decode")


def split_into(monkeypatch, kernels, n):
    monkeypatch.setattr(kernels, "choose_splits", lambda *_: n)


def make(device, dtype, q_len=2, heads=4, kv_heads=2, lengths=LENGTHS, room=ROOM, dim=16, v_dim=24):
    """q and caches that hold NaN after their valid keys."""
    batch = len(lengths)
    q = torch.randn(batch, heads, q_len, dim, device=device).to(dtype)
    k = torch.randn(batch, kv_heads, room, dim, device=device).to(dtype)
    v = torch.randn(batch, kv_heads, room, v_dim, device=device).to(dtype)
    for b, length in enumerate(lengths):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    return q, k, v


def everything(device, dtype, q_len=2, heads=4, room=ROOM):
    """A variant with every feature but dropout."""
    return Variant(
        mask=torch.rand(1, 1, q_len, room, device=device) > 0.3,
        bias=torch.randn(1, heads, 1, room, device=device).to(dtype),
        alibi_slopes=torch.rand(heads, device=device) / 4,
        sinks=torch.randn(heads, device=device),
        scale=0.25,
        left=99,
        right=0,
        first=None,
        softcap=2.0,
    )


def agree(got, q, k, v, lengths, variant, keep=None):
    """Out and lse within their budgets of the formulas over every row's own keys."""
    variant64 = Variant(*to_fp64(list(variant[:4])), *variant[4:])
    on_cpu = Variant(*(None if t is None else t.cpu() for t in variant[:4]), *variant[4:])
    lengths, keep = lengths.cpu(), None if keep is None else keep.cpu()
    truth = reference.attention_decode(*to_fp64([q, k, v]), lengths, variant64, keep)
    plain = reference.attention_decode(q.cpu(), k.cpu(), v.cpu(), lengths, on_cpu, keep)
    # the formulas end in an lse of q's dtype: half its unit, where a lucky rounding shows less
    rounding = 0.0 if q.dtype == torch.float32 else 4 * torch.finfo(q.dtype).eps / 2 / (8 * 2**-23)
    for name, g, t, p, size in zip(("out", "lse"), got, truth, plain, (0.0, rounding), strict=True):
        verdict = judge(name, g, t, p, size)
        assert verdict.ok, f"{name}: error {verdict.error:.3e} > budget {verdict.budget:.3e}"


@pytest.mark.parametrize("splits", [1, 2, 3, 8])  # of five tiles at most when interpreted: some of eight get none
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_any_number_of_splits(feature, dtype, splits, monkeypatch, poisoned, kernels, device):
    split_into(monkeypatch, kernels, splits)
    q, k, v = make(device, dtype)
    variant = Variant(scale=0.25, first=None) if feature == "plain" else everything(device, dtype)
    lengths = torch.tensor(LENGTHS, device=device, dtype=torch.int32 if splits % 2 else torch.int64)
    got = kernels.decode_forward(q, k, v, variant, None, lengths)
    agree(got, q, k, v, lengths, variant)


def test_the_same_bits_every_time(kernels, device):
    q, k, v = make(device, torch.float16)
    got, again = (kernels.decode_forward(q, k, v, Variant(scale=0.25)) for _ in range(2))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("splits", [1, 3])
def test_dropout_falls_alike(splits, monkeypatch, kernels, device):
    split_into(monkeypatch, kernels, splits)
    q, k, v = make(device, torch.float32)
    variant = Variant(scale=0.25, first=None, dropout_p=0.4)
    lengths = torch.tensor(LENGTHS, device=device)
    seed = torch.tensor([2**61 + 5, 3], device=device)
    keep = _philox.keep_mask(seed, 0.4, len(LENGTHS), 4, 2, ROOM, device)
    agree(kernels.decode_forward(q, k, v, variant, seed, lengths), q, k, v, lengths, variant, keep)


@pytest.mark.parametrize(("heads", "q_len"), [(24, 1), (3, 11), (10, 5)])
def test_rows_of_a_group_beyond_one_tile(heads, q_len, kernels, device):
    # all heads share one key head; interpreted tiles have 16 rows
    q, k, v = make(device, torch.float32, q_len, heads, 1, lengths=[40, 17], room=40)
    lengths = torch.tensor([40, 17], device=device)
    variant = everything(device, torch.float32, q_len, heads, 40)
    agree(kernels.decode_forward(q, k, v, variant, None, lengths), q, k, v, lengths, variant)


@pytest.mark.parametrize(("dim", "v_dim"), [(72, 128), (256, 200), (40, 7)])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_heads_of_any_width(dtype, dim, v_dim, monkeypatch, kernels, device):
    split_into(monkeypatch, kernels, 2)
    q, k, v = make(device, dtype, lengths=[40, 17], room=40, dim=dim, v_dim=v_dim)
    lengths, variant = torch.tensor([40, 17], device=device), everything(device, dtype, room=40)
    agree(kernels.decode_forward(q, k, v, variant, None, lengths), q, k, v, lengths, variant)


@pytest.mark.parametrize("splits", [1, 4])
def test_scores_of_the_lowest_number_give_the_mean(splits, monkeypatch, kernels, device):
    split_into(monkeypatch, kernels, splits)
    q, k, v = make(device, torch.float32, lengths=[97])
    variant = Variant(bias=torch.full((1, 1, 1, ROOM), torch.finfo(torch.float32).min), scale=1.0, first=None)
    variant = variant._replace(bias=variant.bias.to(device))
    out, _ = kernels.decode_forward(q, k, v, variant, None, torch.tensor([97], device=device))
    mean = v[:, :, :97].mean(2, keepdim=True).repeat_interleave(2, 1)
    torch.testing.assert_close(out, mean.expand_as(out))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_rows_that_see_nothing(sinks, splits, monkeypatch, poisoned, kernels, device):
    split_into(monkeypatch, kernels, splits)
    q, k, v = make(device, torch.float32, lengths=[0, 1])
    sink = torch.tensor([0.5, -1.0, 0.0, 2.0], device=device) if sinks else None
    variant = Variant(sinks=sink, scale=1.0, right=0, first=None)  # of two queries over one key the first is before it
    out, lse = kernels.decode_forward(q, k, v, variant, None, torch.tensor([0, 1], device=device))
    empty = [(0, 0), (0, 1), (1, 0)]
    for b, i in empty:
        assert not out[b, :, i].any()
        assert torch.equal(lse[b, :, i], sink if sinks else torch.full((4,), -torch.inf, device=device))
    assert out[1, :, 1].isfinite().all()


def test_keys_before_the_window_are_not_read(kernels, device):
    q, k, v = make(device, torch.float32, q_len=1, lengths=[150, 150])
    lengths = torch.tensor([150, 150], device=device)
    variant = Variant(scale=0.25, left=20, first=None)
    expected = kernels.decode_forward(q, k, v, variant, None, lengths)
    v[:, :, :96] = torch.nan  # 129 - 32 > 96: whole tiles before the window
    got = kernels.decode_forward(q, k, v, variant, None, lengths)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_lengths_beyond_the_cache_end_with_it(kernels, device):
    q, k, v = make(device, torch.float32, lengths=[ROOM, ROOM])
    variant = Variant(scale=0.25, first=None)
    got = kernels.decode_forward(q, k, v, variant, None, torch.tensor([ROOM, 10**6], device=device))
    expected = kernels.decode_forward(q, k, v, variant)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": "lower_right", "window": (30, 5)}], ids=str)
def test_dense_calls_of_few_queries(options, kernels, device, backend):
    q = torch.randn(2, 4, 3, 16, device=device)
    k, v = (torch.randn(2, 2, 130, 16, device=device) for _ in range(2))
    assert kernels.use_splits(q, k)
    got = attention(q, k, v, **options, return_lse=True, backend=backend)
    expected = attention(q.cpu(), k.cpu(), v.cpu(), **options, return_lse=True, backend="reference")
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.cpu(), e)


def test_many_queries_go_elsewhere(kernels):
    few, many = torch.empty(1, 8, 5, 16, device="meta"), torch.empty(1, 8, 200, 16, device="meta")
    long, short = torch.empty(1, 2, 4096, 16, device="meta"), torch.empty(1, 2, 64, 16, device="meta")
    assert kernels.use_splits(few, long)
    assert not kernels.use_splits(few, short)
    assert not kernels.use_splits(many, long)
    assert not kernels.few_rows(many, long)


@pytest.mark.parametrize("slots", [1, 4, 132, 264])
@pytest.mark.parametrize("key_tiles", [0, 1, 7, 64, 1000])
@pytest.mark.parametrize("programs", [1, 8, 100, 264, 5000])
def test_the_number_of_splits(programs, key_tiles, slots):
    def steps(n):
        return -(-programs * n // slots) * -(-key_tiles // n)

    splits = choose_splits(programs, key_tiles, 1, slots)
    allowed = range(1, max(1, min(key_tiles, MOST_SPLITS)) + 1)
    assert splits in allowed
    best = min(steps(n) for n in allowed)
    assert steps(splits) * 0.85 <= best
    assert all(steps(n) * 0.85 > best for n in range(1, splits))
    assert choose_splits(programs, key_tiles, 2000, slots) == 1
