"""Encoders, decoders and encoder-decoders from one block; caches, heads, checkpoints."""
import importlib
_WHERE = {"ParameterCount": "base", "Block": "blocks", "KVCache": "cache", "RopeScaling": "config", "TransformerConfig": "config", "Decoder": "decoder", "Encoder": "encoder", "MaskedLM": "encoder_heads", "SequenceClassifier": "encoder_heads", "SpanClassifier": "encoder_heads", "TokenClassifier": "encoder_heads", "ModelOutput": "outputs", "Seq2Seq": "seq2seq", "from_pretrained": "pretrained", "save_pretrained": "pretrained", "load_tokenizer": "tokenizer_files", "Tokenizer": "tokenizer", "TokenizerSettings": "tokenizer"}
def __getattr__(name):
    if name in _WHERE: return getattr(importlib.import_module("transfuse.models." + _WHERE[name]), name)
    raise AttributeError(name)
