"""The modules: torch.nn's twins by weights and results, attention, feed-forward, rotary and other positions."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from model_cases import one_thread  # noqa: F401 (a fixture)
from oracle import judge, to_fp64
from transfuse.errors import ArgumentError, ConfigError, DtypeError
from transfuse.models import TransformerConfig
from transfuse.models.blocks import Block, BlockInputs
from transfuse.nn import (
    ActivatedLinear,
    Attention,
    FeedForward,
    LayerNorm,
    RelativePositionBias,
    RMSNorm,
    RopeScaling,
    RotaryEmbedding,
    SinusoidalPositions,
    apply_rotary,
)
from transfuse.nn.positions import relative_buckets, sinusoids
from transfuse.nn.rotary import rotary_frequencies

NORMS = [(LayerNorm, nn.LayerNorm), (RMSNorm, nn.RMSNorm)]


def same_weights(ours, theirs):
    """Random parameters in both, by state_dict in both directions."""
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("shape", [(16,), (3, 16)], ids=["last", "last-two"])
@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"elementwise_affine": False}], ids=["default", "eps", "plain"])
@pytest.mark.parametrize("ours, theirs", NORMS, ids=["LayerNorm", "RMSNorm"])
def test_norms_equal_torch(ours, theirs, options, shape):
    a, b = same_weights(ours(shape, **options), theirs(shape, **options))
    x = torch.randn(2, 5, *shape)
    torch.testing.assert_close(a(x), b(x))
    residual = torch.randn_like(x)
    y, summed = a(x, residual=residual)
    assert torch.equal(summed, x + residual)
    torch.testing.assert_close(y, b(x + residual))
    assert isinstance(a, theirs)


def test_layer_norm_without_bias():
    a, b = same_weights(LayerNorm(16, bias=False), nn.LayerNorm(16, bias=False))
    x = torch.randn(2, 16)
    torch.testing.assert_close(a(x), b(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_default_epsilon(dtype):
    """At inputs this small the result is all epsilon."""
    x = torch.full((1, 4), 1e-4 if dtype != torch.float64 else 1e-8, dtype=dtype)
    torch.testing.assert_close(RMSNorm(4, dtype=dtype)(x), nn.RMSNorm(4, dtype=dtype)(x))


@pytest.mark.parametrize("ours, theirs", NORMS, ids=["LayerNorm", "RMSNorm"])
def test_norm_shape_errors(ours, theirs):
    with pytest.raises(ArgumentError, match=r"must have shape \(4,\), got \(3,\)|weight must have shape"):
        ours(3)(torch.randn(2, 4))
    with pytest.raises(ArgumentError, match=r"must end in shape \(2, 3\), got \(3, 2\)"):
        ours((2, 3))(torch.randn(3, 2))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_feed_forward(activation, gated, bias):
    module = FeedForward(12, 20, activation=activation, gated=gated, bias=bias)
    act = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU()}[activation]

    def formula(m, x):
        up = m.up(x)
        return m.down(act(m.gate(x)) * up if gated else act(up))

    x = torch.randn(2, 3, 12)
    truth, plain = formula(copy.deepcopy(module).double(), x.double()), formula(module, x)
    verdict = judge("out", module(x), truth, plain, size=4.0)
    assert verdict.ok, verdict
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_feed_forward_dropout_in_training_only():
    module = FeedForward(12, 2000, dropout=0.5)
    x = torch.randn(4, 12)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    with pytest.raises(ArgumentError, match="activation must be one of relu, gelu, gelu_tanh, silu, got 'tanh'"):
        FeedForward(12, 20, activation="tanh")


def test_activated_linear():
    a, b = same_weights(ActivatedLinear(5, 3, activation="silu"), nn.Linear(5, 3))
    x = torch.randn(4, 5)
    torch.testing.assert_close(a(x), nn.functional.silu(b(x)))
    with pytest.raises(ArgumentError, match="activation must be one of"):
        ActivatedLinear(5, 3, activation="tanh")


def copy_attention(ours, theirs):
    """nn.MultiheadAttention's weights into an Attention's."""
    with torch.no_grad():
        theirs.in_proj_bias.normal_()
        theirs.out_proj.bias.normal_()
        d = theirs.embed_dim
        if ours.cross:
            ours.q.load_state_dict({"weight": theirs.in_proj_weight[:d], "bias": theirs.in_proj_bias[:d]})
            ours.kv.load_state_dict({"weight": theirs.in_proj_weight[d:], "bias": theirs.in_proj_bias[d:]})
        else:
            ours.qkv.load_state_dict({"weight": theirs.in_proj_weight, "bias": theirs.in_proj_bias})
        ours.out.load_state_dict(theirs.out_proj.state_dict())


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_self_attention_equals_torch(causal):
    ours, theirs = Attention(24, 4, causal=causal), nn.MultiheadAttention(24, 4, batch_first=True)
    copy_attention(ours, theirs)
    x, keep = torch.randn(3, 6, 24), torch.tensor([6, 4, 1])[:, None] > torch.arange(6)
    hidden = torch.ones(6, 6).triu(1).bool() if causal else None
    expected, weights = theirs(x, x, x, key_padding_mask=~keep, attn_mask=hidden, average_attn_weights=False)
    got, ours_weights = ours(x, mask=keep[:, None, None], return_weights=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours_weights, weights)
    alone, none = ours(x, mask=keep[:, None, None])
    assert none is None
    torch.testing.assert_close(alone, expected)


def test_cross_attention_equals_torch():
    ours, theirs = Attention(24, 4, cross=True), nn.MultiheadAttention(24, 4, batch_first=True)
    copy_attention(ours, theirs)
    x, context = torch.randn(3, 6, 24), torch.randn(3, 9, 24)
    torch.testing.assert_close(ours(x, context=context)[0], theirs(x, context, context)[0])
    wide = Attention(24, 4, cross=True, context_size=10, num_kv_heads=2)
    assert wide(x, context=torch.randn(3, 5, 10))[0].shape == x.shape


def test_attention_sizes_and_errors():
    layer = Attention(24, 4, num_kv_heads=2, head_dim=10)
    assert layer.split_sizes == (40, 20, 20)
    assert layer.qkv.weight.shape == (80, 24)
    assert layer(torch.randn(1, 3, 24))[0].shape == (1, 3, 24)
    with pytest.raises(ArgumentError, match="num_heads must be a multiple of num_kv_heads, got 4 and 3"):
        Attention(24, 4, num_kv_heads=3)
    with pytest.raises(ArgumentError, match="hidden_size must be a multiple of num_heads, got 24 and 5"):
        Attention(24, 5)
    with pytest.raises(ArgumentError, match="cross-attention cannot be causal"):
        Attention(24, 4, cross=True, causal=True)
    cross = Attention(24, 4, cross=True, context_size=10)
    with pytest.raises(ArgumentError, match="cross-attention needs context"):
        cross(torch.randn(1, 3, 24))
    with pytest.raises(ArgumentError, match=r"context must have shape \(batch, length, 10\), got \(1, 3, 24\)"):
        cross(torch.randn(1, 3, 24), context=torch.randn(1, 3, 24))
    with pytest.raises(ArgumentError, match="context belongs to cross-attention"):
        layer(torch.randn(1, 3, 24), context=torch.randn(1, 3, 24))
    for wrong, got in [
        (torch.randn(3, 24), r"\(3, 24\)"),
        (torch.randn(1, 3, 20), r"\(1, 3, 20\)"),
        (None, "NoneType"),
    ]:
        with pytest.raises(ArgumentError, match=rf"x must have shape \(batch, length, 24\), got {got}"):
            layer(wrong)
    with pytest.raises(DtypeError, match=r"x must be torch\.float32 like the weights, got torch\.float16"):
        layer(torch.randn(1, 3, 24).half())


def block_config(architecture, placement, activation):
    return TransformerConfig(
        architecture, 10, 24, 1, 4, intermediate_size=40, norm_placement=placement, activation=activation
    )


def copy_layer(block, layer, cross):
    """nn.TransformerEncoderLayer's or DecoderLayer's weights into a Block's."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    copy_attention(block.attention, layer.self_attn)
    norms = [block.attention_norm, block.feed_forward_norm]
    if cross:
        copy_attention(block.cross_attention, layer.multihead_attn)
        norms.insert(1, block.cross_attention_norm)
    for i, norm in enumerate(norms):
        norm.load_state_dict(getattr(layer, f"norm{i + 1}").state_dict())
    block.feed_forward.up.load_state_dict(layer.linear1.state_dict())
    block.feed_forward.down.load_state_dict(layer.linear2.state_dict())


