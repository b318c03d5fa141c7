"""The launches of ``csrc/ffn``: a product with its end, its partial sums, or torch's matmul and the end.

``ends`` hold what csrc/ffn/ends.cuh reads and writes. Everything that is allocated here has rows of whole 16 bytes, so
that it can be an operand of the next product without a copy, whatever its width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from transfuse import _extension
from transfuse.ops._tuning import tuned
from transfuse.ops.ffn import ACTIVATIONS, cuda_plans
from transfuse.ops.ffn.cuda_plans import CUBLAS, FORWARD, INPUT, WEIGHT, Plan
from transfuse.ops.ffn.fused import Ends


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    ends: Ends,
    *,
    b_gate: torch.Tensor | None = None,
    activation: str = "",
    backward: bool = False,
    dropout_p: float = 0.0,
    sums: bool = False,
) -> torch.Tensor | None:
    """``a @ b`` with its end; a: (M, K), b, b_gate: (K, N), any strides.

    Returns:
        With ``sums`` (backward alone) du summed over its rows, (N,) in a's dtype.
    """
    (M, K), N = a.shape, b.shape[1]
    layout = _layout(a, b, b_gate)
    kind = "gated" if b_gate is not None else "backward" if backward else "end"
    total: torch.Tensor | None = None

    def end(c: torch.Tensor, g: torch.Tensor | None) -> torch.Tensor | None:
        return combine(c, g, ends, activation=activation, backward=backward, dropout_p=dropout_p, sums=sums)

    def run(plan: Plan) -> None:
        nonlocal total
        if plan.tile == CUBLAS:
            total = end((a @ b)[None], None if b_gate is None else (a @ b_gate)[None])
            return
        operands = _stored(layout, a, b, b_gate)
        if plan.splits > 1:
            partials = padded(a, M, N, parts=plan.splits * (1 if b_gate is None else 2), dtype=torch.float32)
            _launch(layout, plan, operands, partials, Ends())
            total = end(partials[: plan.splits], None if b_gate is None else partials[plan.splits :])
            return
        block_m = cuda_plans.tiles(a.dtype)[plan.tile][0]
        room = ends._replace(sums=_room_for_sums(a, M, N, block_m)) if sums else ends
        _launch(layout, plan, operands, None, room, activation, backward, dropout_p)
        total = _total(room.sums, a)

    _planned(kind, layout, M, N, K, a, run)
    return total


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    second: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """``a @ b + bias``, or a @ b plus the second pair's product; (M, N), contiguous."""
    (M, K), N = a.shape, b.shape[1]
    layout = INPUT if second is not None else _layout(a, b)
    out = a

    def run(plan: Plan) -> None:
        nonlocal out
        if plan.tile == CUBLAS:
            out = a @ b if bias is None else torch.addmm(bias, a, b)
            out = out if second is None else out.addmm_(*second)
            return
        out = a.new_empty(M, N)
        operands = _stored(layout, a, b, None, second)
        if plan.splits == 1:
            _launch(layout, plan, operands, None, Ends(out=out, bias=bias))
            return
        partials = padded(a, M, N, parts=plan.splits, dtype=torch.float32)
        _launch(layout, plan, operands, partials, Ends())
        combine(partials, None, Ends(out=out, bias=bias))

    _planned("plain", layout, M, N, K if second is None else 2 * K, a, run)
    return out


def combine(
    c: torch.Tensor,
    g: torch.Tensor | None,
    ends: Ends,
    *,
    activation: str = "",
    backward: bool = False,
    dropout_p: float = 0.0,
    sums: bool = False,
) -> torch.Tensor | None:
    """The end of a product over its parts, added in their order; c, g: (parts, M, N).

    Returns:
        As :func:`product`.
    """
    _, M, N = c.shape
    if not fits(c[0]) or (g is not None and g.stride() != c.stride()):  # parts are one product of another's making
        c = padded(c, M, N, parts=len(c)).copy_(c)
        g = None if g is None else padded(g, M, N, parts=len(g)).copy_(g)
    rows = 4 if M <= 64 else 32  # many rows a block leave few partial sums; of few rows none should be empty
    like = ends.out if ends.out is not None else ends.up
    assert like is not None
    if sums:
        ends = ends._replace(sums=_room_for_sums(like, M, N, rows))
    view = _extension.view
    options = _number(activation), backward, dropout_p, _extension.target(c.device)
    _extension.kernels().ffn_combine(view(c), view(g), rows, *map(view, ends), *options)
    return _total(ends.sums, like)


