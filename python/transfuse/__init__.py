"""transfuse: fused transformer kernels in CUDA and Triton, composed into encoders, decoders and encoder-decoders.

The ops (:func:`attention`, :func:`layer_norm`, :func:`ffn`, ...) and :func:`use_backend` are here at import; models,
generation and tasks are imported when first named, so that ``import transfuse`` costs little over ``import torch``
and touches neither CUDA nor the network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from transfuse import _interrupt  # isort: skip  # before torch is imported
from transfuse._version import __version__
from transfuse.backends import backends, use_backend
from transfuse.errors import TransfuseError
from transfuse.ops import (
    attention,
    attention_decode,
    attention_varlen,
    attention_weights,
    causal_softmax,
    ffn,
    layer_norm,
    linear_act,
    rms_norm,
    scaled_dot_product_attention,
)

if TYPE_CHECKING:
    from transfuse import generation, models, nn, tasks, viz
    from transfuse.ahead import warmup
    from transfuse.generation import GenerationConfig
    from transfuse.integrations import patch, patched, register_with_transformers, unpatch
    from transfuse.models import Decoder, Encoder, Seq2Seq, TransformerConfig, from_pretrained, load_tokenizer
    from transfuse.ops._tuning import autotune

_LAZY = {
    "Decoder": "transfuse.models",
    "Encoder": "transfuse.models",
    "GenerationConfig": "transfuse.generation",
    "Seq2Seq": "transfuse.models",
    "TransformerConfig": "transfuse.models",
    "autotune": "transfuse.ops._tuning",
    "from_pretrained": "transfuse.models",
    "load_tokenizer": "transfuse.models",
    "patch": "transfuse.integrations",
    "patched": "transfuse.integrations",
    "register_with_transformers": "transfuse.integrations",
    "unpatch": "transfuse.integrations",
    "warmup": "transfuse.ahead",
}
_SUBMODULES = ("generation", "models", "nn", "tasks", "viz")

__all__ = [
    "Decoder",
    "Encoder",
    "GenerationConfig",
    "Seq2Seq",
    "TransformerConfig",
    "TransfuseError",
    "__version__",
    "attention",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "autotune",
    "backends",
    "causal_softmax",
    "ffn",
    "from_pretrained",
    "generation",
    "layer_norm",
    "linear_act",
    "load_tokenizer",
    "models",
    "nn",
    "patch",
    "patched",
    "register_with_transformers",
    "rms_norm",
    "scaled_dot_product_attention",
    "tasks",
    "unpatch",
    "use_backend",
    "viz",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"transfuse.{name}")
    else:
        raise AttributeError(f"module 'transfuse' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