def run_block(block, x, inputs):
    added, stream = block(x, None, inputs)
    return added if stream is None else added + stream


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_block_equals_torch_encoder_layer(placement, activation):
    layer = nn.TransformerEncoderLayer(24, 4, 40, 0.0, activation, batch_first=True, norm_first=placement == "pre")
    block = Block(block_config("encoder", placement, activation), 0, decoder=False)
    copy_layer(block, layer, cross=False)
    x, keep = torch.randn(3, 6, 24), torch.tensor([6, 4, 1])[:, None] > torch.arange(6)
    with torch.no_grad():
        got = run_block(block, x, BlockInputs(mask=keep[:, None, None]))
        plain = layer.train()(x, src_key_padding_mask=~keep)  # in training mode: torch's slow, exact path
        truth = copy.deepcopy(layer).double()(x.double(), src_key_padding_mask=~keep)
    verdict = judge("out", got[keep], truth[keep], plain[keep], size=4.0)
    assert verdict.ok, verdict


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_block_equals_torch_decoder_layer(placement, activation):
    layer = nn.TransformerDecoderLayer(24, 4, 40, 0.0, activation, batch_first=True, norm_first=placement == "pre")
    block = Block(block_config("encoder_decoder", placement, activation), 0, decoder=True)
    copy_layer(block, layer, cross=True)
    x, context = torch.randn(3, 6, 24), torch.randn(3, 8, 24)
    keep = torch.tensor([8, 5, 1])[:, None] > torch.arange(8)
    future = torch.ones(6, 6).triu(1).bool()
    with torch.no_grad():
        got = run_block(block, x, BlockInputs(context=context, context_mask=keep[:, None, None]))
        plain = layer(x, context, tgt_mask=future, memory_key_padding_mask=~keep)
        wide = copy.deepcopy(layer).double()
        truth = wide(x.double(), context.double(), tgt_mask=future, memory_key_padding_mask=~keep)
    verdict = judge("out", got, truth, plain, size=4.0)
    assert verdict.ok, verdict