def padded(
    like: torch.Tensor, rows: int, columns: int, *, parts: int | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """An empty (rows, columns), or (parts, rows, columns), each row of which begins at a multiple of 16 bytes."""
    dtype = like.dtype if dtype is None else dtype
    whole = -(-columns * dtype.itemsize // 16) * 16 // dtype.itemsize
    shape = (rows, whole) if parts is None else (parts, rows, whole)
    return like.new_empty(shape, dtype=dtype)[..., :columns]


def fits(t: torch.Tensor) -> bool:
    """Whether the kernels can read a matrix as it lies: contiguous columns, rows at multiples of 16 bytes."""
    if t.numel() == 0:
        return True
    rows_fit = t.shape[0] == 1 or t.stride(0) * t.element_size() % 16 == 0
    return (t.shape[1] == 1 or t.stride(1) == 1) and rows_fit and t.data_ptr() % 16 == 0


def aligned(t: torch.Tensor) -> torch.Tensor:
    """The matrix itself where it fits, or a copy that does."""
    return t if fits(t) else padded(t, *t.shape).copy_(t)


def _layout(a: torch.Tensor, b: torch.Tensor, b_gate: torch.Tensor | None = None) -> int:
    """How a (M, K) and b (K, N) lie, or which is nearest; gated products are x w^T."""
    if a.stride(0) == 1 and a.stride(1) != 1 and b.stride(1) == 1 and b_gate is None:
        return WEIGHT
    return FORWARD if b_gate is not None or (b.stride(0) == 1 and not fits(b)) else INPUT


def _stored(
    layout: int,
    a: torch.Tensor,
    b: torch.Tensor,
    b_gate: torch.Tensor | None = None,
    second: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> list[torch.Tensor | None]:
    """a, b, b_gate, a2, b2 as the kernel reads them; a second pair comes in the layout INPUT alone."""
    a2, b2 = second or (None, None)
    if layout == WEIGHT:
        a = a.T
    if layout == FORWARD:
        b, b_gate = b.T, None if b_gate is None else b_gate.T
    return [None if t is None else aligned(t) for t in (a, b, b_gate, a2, b2)]


def _planned(kind: str, layout: int, M: int, N: int, K: int, like: torch.Tensor, run: Callable[[Plan], None]) -> None:
    """Run the plan chosen for a product, or the one that was measured for its class of shapes."""
    cublas = cuda_plans.cublas_may(like.dtype, like.device)
    chosen = cuda_plans.choose(M, N, K, like.dtype, kind, layout, like.device, cublas)
    others = cuda_plans.candidates(chosen, layout, cublas)
    key = kind, layout, like.dtype, _power_of_2(M), N, _power_of_2(K)
    tuned("ffn_product_cuda", key, chosen, others, run, like.device)


def _launch(
    layout: int,
    plan: Plan,
    operands: Sequence[torch.Tensor | None],
    partials: torch.Tensor | None,
    ends: Ends,
    activation: str = "",
    backward: bool = False,
    dropout_p: float = 0.0,
) -> None:
    """One launch of the product; operands: a, b, b_gate, a2, b2 as :func:`_stored` gives them."""
    assert operands[0] is not None
    device = operands[0].device
    tensors = map(_extension.view, (*operands, partials, *ends))
    options = _number(activation), backward, dropout_p, _extension.target(device)
    _extension.kernels().ffn_product(layout, plan.tile, plan.splits, *tensors, *options)


def _number(activation: str) -> int:
    return ACTIVATIONS.index(activation) + 1 if activation else 0


def _room_for_sums(like: torch.Tensor, M: int, N: int, rows: int) -> torch.Tensor:
    return like.new_empty((-(-M // rows), N), dtype=torch.float32)


def _total(sums: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """Rows of sums added in their order, in like's dtype."""
    if sums is None:
        return None
    total = like.new_empty(sums.shape[1])
    if sums.shape[0] == 0:
        return total.zero_()
    view = _extension.view
    _extension.kernels().norm_weight_sums(view(sums), None, view(total), None, _extension.target(like.device))
    return total


def _power_of_2(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
