"""How an op becomes a ``torch.library`` op that torch.compile, torch.export, autograd and opcheck understand.

Each op registers two: ``transfuse::<op>``, which returns its outputs and what its backward needs, and
``transfuse::<op>_backward``. Both take ``str backend`` last and hand over to that implementation module. A pybind
function or a Triton launch sees no data under FakeTensor, so only these registered ops may reach one.

Double backward recomputes: the backward op's own gradient is taken through a differentiable plain-PyTorch version of
the op (:func:`double_backward`), of any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from transfuse.backends import ahead

OptionalTensors = Sequence[torch.Tensor | None]


def define(name: str, schema: str, forward: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register ``transfuse::name`` with its schema, its implementation for every device, and its fake."""

    def without_data(*args: Any) -> Any:
        # A Triton launch on meta tensors compiles its kernels where that is what this thread does.
        return forward(*args) if ahead() is not None and args[-1] == "triton" else fake(*args)

    full = f"transfuse::{name}"
    torch.library.define(full, schema)
    torch.library.impl(full, "default", forward)
    torch.library.register_fake(full, without_data)


def autograd(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register the gradient of ``transfuse::name``; ``setup(ctx, inputs, output)`` saves what ``backward`` reads."""
    torch.library.register_autograd(f"transfuse::{name}", backward, setup_context=setup)


def double_backward(
    function: Callable[..., Sequence[torch.Tensor]],
    inputs: OptionalTensors,
    grads: OptionalTensors,
    grad_grads: OptionalTensors,
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Gradient of ``vjp(function)(inputs, grads)`` contracted with ``grad_grads``.

    Args:
        function: differentiable; takes the inputs in order, returns as many outputs as there are grads.
        inputs: the op's tensor inputs, None where absent.
        grads: what came into the backward, one an output, None where an output was unused.
        grad_grads: what comes into the double backward, one an input, None where that gradient was unused.

    Returns:
        (for inputs, for grads), None where nothing flows.
    """
    with torch.enable_grad():
        xs = [_alias(t) for t in inputs]
        gs = [_alias(t) for t in grads]
        outputs = function(*xs)
        used = [(o, g) for o, g in zip(outputs, gs, strict=True) if g is not None and o.requires_grad]
        wanted = [x for x, gg in zip(xs, grad_grads, strict=True) if x is not None and gg is not None]
        contract = [gg for x, gg in zip(xs, grad_grads, strict=True) if x is not None and gg is not None]
        first = torch.autograd.grad(
            [o for o, _ in used], wanted, [g for _, g in used], create_graph=True, allow_unused=True
        )
        pairs = [(f, c) for f, c in zip(first, contract, strict=True) if f is not None and f.requires_grad]
        leaves = [t for t in (*xs, *gs) if t is not None]
        if not pairs:
            return [None] * len(xs), [None] * len(gs)
        second = iter(
            torch.autograd.grad(
                [f for f, _ in pairs],
                leaves,
                [c for _, c in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
    spread = [None if t is None else next(second) for t in (*xs, *gs)]
    return spread[: len(xs)], spread[len(xs) :]


def _alias(t: torch.Tensor | None) -> torch.Tensor | None:
    # A fresh alias: gradients taken with respect to it see this function alone, not how its inputs hang together.
    if t is None:
        return None
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_(t.is_floating_point())
