"""Attention's backward on kernels: what the tests of every backend leave out of its tiles, splits and loops."""

from __future__ import annotations

import pytest
import torch

from attention_cases import Shape, inputs, name_of, quick_interpreted, sizes_of_intermediates
from oracle import check, judge
from transfuse import attention
from transfuse.ops import _philox
from transfuse.ops.attention import reference, torch_chunks
from transfuse.ops.attention.variant import Variant

# Triton's interpreted tiles are 16 queries by 32 keys: two by two of them, the last ones not full. CUDA's are 64 or 32
# wide here.
SHAPE = Shape(2, 2, 1, 18, 37, 16, 16)
THREE_BY_THREE = Shape(1, 1, 1, 41, 70, 16, 24)
GRADIENTS = ("dq", "dk", "dv", "dbias", "dslopes", "dsinks")

pytestmark = pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)


@pytest.fixture
def short_runs(monkeypatch, backend):
    """Every tile of scores that is added into a bias gradient is a split of its own."""
    from transfuse.ops.attention import cuda_backward

    monkeypatch.setattr(cuda_backward, "_SHORTEST_RUN", 1)
    if backend == "triton":
        from transfuse.ops.attention import triton_bias_grad

        monkeypatch.setattr(triton_bias_grad, "_SHORTEST_RUN", 1)


def run(tensors, backend, grad_outputs=None, grads=None, **options):
    """Judge out, lse and the gradients of all that floats."""
    q, v = tensors["q"], tensors["v"]
    if grad_outputs is None:
        shapes = ((*q.shape[:3], v.shape[3]), q.shape[:3])
        grad_outputs = [torch.randn(shape, device=q.device) for shape in shapes]
    return check(
        lambda **kw: attention(**kw, backend=backend, return_lse=True),
        lambda **kw: attention(**kw, backend="reference", return_lse=True),
        tensors,
        grads=grads or [n for n, t in tensors.items() if t is not None and t.is_floating_point()],
        names=("out", "lse"),
        grad_outputs=grad_outputs,
        sizes=sizes_of_intermediates(tensors, options, grad_outputs),
        **options,
    )


BIASES = [(2, 2, 18, 37), (1, 2, 18, 37), (2, 1, 18, 37), (18, 37), (2, 2, 1, 37), (37,), (2, 1, 18, 1), (2, 1, 1), ()]


@pytest.mark.parametrize("size", BIASES, ids=lambda s: "x".join(map(str, s)) or "scalar")
def test_the_bias_gradient_is_added_up_over_what_was_broadcast(size, backend, device, poisoned):
    tensors = {**inputs(SHAPE, torch.float32, device), "bias": torch.randn(size, device=device)}
    run(tensors, backend, causal="lower_right", grads=["q", "bias"])


