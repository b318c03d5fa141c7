"""A second, straightforward transformer: one function of a configuration and a state_dict, formulas only.

It shares no code with the package but the configuration: no ops, no modules, no cache, no fusion. Masks are built
whole, heads are repeated, positions are counted in Python. It runs in the precision of the tensors that it is given.
"""

from __future__ import annotations

import math

import torch


def transformer(config, params, input_ids, attention_mask=None, decoder_input_ids=None, token_type_ids=None):
    """(last hidden state, logits or None, pooled or None, attentions of the last stack, cross-attentions)."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    maps, cross_maps = [], []
    if config.architecture != "encoder_decoder":
        decoder = config.architecture == "decoder"
        h = stack(config, params, input_ids, mask, decoder, maps=maps, types=token_type_ids)
        pooled = None
        if config.pooler:
            pooled = torch.tanh(h[:, 0] @ params["pooler.weight"].T + params["pooler.bias"])
        return h, logits(config, params, h) if decoder else None, pooled, maps, cross_maps
    encoder = {k.removeprefix("encoder."): v for k, v in params.items() if k.startswith("encoder.")}
    inner = {k.removeprefix("decoder."): v for k, v in params.items() if k.startswith("decoder.")}
    source = stack(config, encoder, input_ids, mask, False)
    ones = torch.ones_like(decoder_input_ids)
    h = stack(config, inner, decoder_input_ids, ones, True, source, mask, maps, cross_maps)
    return h, logits(config, inner, h), None, maps, cross_maps


def stack(c, p, ids, mask, decoder, source=None, source_mask=None, maps=None, cross_maps=None, types=None):
    second = source is not None
    layers = c.num_decoder_layers if second else c.num_layers
    heads = c.num_decoder_heads if second else c.num_heads
    maps = [] if maps is None else maps
    length = ids.shape[1]
    positions = [[max(0, sum(row[: i + 1]) - 1) for i in range(length)] for row in mask.tolist()]
    x = p["embeddings.token.weight"][ids] * c.embedding_scale
    x = x + position_embedding(c, p, positions).to(x.dtype)
    if c.type_vocab_size:
        x = x + p["embeddings.token_type.weight"][torch.zeros_like(ids) if types is None else types]
    if c.embedding_norm:
        x = norm(c, p, "embeddings.norm", x)
    bias = relative_bias(c, p, length, decoder) if c.position == "relative" else 0.0
    for i in range(layers):
        at = f"layers.{i}."
        allowed = visible(c, i, mask, length, decoder)

        def attend(y, at=at, allowed=allowed):
            return attention(c, p, at + "attention", y, y, heads, allowed, bias, positions, maps)

        def look(y, at=at):
            allowed = source_mask[:, None, None, :].bool()
            return attention(c, p, at + "cross_attention", y, source, heads, allowed, 0.0, None, cross_maps)

        def think(y, at=at):
            return feed_forward(c, p, at + "feed_forward", y)

        sublayers = [("attention", attend), ("cross_attention", look), ("feed_forward", think)]
        for name, sublayer in sublayers if second else sublayers[::2]:
            if c.norm_placement == "pre":
                x = x + sublayer(norm(c, p, f"{at}{name}_norm", x))
            else:
                x = norm(c, p, f"{at}{name}_norm", x + sublayer(x))
    return norm(c, p, "final_norm", x) if c.final_norm else x


def logits(c, p, h):
    table = p["embeddings.token.weight"] if c.tie_embeddings else p["lm_head.weight"]
    return (h * c.logit_scale) @ table.T + p.get("lm_head.bias", 0.0)


def norm(c, p, name, x):
    if c.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.norm_eps)
    return x * p[f"{name}.weight"] + p.get(f"{name}.bias", 0.0)


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)


def activate(c, z):
    if c.activation == "relu":
        return torch.where(z > 0, z, torch.zeros_like(z))
    if c.activation == "silu":
        return z / (1 + torch.exp(-z))
    if c.activation == "gelu":
        return z * (1 + torch.erf(z / math.sqrt(2))) / 2
    return z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2


def feed_forward(c, p, name, x):
    inner = linear(p, f"{name}.up", x)
    inner = activate(c, linear(p, f"{name}.gate", x)) * inner if c.gated else activate(c, inner)
    return linear(p, f"{name}.down", inner)


def visible(c, layer, mask, length, decoder):
    """(batch, 1, length, length) bool."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    allowed = (j <= i) if decoder else torch.ones(length, length, dtype=torch.bool)
    width = c.window
    if c.layer_pattern and c.layer_pattern[layer % len(c.layer_pattern)] == "global":
        width = None
    if width is not None:
        allowed = allowed & ((i - j < width) if decoder else ((i - j).abs() <= width // 2))
    return allowed & mask[:, None, None, :].bool()


def attention(c, p, name, x, context, heads, allowed, bias, positions, maps):
    kv_heads = max(1, c.num_kv_heads * heads // c.num_heads)
    q_rows, kv_rows = heads * c.head_dim, kv_heads * c.head_dim
    weight = torch.cat([p[f"{name}.{k}.weight"] for k in ("qkv", "q", "kv") if f"{name}.{k}.weight" in p])
    biases = [p[f"{name}.{k}.bias"] for k in ("qkv", "q", "kv") if f"{name}.{k}.bias" in p]
    offset = torch.cat(biases) if biases else torch.zeros(weight.shape[0], dtype=x.dtype)
    parts = [slice(0, q_rows), slice(q_rows, q_rows + kv_rows), slice(q_rows + kv_rows, q_rows + 2 * kv_rows)]

    def project(y, part, n):
        return (y @ weight[part].T + offset[part]).reshape(*y.shape[:2], n, c.head_dim).transpose(1, 2)

    q, k, v = project(x, parts[0], heads), project(context, parts[1], kv_heads), project(context, parts[2], kv_heads)
    if c.position == "rotary" and positions is not None:
        q, k = rotate(c, q, positions), rotate(c, k, positions)
    k, v = k.repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1)
    scores = q @ k.transpose(-1, -2) * (c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale)
    if c.softcap is not None:
        scores = c.softcap * torch.tanh(scores / c.softcap)
    scores = (scores + bias).masked_fill(~allowed, -math.inf)
    weights = torch.nan_to_num(torch.softmax(scores, -1), 0.0)
    maps.append(weights)
    return linear(p, f"{name}.out", (weights @ v).transpose(1, 2).flatten(2))


def position_embedding(c, p, positions):
    if c.position == "learned":
        return p["embeddings.position.weight"][torch.tensor(positions) + c.position_offset]
    if c.position != "sinusoidal":
        return torch.zeros(1)
    half = c.hidden_size // 2
    rows = []
    for row in positions:
        for t in row:
            angles = [t / 10000 ** (2 * i / c.hidden_size) for i in range(half)]
            sines, cosines = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
            mixed = [s for pair in zip(sines, cosines, strict=True) for s in pair]
            rows.append(sines + cosines if c.sinusoidal_layout == "halves" else mixed)
    return torch.tensor(rows, dtype=torch.float64).float().reshape(len(positions), -1, c.hidden_size)


def rotary_frequency(c, i):
    frequency = c.rope_theta ** (-2 * i / c.rotary_dim)
    s = c.rope_scaling
    if s is None:
        return frequency
    if s.kind == "linear":
        return frequency / s.factor
    wavelength = 2 * math.pi / frequency
    if wavelength < s.original_max_positions / s.high_freq_factor:
        return frequency
    if wavelength > s.original_max_positions / s.low_freq_factor:
        return frequency / s.factor
    smooth = (s.original_max_positions / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return (1 - smooth) * frequency / s.factor + smooth * frequency


def rotate(c, x, positions):
    """Dimension i and i + rotary_dim / 2 turn by position * frequency_i."""
    half = c.rotary_dim // 2
    angles = torch.tensor([[[t * rotary_frequency(c, i) for i in range(half)] for t in row] for row in positions])
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def relative_bias(c, p, length, decoder):
    """T5's buckets, one distance at a time."""
    table = p["relative_position.weight"]
    rows = [[table[bucket(c, j - i, decoder)] for j in range(length)] for i in range(length)]
    return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)[None]


def bucket(c, distance, decoder):
    n, start = c.relative_buckets, 0
    if decoder:
        distance = max(0, -distance)
    else:
        n //= 2
        start = n if distance > 0 else 0
        distance = abs(distance)
    exact = n // 2
    if distance < exact:
        return start + distance
    step = math.log(distance / exact) / math.log(c.relative_max_distance / exact) * (n - exact)
    return start + min(n - 1, exact + int(step))
