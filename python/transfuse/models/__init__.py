"""Encoders, decoders and encoder-decoders from one block; caches, heads, checkpoints, tokenizers."""

from __future__ import annotations

from transfuse.models.base import ParameterCount
from transfuse.models.blocks import Block
from transfuse.models.cache import KVCache
from transfuse.models.config import RopeScaling, TransformerConfig
from transfuse.models.decoder import Decoder, DecoderBody
from transfuse.models.encoder import Encoder
from transfuse.models.outputs import ModelOutput
from transfuse.models.pretrained import from_pretrained, save_pretrained
from transfuse.models.seq2seq import Seq2Seq, Seq2SeqBody
from transfuse.models.task_heads import (
    MaskedLM,
    NextSentencePredictor,
    Pretraining,
    SequenceClassifier,
    SpanClassifier,
    TokenClassifier,
)
from transfuse.models.tokenizer import Tokenizer, TokenizerSettings
from transfuse.models.tokenizer_files import load_tokenizer

__all__ = [
    "Block",
    "Decoder",
    "DecoderBody",
    "Encoder",
    "KVCache",
    "MaskedLM",
    "ModelOutput",
    "NextSentencePredictor",
    "ParameterCount",
    "Pretraining",
    "RopeScaling",
    "Seq2Seq",
    "Seq2SeqBody",
    "SequenceClassifier",
    "SpanClassifier",
    "TokenClassifier",
    "Tokenizer",
    "TokenizerSettings",
    "TransformerConfig",
    "from_pretrained",
    "load_tokenizer",
    "save_pretrained",
]