@pytest.mark.parametrize("size", [(18, 37), (37,), (18, 1), ()], ids=str)
def test_splits_of_the_bias_gradient_add_up(size, short_runs, backend, device, poisoned):
    tensors = {**inputs(SHAPE, torch.float32, device), "bias": torch.randn(size, device=device)}
    run(tensors, backend, causal=True, grads=["bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_a_bias_of_many_batch_rows_adds_up_in_fp32(dtype, backend, device):
    # 24 rows of one sign: in the bias's precision the later ones would no longer count
    batch = 24
    tensors = inputs(Shape(batch, 1, 1, 16, 16, 16, 16), dtype, device)
    tensors = {n: t[:1].expand(batch, -1, -1, -1) for n, t in tensors.items()}
    tensors["bias"] = torch.randn(16, 16, device=device).to(dtype)
    dout = torch.randn(1, 1, 16, 16, device=device).expand(batch, -1, -1, -1)
    run(tensors, backend, grad_outputs=[dout, None], grads=["bias"])


@pytest.mark.parametrize(
    ("options", "flipped"),
    [
        ({"causal": True}, False),
        ({"causal": True}, True),
        ({"causal": "lower_right"}, False),
        ({"causal": "lower_right"}, True),
        ({"window": (9, 20)}, False),
        ({"window": (30, -1), "softcap": 2.0}, False),
        ({"window": (-1, 3)}, True),
        ({"window": (0, 0)}, True),
    ],
    ids=str,
)
def test_tiles_inside_and_at_the_edges_of_a_window(options, flipped, backend, device, poisoned):
    shape = THREE_BY_THREE
    if flipped:
        shape = shape._replace(q_len=shape.k_len, k_len=shape.q_len)
    run(inputs(shape, torch.float32, device), backend, **options)


@quick_interpreted(lambda p: p["backend"] == "cuda")
@pytest.mark.parametrize("options", [{}, {"causal": "lower_right"}, {"window": (70, 40)}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_whole_tiles_between_those_that_a_window_cuts(dtype, options, backend, device, poisoned):
    # tiles of 64 by 64: three by four, some of which hide nothing
    run(inputs(Shape(1, 2, 1, 150, 210, 16, 16), dtype, device), backend, **options)


@pytest.mark.parametrize("size", [(2,), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_slopes_and_sinks_have_partial_sums(size, dtype, backend, device, poisoned):
    tensors = inputs(SHAPE, dtype, device)
    tensors["alibi_slopes"] = torch.rand(size, device=device) / 4
    tensors["sinks"] = torch.randn(2, device=device)
    run(tensors, backend, causal="lower_right", softcap=3.0)


@pytest.mark.parametrize("outputs", ["dlse_alone", "expanded", "transposed"])
def test_gradients_of_outputs_in_any_layout(outputs, backend, device, poisoned):
    tensors = inputs(SHAPE, torch.float32, device)
    tensors["sinks"] = torch.randn(2, device=device)
    dout, dlse = {
        "dlse_alone": (None, torch.randn(2, 2, 18)),
        "expanded": (torch.randn(1, 1, 1, 1).expand(2, 2, 18, 16), torch.randn(1).expand(2, 2, 18)),
        "transposed": (torch.randn(16, 18, 2, 2).permute(3, 2, 1, 0), torch.randn(18, 2, 2).permute(2, 1, 0)),
    }[outputs]
    dout, dlse = (None if g is None else g.to(device) for g in (dout, dlse))
    run(tensors, backend, grad_outputs=[dout, dlse], causal=True)


def test_wide_rows_come_a_part_at_a_time(backend, device, poisoned):
    # fp32 rows of more than 64, the last part not full
    tensors = inputs(Shape(1, 2, 1, 18, 20, 80, 72), torch.float32, device)
    tensors["bias"] = torch.randn(1, 1, 1, 20, device=device)
    run(tensors, backend, causal=True)


@pytest.mark.parametrize("variant", [Variant(), Variant(right=0, first=None, softcap=2.0), Variant(left=4)], ids=str)
def test_backward_drops_what_forward_dropped(variant, backend, device):
    variant = variant._replace(scale=0.25, dropout_p=0.3)
    seed = torch.tensor([2**62 + 12345, 7])
    keep = _philox.keep_mask(seed, 0.3, 2, 2, 18, 37, torch.device("cpu"))
    tensors = {**inputs(SHAPE, torch.float32, device), "bias": torch.randn(1, 2, 1, 37, device=device)}

    def ours(q, k, v, bias):
        arguments = variant._replace(bias=bias)
        return torch.ops.transfuse.attention(q, k, v, *arguments, seed.to(device), backend)

    def formulas(q, k, v, bias):
        return reference.attention(q, k, v, variant._replace(bias=bias), keep.to(q.device))

    dout, dlse = torch.randn(2, 2, 18, 16, device=device), torch.randn(2, 2, 18, device=device)
    sizes = {f"d{n}": 64.0 for n in tensors}
    check(ours, formulas, tensors, grads=tensors, names=("out", "lse"), grad_outputs=[dout, dlse], sizes=sizes)


def sequences(op, q, k, v, *rest, dout, dlse, variant, backend, want=(True, True, True)):
    """Gradients of a registered op over sequences, with what forward in PyTorch gives in the given precision."""
    from transfuse.ops.attention import registration_sequences

    forward = getattr(registration_sequences, f"{op}_forward")
    out, lse = forward(q, k, v, *rest, variant, None)
    backward = getattr(torch.ops.transfuse, f"{op}_backward")
    return backward(dout.to(out.dtype), dlse.to(lse.dtype), q, k, v, out, lse, *rest, *variant, None, want, backend)


def judged(op, tensors, rest, variant, grad_outputs, device, backend):
    """The kernels' gradients against PyTorch's in fp64, within the error of PyTorch's in fp32."""
    names = ("mask", "bias", "alibi_slopes", "sinks")
    results = []
    for dtype, where, name in (
        (torch.float32, device, backend),
        (torch.float64, "cpu", "torch"),
        (torch.float32, "cpu", "torch"),
    ):
        move = lambda t: t if t is None else t.to(where, dtype if t.is_floating_point() else None)  # noqa: B023, E731
        results.append(
            sequences(
                op,
                *(move(t) for t in tensors),
                *(move(t) if isinstance(t, torch.Tensor) else t for t in rest),
                dout=move(grad_outputs[0]),
                dlse=move(grad_outputs[1]),
                variant=variant._replace(**{n: move(getattr(variant, n)) for n in names}),
                backend=name,
                want=tuple(t is not None for t in variant[1:4]),
            )
        )
    for name, got, truth, plain in zip(GRADIENTS, *results, strict=True):
        verdict = judge(name, got, truth, plain, size=16.0 if name in ("dq", "dk", "dv") else 256.0)
        assert verdict.ok, verdict


PACKED = {
    "plain": Variant(scale=0.25),
    "window-slopes-sinks": Variant(
        scale=0.25, left=5, right=0, first=None, alibi_slopes=torch.rand(4, 2), sinks=torch.randn(2)
    ),
    "bias": Variant(scale=0.25, right=0, bias=torch.randn(1, 2, 19, 35)),
    "key_bias": Variant(scale=0.25, bias=torch.randn(4, 1, 1, 35)),
    "row_bias-mask": Variant(
        scale=0.25, first=None, right=2, bias=torch.randn(1, 1, 19, 1), mask=torch.rand(4, 1, 19, 35) > 0.3
    ),
    "whole_bias": Variant(scale=0.25, first=None, right=0, bias=torch.randn(4, 2, 19, 35)),
}


@pytest.mark.parametrize("feature", PACKED)
def test_packed_rows_of_any_length(feature, backend, device, poisoned):
    # no queries, no keys, more queries than a tile, more keys; and rows that belong to no sequence
    ends_q, ends_k = torch.tensor([0, 3, 3, 5, 24]), torch.tensor([0, 35, 40, 40, 46])
    q, k, v = torch.randn(26, 2, 16), torch.randn(49, 1, 16), torch.randn(49, 1, 8)
    dout, dlse = torch.randn(26, 2, 8), torch.randn(2, 26)
    for t, end in ((q, 24), (k, 46), (v, 46), (dout, 24)):
        t[end:] = float("nan")
    rest = (ends_q.int(), ends_k.int(), 19, 35)
    judged("attention_varlen", (q, k, v), rest, PACKED[feature], (dout, dlse), device, backend)


@pytest.mark.parametrize("feature", ["plain", "key_bias", "bias-slopes"])
def test_rows_of_a_cache_filled_to_any_length(feature, backend, device, poisoned):
    lengths = torch.tensor([0, 35, 20])
    variant = Variant(scale=0.25, right=0, first=None)
    if feature == "key_bias":
        variant = variant._replace(bias=torch.randn(1, 1, 1, 35), softcap=2.0)
    elif feature == "bias-slopes":
        variant = variant._replace(bias=torch.randn(3, 2, 3, 35), alibi_slopes=torch.rand(2), left=9)
    q, k, v = torch.randn(3, 2, 3, 16), torch.randn(3, 1, 35, 16), torch.randn(3, 1, 35, 16)
    for row, length in enumerate(lengths.tolist()):
        k[row, :, length:] = float("nan")
        v[row, :, length:] = float("nan")
    grad_outputs = (torch.randn(3, 2, 3, 16), torch.randn(3, 2, 3))
    judged("attention_decode", (q, k, v), (lengths,), variant, grad_outputs, device, backend)


def test_a_cache_length_beyond_its_room_reads_nothing_there(backend, device):
    # on a GPU lengths are not checked, since the host would have to wait for them
    variant = Variant(scale=0.25, right=0, first=None)
    q, k, v = torch.randn(2, 2, 3, 16), torch.randn(2, 1, 35, 16), torch.randn(2, 1, 35, 16)
    dout, dlse = torch.randn(2, 2, 3, 16), torch.zeros(2, 2, 3)
    tensors = [t.to(device) for t in (q, k, v)]

    def run(lengths):
        op, lengths = torch.ops.transfuse, torch.tensor(lengths, device=device)
        out, lse = op.attention_decode(*tensors, lengths, *variant, None, backend)
        inputs = (dout.to(device), dlse.to(device), *tensors, out, lse, lengths)
        grads = op.attention_decode_backward(*inputs, *variant, None, [False] * 3, backend)
        return out, lse, *grads[:3]

    for got, expected in zip(run([-3, 99]), run([0, 35]), strict=True):
        assert torch.equal(got, expected)


def test_gradients_repeat_bitwise(short_runs, backend, device):
    bias = torch.randn(2, 1, 1, 37, device=device)
    variant = Variant(bias=bias, alibi_slopes=torch.rand(2, device=device), sinks=torch.randn(2, device=device))
    variant = variant._replace(scale=0.25, right=0, first=None)
    q, k, v = inputs(SHAPE, torch.float32, device).values()
    dout, dlse = torch.randn(2, 2, 18, 16, device=device), torch.randn(2, 2, 18, device=device)
    out, lse = torch_chunks.forward(q, k, v, variant, None)
    want = [True, True, True]

    def gradients():
        return torch.ops.transfuse.attention_backward(dout, dlse, q, k, v, out, lse, *variant, None, want, backend)

    for a, b in zip(gradients(), gradients(), strict=True):
        assert torch.equal(a, b)