def test_blocks_pass_on_a_pair():
    """What a pre-norm block leaves open is closed by the next one: the sum may also be made in between."""
    config = block_config("encoder", "pre", "gelu")
    first, second = (Block(config, 0, decoder=False) for _ in range(2))
    x, inputs = torch.randn(2, 5, 24), BlockInputs()
    added, stream = first(x, None, inputs)
    open_pair, closed = second(added, stream, inputs), second(added + stream, None, inputs)
    torch.testing.assert_close(open_pair[0] + open_pair[1], closed[0] + closed[1], rtol=0, atol=0)


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_rotary_depends_on_distance_alone(dim):
    rotary = RotaryEmbedding(dim, theta=100.0)
    q, k = torch.randn(1, 1, 1, dim, dtype=torch.float64), torch.randn(1, 1, 1, dim, dtype=torch.float64)

    def score(i, j):
        turned = [apply_rotary(x, *rotary(torch.tensor([[t]]), torch.float64)) for x, t in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(5, 2), score(1003, 1000), rtol=1e-6, atol=1e-6)  # frequencies are fp32
    torch.testing.assert_close(score(7, 7), (q * k).sum())
    assert not torch.isclose(score(5, 2), score(5, 3))


def test_rotary_far_positions_in_bf16():
    """Angles are fp32 whatever the model's dtype: bf16 cannot tell position 32767 from 32768."""
    rotary = RotaryEmbedding(64).to(torch.bfloat16)
    cos, _ = rotary(torch.tensor([[32767, 32768]]), torch.bfloat16)
    angle = torch.tensor([32767.0, 32768.0], dtype=torch.float64)[:, None] * rotary_frequencies(64).double()
    # an fp32 product of this size is off by at most half a unit in the last place, 2 ** -10
    assert (cos[0, :, 0, :32].double() - angle.cos()).abs().max() <= 2**-9 + 2**-9
    assert not rotary.state_dict()
    assert not list(rotary.buffers())


def test_llama3_frequencies():
    """Short wavelengths stay, long ones stretch by the factor, and it is continuous between."""
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 1024)
    plain, scaled = rotary_frequencies(64, 1e5), rotary_frequencies(64, 1e5, scaling)
    wavelength = 2 * math.pi / plain
    assert torch.equal(scaled[wavelength < 256], plain[wavelength < 256])
    torch.testing.assert_close(scaled[wavelength > 1024], plain[wavelength > 1024] / 8)
    between = (wavelength > 256) & (wavelength < 1024)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()
    assert torch.equal(rotary_frequencies(64, 1e5, RopeScaling("linear", 4.0)), plain / 4)


def test_what_is_kept_between_calls_follows_the_device_and_survives_copies():
    rotary, sinusoidal = RotaryEmbedding(8), SinusoidalPositions(8)
    positions = torch.arange(5)[None]
    expected = rotary(positions)[0], sinusoidal(positions, 5)
    assert rotary(positions.to("meta"))[0].is_meta
    assert sinusoidal(positions.to("meta"), 5).is_meta
    for twin in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        assert torch.equal(twin(rotary)(positions)[0], expected[0])
        assert torch.equal(twin(sinusoidal)(positions, 5), expected[1])


