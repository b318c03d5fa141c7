"""Feed-forward network on the CUDA kernels of ``csrc/ffn``, in the steps of ``fused``.

``cuda_product`` launches; ``cuda_plans`` says with which tiles, and where torch's matmul computes a product instead.
"""

from __future__ import annotations

import torch

from transfuse.ops import _validate
from transfuse.ops.ffn.cuda_product import combine, matmul, padded, product
from transfuse.ops.ffn.fused import Products


def why_not(op: str, *tensors: torch.Tensor | None) -> str | None:
    """Why the kernels cannot take these (validated) arguments, or None."""
    return _validate.beyond_kernels("cuda", *tensors)


_PRODUCTS = Products(product, combine, matmul, padded)
ffn_forward, ffn_backward = _PRODUCTS.ffn_forward, _PRODUCTS.ffn_backward
linear_act_forward, linear_act_backward = _PRODUCTS.linear_act_forward, _PRODUCTS.linear_act_backward
