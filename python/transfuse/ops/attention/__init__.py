"""Scaled dot-product attention: dense, packed, over a cache, its probabilities, and under torch's own signature.

``reference`` is the specification; ``torch_impl`` the plain-PyTorch path (``torch_flash``, ``torch_chunks`` and
``torch_explicit`` are its parts). ``arguments`` validates a call once and makes it a ``variant``; ``dense``,
``packed``, ``cached`` and ``sdpa`` hold the public functions; ``registration`` tells torch.library. See
docs/attention.md.
"""

from __future__ import annotations

from transfuse.ops.attention.dense import attention, attention_weights

__all__ = ["attention", "attention_weights"]
