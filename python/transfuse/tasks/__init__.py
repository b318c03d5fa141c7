"""Texts in, answers out: what a model and its tokenizer do together.

A tokenizer is what :func:`transfuse.load_tokenizer` gives; the models are this package's.
"""

from __future__ import annotations

from transfuse.tasks.embedding import embed
from transfuse.tasks.text import generate, stream_text

__all__ = ["embed", "generate", "stream_text"]
