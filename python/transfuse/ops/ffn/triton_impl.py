"""Feed-forward network on Triton, in the steps of ``fused``.

Kernels and their launch stand in ``triton_gemm``. Products with nothing to fuse go to torch's matmul where
:func:`use_cublas` says so.
"""

from __future__ import annotations

import torch

from transfuse.backends import ahead
from transfuse.ops import _validate
from transfuse.ops._triton import precision
from transfuse.ops.ffn.fused import Ends, Products
from transfuse.ops.ffn.triton_gemm import combine, product


def why_not(op: str, *tensors: torch.Tensor | None) -> str | None:
    """Why the kernels cannot take these (validated) arguments, or None."""
    return _validate.beyond_kernels("triton", *tensors)


def use_cublas(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product (M, K) @ (K, N) that has nothing to fuse but a bias goes to torch's matmul.

    By rule, not by measurement: where it computes just what our kernel would, the vendor's is the one to beat. Not

    - off the GPU, where there is none;
    - in fp32 with ``precision`` "tf32x3", which it does not offer: its fp32 leaves tensor cores unused;
    - under torch.use_deterministic_algorithms, where its order of sums hangs on a variable of the environment.
    """
    target = ahead()
    if device.type != "cuda" and (target is None or target.gpu is None):
        return False
    return precision(dtype) != "tf32x3" and not torch.are_deterministic_algorithms_enabled()


def _matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    second: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """a @ b + bias, or a @ b plus the second pair's product, rounded once."""
    if second is None and use_cublas(a.shape[0], b.shape[1], a.shape[1], a.dtype, a.device):
        return a @ b if bias is None else torch.addmm(bias, a, b)
    out = a.new_empty((a.shape[0], b.shape[1]))
    product(a, b, Ends(out=out, bias=bias), second=second)
    return out


def _empty(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return like.new_empty((rows, columns))


_PRODUCTS = Products(product, combine, _matmul, _empty)
ffn_forward, ffn_backward = _PRODUCTS.ffn_forward, _PRODUCTS.ffn_backward
linear_act_forward, linear_act_backward = _PRODUCTS.linear_act_forward, _PRODUCTS.linear_act_backward
