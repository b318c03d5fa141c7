"""Scaled dot-product attention: dense, packed, over a cache, its probabilities, and under torch's own signature.

``reference`` is the specification; ``torch_impl`` the plain-PyTorch path, with its parts in ``torch_flash``,
``torch_chunks``, ``torch_explicit`` and ``torch_sequences``. ``arguments`` validates a call once and makes it a
``variant``; ``dense``, ``packed``, ``cached`` and ``sdpa`` hold the public functions; ``registration`` and
``registration_sequences`` tell torch.library. See docs/attention.md.
"""

from __future__ import annotations

from transfuse.ops.attention import registration_sequences
from transfuse.ops.attention.cached import attention_decode
from transfuse.ops.attention.dense import attention, attention_weights
from transfuse.ops.attention.packed import attention_varlen
from transfuse.ops.attention.sdpa import scaled_dot_product_attention

__all__ = [
    "attention",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "scaled_dot_product_attention",
]
