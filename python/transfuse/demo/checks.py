"""Every op, forward and backward, against its formulas in fp64, with its time beside plain PyTorch's.

The truth is the op's own specification (``backend="reference"``) in fp64 on the very inputs that the op gets. The
budget is twice the error that the specification makes in the inputs' precision, plus a rounding band: nothing picked
by hand. The time is of one forward and backward, taken right after the check of the same inputs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from transfuse.demo.cases import Case

_SECONDS = 0.25  # spent on timing one op, ours and PyTorch's together
_ROUNDS = (3, 50)  # fewest and most timed rounds


@dataclass(frozen=True)
class Error:
    """The worst element of some tensors: how far it is from the truth, and how far it may be."""

    error: float
    budget: float

    @property
    def ok(self) -> bool:
        """Within the budget; a NaN is not."""
        return self.error <= self.budget


@dataclass(frozen=True)
class Result:
    """What one op did."""

    name: str
    shape: str
    forward: Error
    backward: Error
    milliseconds: float
    torch_milliseconds: float

    @property
    def ok(self) -> bool:
        """Output and gradients are within their budgets."""
        return self.forward.ok and self.backward.ok


def run_case(case: Case) -> Result:
    """Check and time one op.

    >>> from transfuse.demo.cases import cases
    >>> case = next(c for c in cases(torch.device("cpu"), torch.float32, seed=0) if c.name == "layer_norm")
    >>> run_case(case).ok
    True
    """
    cotangent = torch.randn(case.output_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in case.tensors.items()}
    ours = _evaluate(lambda t: case.op(t, None), case.tensors, cotangent)
    truth = _evaluate(lambda t: case.op(t, "reference"), wide, cotangent)
    plain = _evaluate(lambda t: case.op(t, "reference"), case.tensors, cotangent)
    forward = _worst(ours[:1], truth[:1], plain[:1])
    backward = _worst(ours[1:], truth[1:], plain[1:])
    seconds, torch_seconds = _times(lambda t: case.op(t, None), case.torch_op, case.tensors, cotangent)
    return Result(case.name, case.shape, forward, backward, 1e3 * seconds, 1e3 * torch_seconds)


Function = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def _evaluate(function: Function, tensors: dict[str, torch.Tensor], cotangent: torch.Tensor) -> list[torch.Tensor]:
    """The output, then the gradient of every floating-point tensor."""
    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    out = function(leaves)
    wanted = [t for t in leaves.values() if t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, cotangent.to(out))]


def _worst(got: list[torch.Tensor], truth: list[torch.Tensor], plain: list[torch.Tensor]) -> Error:
    """The element nearest to its budget, or furthest over it, over all these tensors."""
    worst = Error(0.0, math.inf)
    for g, t, p in zip(got, truth, plain, strict=True):
        error, allowed = (g.double() - t).abs(), (p.double() - t).abs().max()
        unit = torch.finfo(g.dtype).eps
        accumulated = 8 * torch.finfo(torch.float32).eps * t.abs().max()  # fp32 sums may be taken in another order
        budget = 2 * allowed + unit * t.abs() + accumulated + torch.finfo(g.dtype).tiny
        over = (error / budget).nan_to_num(math.inf).flatten().argmax()
        found = Error(error.flatten()[over].item(), budget.flatten()[over].item())
        if not found.ok or found.error / found.budget >= worst.error / worst.budget:
            worst = found
        if not worst.ok:
            break
    return worst


def _times(
    ours: Function, theirs: Function, tensors: dict[str, torch.Tensor], cotangent: torch.Tensor
) -> tuple[float, float]:
    """Median seconds of one forward and backward of each, taken in turns so that both meet the same machine."""
    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    device = wanted[0].device
    upstream = cotangent.to(device, wanted[0].dtype)
    taken: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    while len(taken[0]) <= _ROUNDS[0] or (time.perf_counter() - began < _SECONDS and len(taken[0]) <= _ROUNDS[1]):
        for function, times in zip((ours, theirs), taken, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            torch.autograd.grad(function(leaves), wanted, upstream, allow_unused=True)
            _synchronize(device)
            times.append(time.perf_counter() - start)
    return statistics.median(taken[0][1:]), statistics.median(taken[1][1:])  # the first round warms up


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
