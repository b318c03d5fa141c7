"""What the tests of causal_softmax share: running the op on a backend and judging it against the formulas."""

from __future__ import annotations

import torch

from conftest import skip_unless
from oracle import check, to_fp64
from transfuse.ops.causal_softmax import _why_not, causal_softmax, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CAUSAL = [True, False, "lower_right"]
INF, NAN = float("inf"), float("nan")
name_of = lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else str(v).removeprefix("torch.")  # noqa: E731


def run(tensors, backend, *, causal=True, scale=0.3, dout=None, formulas=reference.causal_softmax):
    """Judge the op against the formulas; absent tensors are None."""
    tensors = {"mask": None, "bias": None, **tensors}
    skip_unless(_why_not(backend, tensors["scores"], tensors["mask"], tensors["bias"]))
    dout = torch.randn_like(tensors["scores"]) if dout is None else dout
    return check(
        lambda scores, scale, causal, mask, bias: causal_softmax(
            scores, scale=scale, causal=causal, mask=mask, bias=bias, backend=backend
        ),
        formulas,
        tensors,
        grads=[g for g in ("scores", "bias") if tensors[g] is not None],
        grad_outputs=[dout],
        sizes=sizes(tensors, dout, scale, causal),
        scale=scale,
        causal=causal,
    )


def sizes(tensors, dout, scale, causal):
    """What the gradients' sums are made of: dlogits = out (dout - sum(out dout)) often cancels to nothing."""
    exact = to_fp64(tensors)
    out = reference.causal_softmax(exact["scores"], scale, causal, exact["mask"], exact["bias"])
    terms = (out * to_fp64(dout).abs()).nan_to_num(0.0)
    found = {"dscores": abs(scale) * terms.sum(-1).max().item() if terms.numel() else 0.0}
    if exact["bias"] is not None:
        found["dbias"] = 2 * terms.sum_to_size(exact["bias"].shape).max().item()
        if exact["bias"].dim() == 0 or exact["bias"].shape[-1] < out.shape[-1]:
            # Whole rows of dlogits are summed, and that is 0 but for the rounding of the probabilities that are saved.
            found["dbias"] *= max(1.0, torch.finfo(dout.dtype).eps / (8 * torch.finfo(torch.float32).eps))
    return found


def from_saved_probabilities(scores, scale, causal, mask, bias):
    """The formulas, with gradients from the probabilities as a result in scores' dtype holds them."""
    exact = reference.causal_softmax(scores.double(), scale, causal, mask, bias.double())
    rounded = exact.detach().to(scores.dtype).to(bias.dtype)

    class Softmax(torch.autograd.Function):
        @staticmethod
        def forward(ctx, scores, bias):
            return rounded.to(scores.dtype)

        @staticmethod
        def backward(ctx, dout):
            dlogits = rounded * (dout - (rounded * dout).sum(-1, keepdim=True))
            return (scale * dlogits).to(scores.dtype), dlogits.sum_to_size(bias.shape)

    return Softmax.apply(scores, bias)
