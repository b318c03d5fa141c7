"""Attention for transformers' dispatch: ``attn_implementation="transfuse"``."""

from __future__ import annotations

from typing import Any

import torch

from transfuse.errors import ArgumentError, MissingDependencyError
from transfuse.ops import attention, attention_weights

NAME = "transfuse"
_collector: Any = None


def register_with_transformers() -> None:
    """Makes ``attn_implementation="transfuse"`` known to transformers, for every model that dispatches its attention.

    Registers the attention and, as padding would otherwise be lost, the mask function that belongs to it. May be called
    again. Weights are returned where ``output_attentions`` asks for them; T5's position bias gets its gradient, sliding
    windows, soft capping and sinks are part of the kernel. A query that sees nothing (all padding) gives 0.

    Raises:
        MissingDependencyError: transformers is not installed, or too old to have the dispatch (4.53 has it).

    >>> register_with_transformers()
    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> model = BertModel._from_config(config, attn_implementation="transfuse")
    >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 8])
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise MissingDependencyError(
            f"register_with_transformers: needs transformers 4.53 or later ({error}): pip install -U transformers"
        ) from None
    global _collector
    try:  # what a model is asked to record; some models tell their layers by this alone
        from transformers.utils.output_capturing import _active_collector as _collector
    except ImportError:
        _collector = None
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One layer's attention as transformers calls it.

    Args:
        module: the layer; its ``is_causal`` decides where is_causal is None.
        query: (batch, heads, q_len, head_dim).
        key: (batch, kv_heads, k_len, head_dim).
        value: (batch, kv_heads, k_len, v_head_dim).
        attention_mask: (batch, 1 or heads, q_len, k_len): bool, True = attend, or floating, added. With one, it alone
            says what is hidden; without, a causal layer's query i sees keys 0..i if there are several queries.
        dropout: probability; transformers gives 0 outside of training.
        scaling: of the scores; None: 1 / sqrt(head_dim).
        position_bias: (batch or 1, heads, q_len, k_len), added to the scores, with a gradient.
        sliding_window: how many keys a query sees, itself among them, where there is no mask.
        softcap: see :func:`transfuse.attention`.
        s_aux: (heads,), sinks.
        output_attentions: also return the weights.

    Returns:
        (out (batch, q_len, heads, v_head_dim) contiguous, weights (batch, heads, q_len, k_len) or None).
    """
    if kwargs.get("cache") is not None:
        raise ArgumentError(
            "transfuse in transformers: paged caches (continuous batching) are not taken; "
            "give another attn_implementation"
        )
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    causal = bool(is_causal) and attention_mask is None
    if causal and query.shape[2] == 1:  # a branch: compiled with dynamic lengths, a comparison is no bool
        causal = False
    mask, bias = None, position_bias
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = attention_mask[..., : key.shape[2]]
    elif attention_mask is not None:
        bias = attention_mask if bias is None else bias + attention_mask
    if bias is not None:
        bias = bias[..., : key.shape[2]]
        bias = bias if bias.dtype in (torch.float32, query.dtype) else bias.to(query.dtype)
    options: dict[str, Any] = {
        "causal": causal,
        "mask": mask,
        "bias": bias,
        "window": (sliding_window - 1, 0) if sliding_window and causal else None,
        "softcap": softcap,
        "scale": scaling,
    }
    weights = None
    if output_attentions or records_attentions():
        out, lse = attention(query, key, value, sinks=s_aux, dropout_p=dropout, return_lse=True, **options)
        weights = attention_weights(query, key, lse, **options)
    else:
        out = attention(query, key, value, sinks=s_aux, dropout_p=dropout, **options)
    return out.transpose(1, 2).contiguous(), weights


def records_attentions() -> bool:
    """Whether the model that runs now is asked for attention weights."""
    if _collector is None or (torch.compiler.is_compiling() and not _collector.compiling):
        return False  # compiled, it can be asked only where transformers has set it
    collected = _collector.get()
    return collected is not None and any(key.endswith("attentions") for key in collected)
