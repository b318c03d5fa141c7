"""Small models of transformers, the same in this package, and what transformers' own generate makes of them."""

from __future__ import annotations

import functools
import tempfile

import pytest
import torch

import transfuse

transformers = pytest.importorskip("transformers")
V = 61  # vocabulary of every model here
EOS = [3, 11, 17, 40, 52]  # several, so that random texts end


def _configs():
    t, ids = transformers, {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
    seq2seq = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
               "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "d_model": 32, "vocab_size": V, "init_std": 0.5,
               "max_position_embeddings": 64, "decoder_start_token_id": 4}  # fmt: skip
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=96, **ids)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(
            vocab_size=V, n_positions=96, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **ids)),
        "gpt_neo": lambda: t.GPTNeoForCausalLM(t.GPTNeoConfig(
            vocab_size=V, max_position_embeddings=96, hidden_size=32, num_layers=2, num_heads=4, window_size=4,
            attention_types=[[["global", "local"], 1]], initializer_range=0.3, **ids)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(
            vocab_size=V, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=4,
            initializer_factor=3.0, **ids)),
        "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**seq2seq, **ids)),
        "marian": lambda: t.MarianMTModel(t.MarianConfig(**seq2seq, **ids)),
    }  # fmt: skip


@functools.cache
def pair(family):
    """(ours, theirs) of a family, with the same random weights."""
    torch.manual_seed(7)
    theirs = _configs()[family]().eval()
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = transfuse.from_pretrained(folder)
    return ours, theirs


def prompts(lengths, family="llama"):
    """Random prompts of these lengths as (ids, mask): padded on the left for a decoder, else on the right."""
    left = family in ("llama", "gpt2", "gpt_neo")
    ids, mask = torch.zeros(len(lengths), max(lengths)).long(), torch.zeros(len(lengths), max(lengths)).long()
    for i, n in enumerate(lengths):
        where = slice(-n, None) if left else slice(None, n)
        ids[i, where], mask[i, where] = torch.randint(5, V, (n,)), 1
    return ids, mask


def expected(theirs, ids, mask=None, **knobs):
    """transformers' own generate, told to do what the knobs say and nothing that its defaults add."""
    plain = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **knobs}
    if plain["do_sample"]:
        plain = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, **plain}
    if theirs.config.is_encoder_decoder:
        plain = {"decoder_start_token_id": 4, **plain}
    mask = torch.ones_like(ids) if mask is None else mask
    return theirs.generate(ids, attention_mask=mask, **plain)
