"""How a result is judged: by an error budget computed from the data, never by a tolerance picked by hand.

The truth is the reference in fp64 on the very inputs the op got (low-precision inputs are exact in fp64). The budget
is twice the error that the same formulas make when PyTorch evaluates them in the op's own precision, plus a rounding
band: one unit in the last place of the result's dtype at the truth's own magnitude, and a few fp32 units at the
magnitude of the whole result for the fp32 accumulation both sides are entitled to order differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Tree = Sequence[torch.Tensor | None]


@dataclass
class Judged:
    """One tensor's verdict, for messages and for the tables that print an error beside a time."""

    name: str
    error: float
    budget: float
    ok: bool


def to_fp64(value: Any) -> Any:
    """Floating tensors to fp64, everything else as it is; through lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return value.detach().double().cpu() if value.is_floating_point() else value.cpu()
    if isinstance(value, dict):
        return {k: to_fp64(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_fp64(v) for v in value)
    return value


def judge(name: str, got: torch.Tensor, truth: torch.Tensor, same_precision: torch.Tensor, size: float = 0.0) -> Judged:
    """Compare element by element; non-finite elements must match the truth exactly.

    Args:
        got: what the implementation gave.
        truth: fp64.
        same_precision: the same formulas evaluated by PyTorch in got's precision.
        size: magnitude of the largest intermediate value, computed from the data, where it exceeds the result's.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.dtype == same_precision.dtype, f"{name}: dtype {got.dtype}, expected {same_precision.dtype}"
    got64, plain64 = got.detach().double().cpu(), same_precision.detach().double().cpu()
    finite = truth.isfinite()
    assert torch.equal(got64.isfinite(), finite), f"{name}: finite where the truth is not, or the reverse"
    assert torch.equal(got64[~finite].nan_to_num(7.0), truth[~finite].nan_to_num(7.0)), f"{name}: wrong infinities"
    if not finite.any():
        return Judged(name, 0.0, 0.0, True)
    got64, plain64, t = got64[finite], plain64[finite], truth[finite]
    error = (got64 - t).abs()
    # The plain evaluation's largest error is the budget of every element: single elements of it are often lucky.
    plain = (plain64 - t).abs().nan_to_num(0.0).max()
    largest = max(t.abs().max().item(), size)
    unit = torch.finfo(got.dtype).eps
    accumulate = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    budget = 2 * plain + unit * t.abs() + 8 * accumulate * largest + torch.finfo(got.dtype).tiny
    worst = (error - budget).argmax()
    return Judged(name, error.max().item(), budget[worst].item(), bool((error <= budget).all()))


def check(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    tensors: dict[str, torch.Tensor | None],
    *,
    grads: Sequence[str] = (),
    names: Sequence[str] = ("out",),
    grad_outputs: Sequence[torch.Tensor | None] | None = None,
    sizes: dict[str, float] | None = None,
    **options: Any,
) -> list[Judged]:
    """Run ``op(**tensors, **options)`` and judge its outputs and gradients against ``reference`` called alike.

    Args:
        op: what is tested; returns a tensor or a tuple of tensors.
        reference: the formulas; called with fp64 tensors for the truth and with the original ones for the budget.
        tensors: named inputs; those in ``grads`` get a gradient.
        names: what to call the outputs.
        sizes: see :func:`judge`, by output name and by "d" + input name.
        grad_outputs: one an output (random where omitted, None for an output that is not differentiated).

    Raises:
        AssertionError: naming each tensor whose error exceeds its budget, with both numbers.
    """
    got, got_grads, grad_outputs = _run(op, tensors, grads, grad_outputs, options)
    truth, truth_grads, _ = _run(reference, to_fp64(tensors), grads, to_fp64(grad_outputs), options)
    plain, plain_grads, _ = _run(reference, tensors, grads, grad_outputs, options)
    sizes = sizes or {}
    verdicts = [judge(n, g, t, p, sizes.get(n, 0.0)) for n, g, t, p in zip(names, got, truth, plain, strict=True)]
    verdicts += [
        judge(f"d{n}", got_grads[n], truth_grads[n], plain_grads[n], sizes.get(f"d{n}", 0.0))
        for n in grads
        if tensors[n] is not None
    ]
    bad = [f"{v.name}: error {v.error:.3e} > budget {v.budget:.3e}" for v in verdicts if not v.ok]
    assert not bad, "; ".join(bad)
    return verdicts


def _run(
    function: Callable[..., Any],
    tensors: dict[str, torch.Tensor | None],
    grads: Sequence[str],
    grad_outputs: Sequence[torch.Tensor | None] | None,
    options: dict[str, Any],
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], list[torch.Tensor | None]]:
    leaves = {n: _leaf(t, n in grads) for n, t in tensors.items()}
    result = function(**leaves, **options)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    if grad_outputs is None:
        grad_outputs = [torch.randn_like(o) for o in outputs]
    wanted = [n for n in grads if leaves[n] is not None]
    found: dict[str, torch.Tensor] = {}
    if wanted:
        pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        gradients = torch.autograd.grad(
            [o for o, _ in pairs],
            [leaves[n] for n in wanted],
            [g.to(o.dtype) for o, g in pairs],
            allow_unused=True,
        )
        for n, g in zip(wanted, gradients, strict=True):
            found[n] = torch.zeros_like(leaves[n]) if g is None else g
    return [o.detach() for o in outputs], found, list(grad_outputs)


def _leaf(t: torch.Tensor | None, wanted: bool) -> torch.Tensor | None:
    if t is None or not wanted:
        return t
    # detach keeps strides and storage offset, so expanded and transposed inputs stay what they are
    return t.detach().requires_grad_()
