"""The CUDA kernels on shapes, strides, dtypes, masks and flags that hypothesis draws, against the formulas in fp64.

Without a GPU they run on tests/cuda_on_cpu. The quick examples are the same at every run, the slow ones new each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import causal_softmax_cases
import test_attention
import test_ffn
import test_norm
from attention_cases import Shape, features

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.parametrize("backend", ["cuda"], indirect=True),
    pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["quick", "slow"]),
]

# Around the sizes of packs, warps and tiles.
EDGES = [n + d for n in (8, 16, 32, 64, 128, 256) for d in (-1, 0, 1)]
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SLOW_EXAMPLES = 200


def for_all(slow: bool, quick: int, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Runs the function it decorates on what is drawn."""
    chosen = settings(
        max_examples=SLOW_EXAMPLES if slow else quick,
        derandomize=not slow,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )

    def run(test: Callable[..., None]) -> None:
        def seeded(seed: int, **drawn: Any) -> None:
            torch.manual_seed(seed)
            test(**drawn)

        chosen(given(seed=st.integers(0, 999), **strategies)(seeded))()

    return run


def sizes(most: int) -> st.SearchStrategy[int]:
    return st.integers(1, min(most, 40)) | st.sampled_from([n for n in EDGES if n <= most])


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "rows_apart": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "step_2": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "misaligned": lambda t: torch.cat([t.flatten(), t.new_zeros(1)]).roll(1)[1:].view(t.shape),
    "same_first": lambda t: t[:1].expand(t.shape) if t.dim() > 1 and len(t) else t,
}
LAYOUT = st.sampled_from(sorted(LAYOUTS))


def part_of(shape: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    """A shape that broadcasts to this one."""
    kept = st.tuples(*(st.booleans() for _ in shape))
    whole = kept.map(lambda keep: tuple(n if k else 1 for n, k in zip(shape, keep, strict=True)))
    return st.tuples(whole, st.integers(0, len(shape))).map(lambda drawn: drawn[0][drawn[1] :])


def test_norms(slow, backend, device):
    rows = st.lists(st.integers(1, 6), max_size=2)
    wide = st.sampled_from([1032, 4104, 8193, 16640])

    @for_all(
        slow,
        40,
        kind=st.sampled_from(["layer_norm", "rms_norm"]),
        rows=rows,
        hidden=sizes(257) | wide,
        dtype=DTYPES,
        fp32_weights=st.booleans(),
        weights=st.booleans(),
        residual=st.none() | LAYOUT,
        layout=LAYOUT,
    )
    def holds(kind, rows, hidden, dtype, fp32_weights, weights, residual, layout):
        tensors = test_norm.inputs((*rows, hidden), dtype, device, weights=torch.float32 if fp32_weights else dtype)
        tensors["x"] = LAYOUTS[layout](tensors["x"])
        if residual is not None:
            tensors["residual"] = LAYOUTS[residual](torch.randn_like(tensors["x"]))
        if not weights:
            tensors.update(weight=None, bias=None)
        test_norm.run(kind, tensors, backend)


def test_causal_softmax(slow, backend, device):
    wide = st.sampled_from([1000, 4104])

    @for_all(
        slow,
        40,
        data=st.data(),
        lead=st.lists(st.integers(1, 4), max_size=2),
        q_len=st.integers(1, 40),
        k_len=sizes(257) | wide,
        dtype=DTYPES,
        causal=st.sampled_from([True, False, "lower_right"]),
        scale=st.sampled_from([1.0, 0.125, -0.7, 0.0, 3.0]),
        visible=st.none() | st.sampled_from([0.05, 0.5, 1.0]),
        bias=st.sampled_from([None, "own", "fp32"]),
        layout=LAYOUT,
    )
    def holds(data, lead, q_len, k_len, dtype, causal, scale, visible, bias, layout):
        shape = (*lead, q_len, k_len)
        tensors = {"scores": LAYOUTS[layout](torch.randn(shape, device=device).mul(3).to(dtype))}
        if visible is not None:
            tensors["mask"] = torch.rand(data.draw(part_of(shape)), device=device) < visible
        if bias is not None:
            drawn = torch.randn(data.draw(part_of(shape)), device=device)
            tensors["bias"] = drawn if bias == "fp32" else drawn.to(dtype)
        half_saved = bias == "fp32" and dtype != torch.float32  # where plain PyTorch saves fp32
        cases = causal_softmax_cases
        formulas = cases.from_saved_probabilities if half_saved else cases.reference.causal_softmax
        cases.run(tensors, backend, causal=causal, scale=scale, formulas=formulas)


def test_attention_and_its_gradients(slow, backend, device):
    # A single query or key would make plain PyTorch's own error a matter of luck.
    few, length = st.integers(1, 3 if slow else 2), sizes(257 if slow else 129).filter(lambda n: n > 1)
    shapes = st.builds(
        lambda batch, kv, group, q, k, d, dv: Shape(batch, kv * group, kv, q, k, d, dv),
        few,
        few,
        few,
        length,
        length,
        sizes(256),
        sizes(256),
    )
    scores = st.lists(
        st.sampled_from(["mask", "key_mask", "bias", "fp32_bias", "key_bias", "alibi", "softcap", "sinks"]),
        unique_by=lambda name: name[-4:],
    )
    limit = st.integers(-1, 70)

    @for_all(
        slow,
        30,
        shape=shapes,
        dtype=DTYPES,
        scores=scores,
        causal=st.sampled_from([False, True, "lower_right"]),
        window=st.none() | st.tuples(limit, limit),
        scale=st.sampled_from([None, 0.2]),
        layouts=st.tuples(LAYOUT, LAYOUT, LAYOUT),
    )
    def holds(shape, dtype, scores, causal, window, scale, layouts):
        tensors, options = features("-".join(scores) or "plain", shape, dtype, device)
        drawn = test_attention.inputs(shape, dtype, device)
        given = {n: LAYOUTS[how](t) for (n, t), how in zip(drawn.items(), layouts, strict=True)}
        test_attention.run({**given, **tensors}, backend, **options, causal=causal, window=window, scale=scale)


def test_ffn_and_its_gradients(slow, backend, device):
    rows = st.lists(st.integers(1, 6), max_size=2) | st.sampled_from([[70], [130]])

    # As in test_ffn, few columns would make plain PyTorch's own error, which sets the budget, a matter of luck.
    @for_all(
        slow,
        25,
        rows=rows,
        d=st.integers(4, 40) | st.sampled_from([64, 72, 129]),
        d_ff=st.integers(8, 90) | st.sampled_from([128, 136, 257]),
        dtype=DTYPES,
        activation=st.sampled_from(test_ffn.ACTIVATIONS),
        gated=st.booleans(),
        biases=st.booleans(),
        layout=LAYOUT,
    )
    def holds(rows, d, d_ff, dtype, activation, gated, biases, layout):
        tensors = test_ffn.inputs(tuple(rows), d, d_ff, dtype, device, gated=gated, biases=biases)
        test_ffn.run({**tensors, "x": LAYOUTS[layout](tensors["x"])}, backend, activation)