def test_fake_tensors_leave_nothing_behind():
    from torch._subclasses import FakeTensorMode

    rotary, sinusoidal = RotaryEmbedding(8), SinusoidalPositions(8)
    with FakeTensorMode():
        positions = torch.arange(5)[None]
        assert rotary(positions)[0].shape == (1, 5, 1, 8)
        assert sinusoidal(positions, 5).shape == (1, 5, 8)
    positions = torch.arange(5)[None]
    assert rotary(positions)[0].isfinite().all()
    assert sinusoidal(positions, 5).isfinite().all()


@pytest.mark.parametrize("layout", ["interleaved", "halves"])
def test_sinusoids(layout):
    table = sinusoids(torch.arange(6000), 16, layout)
    for position in (0, 1, 77, 5999):
        for i in range(8):
            angle = position / 10000 ** (2 * i / 16)
            row = table[position]
            sine, cosine = (row[2 * i], row[2 * i + 1]) if layout == "interleaved" else (row[i], row[8 + i])
            assert abs(sine.item() - math.sin(angle)) <= 2**-24
            assert abs(cosine.item() - math.cos(angle)) <= 2**-24
    module = SinusoidalPositions(16, layout)
    positions = torch.randint(0, 300, (2, 9))
    assert torch.equal(module(positions), module(positions, 300))
    assert torch.equal(module(positions, 300), table[positions])
    assert not module.state_dict()


@pytest.mark.parametrize("bidirectional", [True, False], ids=["encoder", "decoder"])
@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 20), (4, 9)])
def test_relative_bias(bidirectional, buckets, distance):
    """Every element is the table's row of its bucket; gradients add up over the elements that share one."""
    module = RelativePositionBias(3, buckets, distance, bidirectional=bidirectional)
    for q_len, past, k_len in ((40, 0, 40), (1, 30, 31), (7, 5, 12), (3, 0, 50)):
        bias = module(q_len, k_len, past)
        distances = torch.arange(k_len)[None] - torch.arange(past, past + q_len)[:, None]
        expected = module.weight[relative_buckets(distances, bidirectional, buckets, distance)].permute(2, 0, 1)[None]
        assert torch.equal(bias, expected)
        g = torch.randn_like(bias)
        a, b = (torch.autograd.grad(x, module.weight, g)[0] for x in (bias, expected))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bidirectional", [True, False], ids=["encoder", "decoder"])
def test_relative_buckets_equal_hugging_face(bidirectional):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = torch.arange(-2000, 2000)
    for buckets, most in ((32, 128), (16, 64), (4, 8)):
        expected = t5.T5Attention._relative_position_bucket(distances, bidirectional, buckets, most)
        assert torch.equal(relative_buckets(distances, bidirectional, buckets, most), expected)


def test_position_errors():
    with pytest.raises(ConfigError, match="dim must be even and at least 2, got 5"):
        RotaryEmbedding(5)
    with pytest.raises(ConfigError, match="dim must be even and at least 2, got 5"):
        SinusoidalPositions(5)
    with pytest.raises(ConfigError, match="layout must be 'interleaved' or 'halves', got 'both'"):
        SinusoidalPositions(4, "both")
    with pytest.raises(ConfigError, match="num_buckets must be a positive multiple of 4, got 6"):
        RelativePositionBias(2, 6, bidirectional=True)
    with pytest.raises(ArgumentError, match=r"3 \+ 2 query positions exceed 4 keys"):
        RelativePositionBias(2, bidirectional=False)(2, 4, 3)


@pytest.mark.parametrize(
    "module, inputs",
    [
        (Attention(24, 4, num_kv_heads=2, causal=True), (2, 5, 24)),
        (FeedForward(24, 48, gated=True, bias=False), (2, 5, 24)),
        (LayerNorm(24), (2, 5, 24)),
        (RMSNorm(24), (2, 5, 24)),
    ],
    ids=["Attention", "FeedForward", "LayerNorm", "RMSNorm"],
)
def test_modules_compile_copy_and_travel(module, inputs):
    def run(m, x):
        out = m(x)
        return out[0] if isinstance(out, tuple) else out

    x = torch.randn(inputs)
    expected = run(module, x)
    torch.testing.assert_close(run(torch.compile(module, fullgraph=True, backend="aot_eager"), x), expected)
    assert torch.equal(run(copy.deepcopy(module), x), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(module)), x), expected)
    wide = run(copy.deepcopy(module).double(), to_fp64(x))
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), expected)
    assert repr(module)
