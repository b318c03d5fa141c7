"""Texts in, answers out: what a model and its tokenizer do together.

A tokenizer is what :func:`transfuse.load_tokenizer` gives; the models are this package's. Texts are taken one or many
at a time, those of like length share a batch, and results come in the order of the texts.
"""

from __future__ import annotations

from transfuse.tasks.answering import Answer, answer
from transfuse.tasks.classification import Entity, Label, classify, token_classify
from transfuse.tasks.embedding import embed
from transfuse.tasks.filling import Filling, fill_mask
from transfuse.tasks.maps import AttentionMap, attention_maps, head_view_arguments
from transfuse.tasks.text import count_tokens, generate, stream_text, summarize, translate

__all__ = [
    "Answer",
    "AttentionMap",
    "Entity",
    "Filling",
    "Label",
    "answer",
    "attention_maps",
    "classify",
    "count_tokens",
    "embed",
    "fill_mask",
    "generate",
    "head_view_arguments",
    "stream_text",
    "summarize",
    "token_classify",
    "translate",
]
