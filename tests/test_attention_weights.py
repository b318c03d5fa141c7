"""attention_weights on every backend: values and gradients, tiles that end early, and what its sum leaves out."""

from __future__ import annotations

import pytest
import torch

from attention_cases import DTYPES, FEATURES, Shape, features, inputs, name_of
from conftest import skip_unless
from oracle import check
from transfuse import attention, attention_weights
from transfuse.ops.attention import registration
from transfuse.ops.attention.variant import Variant


@pytest.mark.parametrize("feature", [f for f in FEATURES if "sinks" not in f])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_weights(feature, dtype, backend, device):
    shape = Shape(2, 4, 2, 11, 13, 16, 16)
    more, options = features(feature, shape, dtype, device)
    tensors = {**inputs(shape, dtype, device), **more}
    v = tensors.pop("v")
    skip_unless(registration.why_not(backend, "attention_weights", tensors["q"], tensors["k"], v, Variant()))
    _, lse = attention(tensors["q"], tensors["k"], v, **more, **options, return_lse=True)
    tensors["lse"] = lse
    check(
        lambda **kw: attention_weights(**kw, backend=backend),
        lambda **kw: attention_weights(**kw, backend="reference"),
        tensors,
        grads=[n for n, t in tensors.items() if t.is_floating_point()],
        names=("weights",),
        **options,
    )


@pytest.mark.parametrize("shape", [Shape(1, 2, 1, 70, 131, 80, 8), Shape(1, 1, 1, 35, 130, 200, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_weights_of_several_tiles(dtype, shape, backend, device, poisoned):
    more, options = features("lower_right-mask-bias-alibi-window-softcap", shape, dtype, device)
    tensors = {**inputs(shape, dtype, device), **more}
    v = tensors.pop("v")
    skip_unless(registration.why_not(backend, "attention_weights", tensors["q"], tensors["k"], v, Variant()))
    _, tensors["lse"] = attention(tensors["q"], tensors["k"], v, **more, **options, return_lse=True)
    check(
        lambda **kw: attention_weights(**kw, backend=backend),
        lambda **kw: attention_weights(**kw, backend="reference"),
        tensors,
        names=("weights",),
        **options,
    )


def test_weights_times_values_are_the_output():
    shape = Shape(2, 4, 2, 11, 13, 16, 16)
    more, options = features("lower_right-mask-bias-alibi-window-softcap-sinks", shape, torch.float64)
    tensors = {**inputs(shape, torch.float64), **more}
    out, lse = attention(**tensors, **options, return_lse=True)
    more.pop("sinks")
    weights = attention_weights(tensors["q"], tensors["k"], lse, **more, **options)
    torch.testing.assert_close(weights @ tensors["v"].repeat_interleave(2, 1), out)
    assert (weights.sum(-1) < 1).all()  # the sink has its share
    assert weights[:, :, 11 // 2].eq(0).all()


def test_autocast_computes_weights_in_its_dtype():
    q, k, v = inputs(Shape(1, 4, 2, 37, 53, 64, 64), torch.float32).values()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = attention_weights(q, k, attention(q, k, v, return_lse=True)[1])
    assert weights.dtype == torch.bfloat16
