"""One block expresses every family: logits equal Hugging Face's for seeded random models, padding included.

Both sides run in fp64; Hugging Face computes rotary angles, scores or norms of some in fp32 even then, so the
difference may be what a run of ours in fp32 errs.
The renamings here are for these tests; checkpoints are read by ``transfuse.models.families``.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch

from model_cases import one_thread, padding  # noqa: F401 (a fixture)
from transfuse.models import Decoder, Encoder, MaskedLM, RopeScaling, Seq2Seq, TransformerConfig

transformers = pytest.importorskip("transformers")

BIASES = [(r"\.(q|k|v)_proj\.", r".\1."), (r"\.out_proj\.", ".out.")]
BERT = [
    (r"^(bert|roberta)\.", "encoder."),
    (r"encoder\.encoder\.layer\.", "encoder.layers."),
    (r"^encoder\.layer\.", "layers."),
    (r"attention\.self\.(q|k|v)\w+", r"attention.\1"),
    (r"attention\.output\.dense", "attention.out"),
    (r"attention\.output\.LayerNorm", "attention_norm"),
    (r"intermediate\.dense", "feed_forward.up"),
    (r"(layers\.\d+)\.output\.dense", r"\1.feed_forward.down"),
    (r"(layers\.\d+)\.output\.LayerNorm", r"\1.feed_forward_norm"),
    (r"embeddings\.(word|position|token_type)_embeddings", r"embeddings.\1"),
    (r"embeddings\.word\.", "embeddings.token."),
    (r"embeddings\.LayerNorm", "embeddings.norm"),
    (r"pooler\.dense", "pooler"),
    (r"cls\.predictions\.transform\.", "head."),
    (r"cls\.predictions\.", "head."),
    (r"head\.LayerNorm|lm_head\.layer_norm", "head.norm"),
    (r"^lm_head\.", "head."),
]
DISTILBERT = [
    (r"^distilbert\.", "encoder."),
    (r"transformer\.layer\.", "layers."),
    (r"attention\.(q|k|v|out)_lin", r"attention.\1"),
    (r"sa_layer_norm", "attention_norm"),
    (r"output_layer_norm", "feed_forward_norm"),
    (r"ffn\.lin1", "feed_forward.up"),
    (r"ffn\.lin2", "feed_forward.down"),
    (r"embeddings\.(word|position)_embeddings", r"embeddings.\1"),
    (r"embeddings\.word\.", "embeddings.token."),
    (r"embeddings\.LayerNorm", "embeddings.norm"),
    (r"vocab_transform", "head.dense"),
    (r"vocab_layer_norm", "head.norm"),
    (r"vocab_projector", "head"),
]
GPT = [
    (r"^transformer\.", ""),
    (r"^wte\.", "embeddings.token."),
    (r"^wpe\.", "embeddings.position."),
    (r"^h\.", "layers."),
    (r"\.attn\.attention\.", ".attention."),
    (r"\.attn\.c_attn", ".attention.qkv"),
    (r"\.attn\.c_proj", ".attention.out"),
    (r"\.ln_1", ".attention_norm"),
    (r"\.ln_2", ".feed_forward_norm"),
    (r"\.mlp\.c_fc", ".feed_forward.up"),
    (r"\.mlp\.c_proj", ".feed_forward.down"),
    (r"^ln_f", "final_norm"),
    *BIASES,
]
LLAMA = [
    (r"^model\.", ""),
    (r"^embed_tokens", "embeddings.token"),
    (r"^norm\.", "final_norm."),
    (r"self_attn\.", "attention."),
    (r"\.o_proj", ".out"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "feed_forward_norm"),
    (r"mlp\.(gate|up|down)_proj", r"feed_forward.\1"),
    *BIASES,
]
BART = [
    (r"^model\.shared\.", "encoder.embeddings.token."),
    (r"^model\.", ""),
    (r"embed_tokens", "embeddings.token"),
    (r"embed_positions", "embeddings.position"),
    (r"layernorm_embedding", "embeddings.norm"),
    (r"self_attn\.", "attention."),
    (r"encoder_attn\.", "cross_attention."),
    (r"self_attn_layer_norm", "attention_norm"),
    (r"encoder_attn_layer_norm", "cross_attention_norm"),
    (r"(\d)\.final_layer_norm", r"\1.feed_forward_norm"),
    (r"\.layer_norm\.", ".final_norm."),
    (r"fc1", "feed_forward.up"),
    (r"fc2", "feed_forward.down"),
    (r"^final_logits_bias", "decoder.lm_head.bias"),
    *BIASES,
]
T5 = [
    (r"^shared\.", "encoder.embeddings.token."),
    (r"^lm_head\.", "decoder.lm_head."),
    (r"\.block\.", ".layers."),
    (r"embed_tokens", "embeddings.token"),
    (r"layers\.0\.layer\.0\.SelfAttention\.relative_attention_bias", "relative_position"),
    (r"layer\.\d\.SelfAttention", "attention"),
    (r"layer\.\d\.EncDecAttention", "cross_attention"),
    (r"attention\.o\.", "attention.out."),
    (r"layer\.\d\.DenseReluDense\.(wi_1|wi)\.", "feed_forward.up."),
    (r"layer\.\d\.DenseReluDense\.wi_0\.", "feed_forward.gate."),
    (r"layer\.\d\.DenseReluDense\.wo\.", "feed_forward.down."),
    (r"(encoder\.layers\.\d+)\.layer\.0\.layer_norm", r"\1.attention_norm"),
    (r"(encoder\.layers\.\d+)\.layer\.1\.layer_norm", r"\1.feed_forward_norm"),
    (r"(decoder\.layers\.\d+)\.layer\.0\.layer_norm", r"\1.attention_norm"),
    (r"(decoder\.layers\.\d+)\.layer\.1\.layer_norm", r"\1.cross_attention_norm"),
    (r"(decoder\.layers\.\d+)\.layer\.2\.layer_norm", r"\1.feed_forward_norm"),
    (r"final_layer_norm", "final_norm"),
]

SIZES = {"vocab_size": 50, "hidden_size": 24, "num_layers": 3, "num_heads": 4, "intermediate_size": 40}
POST = {"norm_placement": "post", "final_norm": False, "embedding_norm": True}
BERT_SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
SEQ2SEQ_SIZES = {
    "vocab_size": 50,
    "d_model": 24,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
    "eos_token_id": 2,
}
NO_BIAS = {"qkv_bias": False, "out_bias": False, "ffn_bias": False}


def bert():
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**BERT_SIZES))
    config = TransformerConfig("encoder", **SIZES, **POST, type_vocab_size=2, norm_eps=1e-12)
    return theirs, MaskedLM(config), BERT


def bert_pooled():
    theirs = transformers.BertModel(transformers.BertConfig(**BERT_SIZES, hidden_act="gelu_new"))
    changes = {"type_vocab_size": 2, "norm_eps": 1e-12, "pooler": True, "activation": "gelu_tanh"}
    return theirs, Encoder(TransformerConfig("encoder", **SIZES, **POST, **changes)), BERT


def roberta():
    config = transformers.RobertaConfig(**BERT_SIZES, max_position_embeddings=42, type_vocab_size=1, pad_token_id=1)
    changes = {"type_vocab_size": 1, "norm_eps": 1e-12, "max_positions": 40, "position_offset": 2}
    ours = MaskedLM(TransformerConfig("encoder", **SIZES, **POST, **changes))
    return transformers.RobertaForMaskedLM(config), ours, BERT


def distilbert():
    config = transformers.DistilBertConfig(vocab_size=50, dim=24, n_layers=3, n_heads=4, hidden_dim=40)
    ours = MaskedLM(TransformerConfig("encoder", **SIZES, **POST, norm_eps=1e-12))
    return transformers.DistilBertForMaskedLM(config), ours, DISTILBERT


def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=24, n_layer=3, n_head=4, n_inner=40, n_positions=64)
    ours = Decoder(TransformerConfig("decoder", **SIZES, activation="gelu_tanh", max_positions=64))
    return transformers.GPT2LMHeadModel(config), ours, GPT


def gpt_neo():
    config = transformers.GPTNeoConfig(
        vocab_size=50, hidden_size=24, num_layers=4, num_heads=4, intermediate_size=40, window_size=3,
        attention_types=[[["global", "local"], 2]], max_position_embeddings=64,
    )  # fmt: skip
    changes = {"window": 3, "layer_pattern": ("global", "local"), "attention_scale": 1.0, "qkv_bias": False}
    sizes = {**SIZES, "num_layers": 4}
    ours = Decoder(TransformerConfig("decoder", **sizes, **changes, activation="gelu_tanh", max_positions=64))
    return transformers.GPTNeoForCausalLM(config), ours, GPT


def llama(bias=False, tied=True, scaling=None, theirs=None):
    rope = {"rope_theta": 500.0, "rope_scaling": theirs}
    if not transformers.__version__.startswith("4."):
        rope = {"rope_parameters": {"rope_theta": 500.0, **(theirs or {})}}
    config = transformers.LlamaConfig(
        **BERT_SIZES, **rope, num_key_value_heads=2, attention_bias=bias, mlp_bias=bias, tie_word_embeddings=tied,
        rms_norm_eps=1e-5, max_position_embeddings=64,
    )  # fmt: skip
    changes = {"num_kv_heads": 2, "activation": "silu", "gated": True, "norm": "rms", "position": "rotary"}
    changes |= {"qkv_bias": bias, "out_bias": bias, "ffn_bias": bias, "tie_embeddings": tied}
    ours = Decoder(TransformerConfig("decoder", **SIZES, **changes, rope_theta=500.0, rope_scaling=scaling))
    return transformers.LlamaForCausalLM(config), ours, LLAMA


def llama_untied_with_biases():
    return llama(bias=True, tied=False)


def llama_linear():
    return llama(scaling=RopeScaling("linear", 2.0), theirs={"rope_type": "linear", "factor": 2.0})


def llama_31():
    theirs = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    return llama(scaling=RopeScaling("llama3", 8.0, original_max_positions=32), theirs=theirs)


def marian():
    config = transformers.MarianConfig(
        **SEQ2SEQ_SIZES, activation_function="silu", scale_embedding=True, max_position_embeddings=64
    )
    changes = {"norm_placement": "post", "final_norm": False, "activation": "silu", "position": "sinusoidal"}
    changes |= {"sinusoidal_layout": "halves", "embedding_scale": 24**0.5, "lm_head_bias": True}
    ours = Seq2Seq(TransformerConfig("encoder_decoder", **SIZES, **changes, num_decoder_layers=2))
    return transformers.MarianMTModel(config), ours, BART


def bart():
    config = transformers.BartConfig(**SEQ2SEQ_SIZES, max_position_embeddings=64)
    changes = {"position_offset": 2, "max_positions": 64, "lm_head_bias": True, "num_decoder_layers": 2}
    ours = Seq2Seq(TransformerConfig("encoder_decoder", **SIZES, **POST, **changes))
    return transformers.BartForConditionalGeneration(config), ours, BART


def t5(kind, scaled, activation, gated):
    config = transformers.T5Config(
        vocab_size=50, d_model=24, d_kv=5, d_ff=40, num_layers=3, num_decoder_layers=2, num_heads=4,
        feed_forward_proj=kind, tie_word_embeddings=scaled,
    )  # fmt: skip
    theirs = transformers.T5ForConditionalGeneration(config)
    tied = theirs.lm_head.weight is theirs.shared.weight  # transformers 5 ties T5 1.1 too, unless a file says otherwise
    changes = {"norm": "rms", "norm_eps": 1e-6, "position": "relative", "attention_scale": 1.0, "head_dim": 5}
    changes |= {"logit_scale": 24**-0.5 if scaled else 1.0, "tie_embeddings": tied, "num_decoder_layers": 2}
    changes |= {"activation": activation, "gated": gated}
    ours = Seq2Seq(TransformerConfig("encoder_decoder", **SIZES, **NO_BIAS, **changes))
    return theirs, ours, T5


def t5_10():
    return t5("relu", True, "relu", False)


def t5_11():
    return t5("gated-gelu", False, "gelu_tanh", True)


DECODERS = [gpt2, gpt_neo, llama, llama_untied_with_biases, llama_linear, llama_31]
FAMILIES = [bert, bert_pooled, roberta, distilbert, *DECODERS, marian, bart, t5_10, t5_11]


def converted(theirs, ours, names):
    """Their state_dict under our names: renamed, q, k, v joined, GPT-2's transposed weights turned."""
    turned = {n for n, m in theirs.named_modules() if type(m).__name__ == "Conv1D"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        tensor = tensor.T if name.rsplit(".", 1)[0] in turned and tensor.dim() == 2 else tensor
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    wanted = ours.state_dict()
    for name in wanted:
        if (found := re.match(r"(.*)\.(qkv|kv)\.(weight|bias)$", name)) and name not in state:
            state[name] = torch.cat([state[f"{found[1]}.{part}.{found[3]}"] for part in found[2]])
    return {n: state[n].reshape(p.shape) for n, p in wanted.items()}


@pytest.fixture(params=FAMILIES, ids=lambda f: f.__name__)
def pair(request):
    """A model of Hugging Face's with every parameter random, and ours with the same weights, in fp64."""
    theirs, ours, names = request.param()
    theirs = theirs.double().eval()
    frozen = {n for n, m in theirs.named_modules() if "Sinusoidal" in type(m).__name__}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.rsplit(".", 1)[0] not in frozen:
                p.add_(torch.randn_like(p) * (0.15 if p.dim() > 1 else 0.2))
        if hasattr(theirs, "final_logits_bias"):
            theirs.final_logits_bias.normal_()
    ours = ours.double().eval()
    ours.load_state_dict(converted(theirs, ours, names))
    return theirs, ours


def inputs_for(ours, side=None):
    ids = torch.randint(3, 50, (3, 12))
    inputs = {"input_ids": ids}
    if side is not None:
        mask = padding(3, 12, side)
        inputs = {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}
    if isinstance(ours, Seq2Seq):
        inputs["decoder_input_ids"] = torch.randint(3, 50, (3, 9))
    return inputs


def assert_near(got, expected, narrow):
    """Equal, but for what a run in fp32 (``narrow``) errs: Hugging Face's fp64 model is partly one."""
    allowed = 2 * (narrow.double() - got).abs().max().item() + 1e-12
    torch.testing.assert_close(got, expected, rtol=0, atol=allowed)
    assert allowed < 1e-4 * expected.abs().max().item()


@torch.no_grad()
def test_equals_hugging_face(pair):
    theirs, ours = pair
    inputs = inputs_for(ours)
    expected, got = theirs(**inputs, output_hidden_states=True), ours(**inputs, output_hidden_states=True)
    narrow = copy.deepcopy(ours).float()(**inputs, output_hidden_states=True)
    for name in ("logits", "last_hidden_state", "pooler_output", "encoder_last_hidden_state"):
        if getattr(expected, name, None) is not None:
            assert_near(getattr(got, name), getattr(expected, name), getattr(narrow, name))
    states = expected.decoder_hidden_states if isinstance(ours, Seq2Seq) else expected.hidden_states
    for a, b, c in zip(got.hidden_states[1:], states[1:], narrow.hidden_states[1:], strict=True):
        assert_near(a, b, c)


@torch.no_grad()
def test_padded_batch_equals_hugging_face(pair):
    theirs, ours = pair
    inputs = inputs_for(ours, "right")
    expected = theirs(**inputs)
    name = "logits" if hasattr(expected, "logits") else "last_hidden_state"
    real = slice(None) if isinstance(ours, Seq2Seq) else inputs["attention_mask"].bool()
    outputs = (ours(**inputs), expected, copy.deepcopy(ours).float()(**inputs))
    assert_near(*(getattr(o, name)[real] for o in outputs))


@pytest.mark.parametrize("pair", DECODERS, indirect=True, ids=lambda f: f.__name__)
@torch.no_grad()
def test_left_padded_generation_equals_hugging_face(pair):
    theirs, ours = pair
    inputs = inputs_for(ours, "left")
    knobs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(**inputs, **knobs, eos_token_id=None)
    assert torch.equal(ours.generate(**inputs, **knobs, eos_token_id=()), expected)


def test_every_parameter_is_accounted_for(pair):
    theirs, ours = pair
    extra = sum(b.numel() for n, b in theirs.named_buffers() if n == "final_logits_bias")
    frozen = sum(p.numel() for p in theirs.parameters() if not p.requires_grad)
    assert ours.num_parameters().total == sum(p.numel() for p in theirs.parameters()) + extra - frozen
