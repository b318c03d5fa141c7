"""Fused forwards for modules of Hugging Face's models: the class of each module is exchanged for a subclass of it.

A fused forward stands aside, for the class's own, where a step of it is not what it was written for: a layer wrapped by
an adapter, a hook on it, an activation or a mixture of dtypes that the op does not have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from transfuse.integrations import transformers_attention
from transfuse.nn.norm import LayerNorm
from transfuse.nn.transformer import changed
from transfuse.ops import attention, attention_weights, ffn, layer_norm, linear_act, rms_norm


class Names(NamedTuple):
    """How a class calls the parts of its feed-forward network."""

    up: str
    down: str
    activation: str
    gate: str | None = None
    inner_dropout: str | None = None
    outer_dropout: str | None = None


_FEED_FORWARD = {
    "FFN": Names("lin1", "lin2", "activation", outer_dropout="dropout"),  # DistilBERT
    "GPT2MLP": Names("c_fc", "c_proj", "act", outer_dropout="dropout"),
    "GPTNeoMLP": Names("c_fc", "c_proj", "act", outer_dropout="dropout"),
    "LlamaMLP": Names("up_proj", "down_proj", "act_fn", gate="gate_proj"),
    "T5DenseActDense": Names("wi", "wo", "act", inner_dropout="dropout"),
    "T5DenseGatedActDense": Names("wi_1", "wo", "act", gate="wi_0", inner_dropout="dropout"),
    "ViTMLP": Names("fc1", "fc2", "activation_fn"),
}
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


def fused_class(kind: type[nn.Module]) -> tuple[type[nn.Module], str] | None:
    """(the subclass that computes the same on fused ops, what it uses) for a class of transformers, or None."""
    found = _FUSED.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None
    if found is None:
        return None
    method, function, words = found
    return _subclass(kind, method, function), words  # type: ignore[arg-type]


@functools.cache
def _subclass(kind: Any, method: str, function: Callable[..., Any]) -> type[nn.Module]:
    """``kind`` with one method that is ``function(module, kind's own method, ...)``."""
    own = getattr(kind, method)

    @functools.wraps(own)
    def fused(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, functools.partial(own, self), *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # The class is made here and has no name of its own to be found by.
        return _again, (kind,), vars(self)

    members = {method: fused, "fused_from": kind, "__reduce_ex__": reduce, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)


def _again(kind: type[nn.Module]) -> nn.Module:
    found = fused_class(kind)
    made: nn.Module = kind.__new__(kind if found is None else found[0])
    return made


def _weight(layer: nn.Module) -> torch.Tensor | None:
    """(out, in) of torch's Linear or transformers' Conv1D exactly, else None."""
    if changed(layer):
        return None
    if type(layer) is nn.Linear:
        return layer.weight
    if type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils":
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        return weight.t()
    return None


def _activation(module: nn.Module) -> str | None:
    """The op's name of an activation; None if it has none or a hook wants to see it called."""
    return None if not isinstance(module, nn.Module) or changed(module) else _ACTIVATIONS.get(type(module).__name__)


def _dropout(module: nn.Module, name: str | None) -> float | None:
    """The probability of a dropout step now, None where it is not torch's own."""
    if name is None:
        return 0.0
    step = getattr(module, name)
    if type(step) is not nn.Dropout or changed(step):
        return None
    return step.p if step.training else 0.0


def _feed_forward(module: Any, own: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    names = _FEED_FORWARD[type(module).__name__]
    up, down = getattr(module, names.up), getattr(module, names.down)
    gate = None if names.gate is None else getattr(module, names.gate)
    w1, w2, w_gate = _weight(up), _weight(down), None if gate is None else _weight(gate)
    activation, dropout_p = _activation(getattr(module, names.activation)), _dropout(module, names.inner_dropout)
    fits = w1 is not None and w2 is not None and activation is not None and dropout_p is not None and dropout_p < 1.0
    # T5 keeps its last weight in fp32 beside others in fp16; a gate's bias has no place in the op.
    if not fits or w2.dtype != w1.dtype or (gate is not None and (w_gate is None or gate.bias is not None)):  # type: ignore[union-attr]
        result: torch.Tensor = own(x)
        return result
    out = ffn(x, w1, up.bias, w2, down.bias, activation=activation, w_gate=w_gate, dropout_p=dropout_p)  # type: ignore[arg-type]
    if names.outer_dropout is not None:
        out = getattr(module, names.outer_dropout)(out)
    return out


def _intermediate(module: Any, own: Callable[..., Any], hidden_states: torch.Tensor) -> torch.Tensor:
    weight, activation = _weight(module.dense), _activation(module.intermediate_act_fn)
    if weight is None or activation is None:
        result: torch.Tensor = own(hidden_states)
        return result
    return linear_act(hidden_states, weight, module.dense.bias, activation)


def _add_norm(
    module: Any, own: Callable[..., Any], hidden_states: torch.Tensor, input_tensor: torch.Tensor
) -> torch.Tensor:
    norm = module.LayerNorm
    if type(norm) not in (nn.LayerNorm, LayerNorm) or changed(norm) or hidden_states.dtype != input_tensor.dtype:
        result: torch.Tensor = own(hidden_states, input_tensor)
        return result
    x = module.dropout(module.dense(hidden_states))
    if x.dtype != input_tensor.dtype:  # under autocast products are in low precision and the stream is not
        x = x.to(input_tensor.dtype)
    return layer_norm(x, norm.weight, norm.bias, norm.eps, input_tensor)[0]


def _rms(module: Any, own: Callable[..., Any], hidden_states: torch.Tensor) -> torch.Tensor:
    if hidden_states.dtype != module.weight.dtype:
        result: torch.Tensor = own(hidden_states)
        return result
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _gpt_neo_attention(
    module: Any,
    own: Callable[..., Any],
    query: torch.Tensor,  # (batch, heads, q_len, head_dim)
    key: torch.Tensor,  # (batch, heads, k_len, head_dim)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,  # (batch, 1, q_len, k_len), added to the scores
    head_mask: torch.Tensor | None = None,  # of transformers 4
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores are not scaled; a local layer sees its last window_size keys."""
    dropout_p = _dropout(module, "attn_dropout")
    if head_mask is not None or dropout_p is None:
        more = () if head_mask is None else (head_mask,)
        result: tuple[torch.Tensor, torch.Tensor] = own(query, key, value, attention_mask, *more)
        return result
    local = module.config.attention_layers[module.layer_id] == "local"
    options: dict[str, Any] = {
        "causal": "lower_right",
        "window": (module.config.window_size - 1, 0) if local else None,
        "bias": None if attention_mask is None else attention_mask.float(),
        "scale": 1.0,
    }
    if not (module.config.output_attentions or transformers_attention.records_attentions()):
        return attention(query, key, value, dropout_p=dropout_p, **options), None
    out, lse = attention(query, key, value, dropout_p=dropout_p, return_lse=True, **options)
    return out, F.dropout(attention_weights(query, key, lse, **options), dropout_p, dropout_p > 0)


_FUSED: dict[str, tuple[str, Callable[..., Any], str]] = {
    **dict.fromkeys(_FEED_FORWARD, ("forward", _feed_forward, "transfuse.ffn")),
    "FFN": ("ff_chunk", _feed_forward, "transfuse.ffn"),
    "BertIntermediate": ("forward", _intermediate, "transfuse.linear_act"),
    "RobertaIntermediate": ("forward", _intermediate, "transfuse.linear_act"),
    "ViTIntermediate": ("forward", _intermediate, "transfuse.linear_act"),
    "BertSelfOutput": ("forward", _add_norm, "transfuse.layer_norm of a sum"),
    "BertOutput": ("forward", _add_norm, "transfuse.layer_norm of a sum"),
    "RobertaSelfOutput": ("forward", _add_norm, "transfuse.layer_norm of a sum"),
    "RobertaOutput": ("forward", _add_norm, "transfuse.layer_norm of a sum"),
    "LlamaRMSNorm": ("forward", _rms, "transfuse.rms_norm"),
    "T5LayerNorm": ("forward", _rms, "transfuse.rms_norm"),
    "GPTNeoSelfAttention": ("_attn", _gpt_neo_attention, "transfuse.attention"),
}
"""Class -> (the method that is exchanged, for what, what that uses)."""
