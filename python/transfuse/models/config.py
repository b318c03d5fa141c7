"""TransformerConfig: everything that tells one transformer from another, checked when it is made.

A model family (BERT, GPT-2, Llama, T5, Marian, BART, ...) is a set of these values, not another implementation.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transfuse.errors import ConfigError
from transfuse.nn.rotary import RopeScaling

__all__ = ["RopeScaling", "TransformerConfig"]

CHOICES = {
    "architecture": ("encoder", "decoder", "encoder_decoder"),
    "activation": ("relu", "gelu", "gelu_tanh", "silu"),
    "norm": ("layer", "rms"),
    "norm_placement": ("pre", "post"),
    "pooler_activation": ("tanh", "relu"),
    "position": ("none", "learned", "sinusoidal", "rotary", "relative"),
    "sinusoidal_layout": ("interleaved", "halves"),
}

# Bounds that no real model reaches, so that a damaged file fails here and not in the allocator.
_MAXIMA = {
    "vocab_size": 2**27,
    "decoder_vocab_size": 2**27,
    "hidden_size": 2**18,
    "num_layers": 4096,
    "num_decoder_layers": 4096,
    "num_heads": 4096,
    "num_kv_heads": 4096,
    "num_decoder_heads": 4096,
    "head_dim": 2**14,
    "decoder_head_dim": 2**14,
    "intermediate_size": 2**22,
    "decoder_intermediate_size": 2**22,
    "max_positions": 2**31,
    "position_offset": 2**16,
    "type_vocab_size": 2**20,
    "relative_buckets": 2**16,
    "relative_max_distance": 2**31,
    "window": 2**31,
}
# What an encoder_decoder's decoder may have of its own, and what it has otherwise.
_DECODER_TWINS = {
    "num_decoder_layers": "num_layers",
    "num_decoder_heads": "num_heads",
    "decoder_head_dim": "head_dim",
    "decoder_intermediate_size": "intermediate_size",
    "decoder_vocab_size": "vocab_size",
}
# Vaswani et al. 2017, table 3: name -> architecture, hidden_size, num_heads, dropout. All have 6 layers a stack.
_PRESETS = {
    "transformer": ("encoder_decoder", 512, 8, 0.1),
    "transformer-big": ("encoder_decoder", 1024, 16, 0.3),
    "transformer-decoder": ("decoder", 512, 8, 0.1),
}
MAX_PARAMETERS = 2 * 10**12
_MOST = 1e300  # a whole number beyond would not become a float

_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "bool": ("true or false", (bool,)),
    "str": ("a string", (str,)),
    "int | None": ("a whole number or None", (int, type(None))),
    "float | None": ("a number or None", (int, float, type(None))),
}


@dataclass(frozen=True)
class TransformerConfig:
    """One transformer, described completely. Values are checked here; 0 means "derive it" where the comment says so.

    Derived values are stored: ``dataclasses.replace(config, hidden_size=...)`` keeps head_dim and intermediate_size
    unless it sets them to 0 too.

    Raises:
        ConfigError: a value has a wrong type, is out of range, or does not fit another one.

    >>> config = TransformerConfig("decoder", vocab_size=256, hidden_size=64, num_layers=2, num_heads=4,
    ...                            num_kv_heads=2, activation="silu", gated=True, norm="rms", position="rotary")
    >>> config.head_dim, config.intermediate_size, config.num_parameters()
    (16, 256, 141120)
    >>> TransformerConfig.from_dict(config.to_dict()) == config
    True
    """

    architecture: str  # encoder | decoder | encoder_decoder
    vocab_size: int
    hidden_size: int
    num_layers: int  # of the encoder where there are both
    num_heads: int
    family: str = "transfuse"  # the checkpoint family it came from, for saving

    # sizes
    num_kv_heads: int = 0  # 0: num_heads; fewer are grouped queries (Ainslie et al. 2023)
    head_dim: int = 0  # 0: hidden_size // num_heads
    intermediate_size: int = 0  # 0: 4 * hidden_size
    num_decoder_layers: int = 0  # encoder_decoder, 0: num_layers
    num_decoder_heads: int = 0  # encoder_decoder, 0: num_heads
    decoder_head_dim: int = 0  # encoder_decoder, 0: head_dim
    decoder_intermediate_size: int = 0  # encoder_decoder, 0: intermediate_size
    decoder_vocab_size: int = 0  # encoder_decoder, 0: vocab_size

    # the block
    activation: str = "gelu"  # relu | gelu | gelu_tanh | silu
    gated: bool = False  # act(x W_gate) * (x W_up): GeGLU, SwiGLU (Shazeer 2020)
    norm: str = "layer"  # layer | rms
    norm_placement: str = "pre"  # pre: x + f(norm(x)); post: norm(x + f(x))
    norm_eps: float = 1e-5
    norm_bias: bool = True  # layer norm only
    final_norm: bool = True  # after the last layer; pre-norm models have one
    qkv_bias: bool = True
    out_bias: bool = True
    ffn_bias: bool = True
    wide_residual: bool = False  # in fp16: the stream, and what the FFN adds to it, in fp32 (T5's pass 65504)

    # attention
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim); T5 and GPT-Neo: 1.0
    scale_by_layer: bool = False  # layer i's scores also times 1 / (i + 1) (a GPT-2 variant)
    softcap: float | None = None  # cap * tanh(score / cap)
    window: int | None = None  # local layers: keys a token sees, itself among them; an encoder's: window // 2 a side
    layer_pattern: tuple[str, ...] = ()  # "global" | "local", repeated over the layers; (): local everywhere if window

    # positions
    position: str = "learned"  # none | learned | sinusoidal | rotary | relative
    max_positions: int = 512  # learned: usable rows; else advice to callers
    position_offset: int = 0  # learned: unused rows before position 0 (RoBERTa and BART: 2)
    sinusoidal_layout: str = "interleaved"  # sin, cos, sin, cos (2017 paper) or all sin then all cos ("halves": Marian)
    rope_theta: float = 10000.0
    rotary_dim: int = 0  # leading head dimensions that rotate; 0: head_dim
    rope_scaling: RopeScaling | None = None
    relative_buckets: int = 32
    relative_max_distance: int = 128

    # embeddings and heads
    embedding_scale: float = 1.0  # times the token embedding; 2017 paper: sqrt(hidden_size)
    embedding_norm: bool = False  # a norm on the summed embeddings (BERT, BART)
    type_vocab_size: int = 0  # token types (segments); 0: none
    token_types_are_tokens: bool = False  # token types are looked up in the token table (GPT-2)
    share_embeddings: bool = True  # encoder_decoder: one token table for both
    tie_embeddings: bool = True  # the output head is the token table
    lm_head_bias: bool = False
    logit_scale: float = 1.0  # times the hidden state before the head; tied T5 1.0: hidden_size ** -0.5
    pooler: bool = False  # encoder: act(W h_0 + b) of the first token (BERT)
    pooler_activation: str = "tanh"  # tanh | relu (DistilBERT's classifier)

    # dropout, in training mode only
    hidden_dropout: float = 0.0  # on what attention and FFN add to the stream, and on the embeddings
    embedding_dropout: float | None = None  # on the embeddings; None: hidden_dropout
    attention_dropout: float = 0.0  # on the attention probabilities
    ffn_dropout: float = 0.0  # on the FFN's inner activations
    classifier_dropout: float | None = None  # before a classifier, but not before one of spans; None: hidden_dropout

    # tokens and initialisation
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    decoder_start_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("layer_pattern", "eos_token_id"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        scaling: Any = self.rope_scaling  # a mapping when it comes from a file
        if isinstance(scaling, Mapping):
            object.__setattr__(self, "rope_scaling", _from_mapping(RopeScaling, scaling, "rope_scaling"))
        self._check_types()
        self._check_family()
        self._derive()
        self._check_ranges()
        self._check_fit()

    @property
    def is_encoder_decoder(self) -> bool:
        """True for an encoder with a decoder that attends to it."""
        return self.architecture == "encoder_decoder"

    @property
    def num_decoder_kv_heads(self) -> int:
        """Key/value heads of an encoder_decoder's decoder: with heads of its own it keeps the grouping ratio."""
        if self.num_decoder_heads == self.num_heads:
            return self.num_kv_heads
        return max(1, self.num_decoder_heads * self.num_kv_heads // self.num_heads)

    @property
    def dropout_of_embeddings(self) -> float:
        """embedding_dropout, or hidden_dropout where that is None."""
        return self.hidden_dropout if self.embedding_dropout is None else self.embedding_dropout

    @property
    def dropout_of_classifier(self) -> float:
        """classifier_dropout, or hidden_dropout where that is None."""
        return self.hidden_dropout if self.classifier_dropout is None else self.classifier_dropout

    def window_of(self, layer: int) -> int | None:
        """The sliding window of one layer, None where it attends globally."""
        if self.window is None or not self.layer_pattern:
            return self.window
        return self.window if self.layer_pattern[layer % len(self.layer_pattern)] == "local" else None

    def num_parameters(self) -> int:
        """Parameters of the Encoder, Decoder or Seq2Seq that this describes, without building it."""
        c, d = self, self.hidden_size
        norm = d * (1 + (c.norm == "layer" and c.norm_bias))

        def stack(layers: int, heads: int, kv_heads: int, dim: int, inner: int, vocab: int, cross: bool) -> int:
            q, kv = heads * dim, kv_heads * dim
            attention = d * (2 * q + 2 * kv) + c.qkv_bias * (q + 2 * kv) + c.out_bias * d
            ffn = (2 + c.gated) * d * inner + c.ffn_bias * ((1 + c.gated) * inner + d)
            block = (1 + cross) * attention + ffn + (2 + cross) * norm
            embedding = (vocab + c.type_vocab_size) * d + c.embedding_norm * norm
            embedding += (c.max_positions + c.position_offset) * d if c.position == "learned" else 0
            relative = c.relative_buckets * heads if c.position == "relative" else 0
            return layers * block + embedding + relative + c.final_norm * norm

        heads = (c.num_heads, c.num_kv_heads, c.head_dim)
        total = stack(c.num_layers, *heads, c.intermediate_size, c.vocab_size, False)
        total += (d * d + d) if c.pooler else 0
        if c.is_encoder_decoder:
            vocab = 0 if c.share_embeddings else c.decoder_vocab_size
            heads = (c.num_decoder_heads, c.num_decoder_kv_heads, c.decoder_head_dim)
            total += stack(c.num_decoder_layers, *heads, c.decoder_intermediate_size, vocab, True)
        if c.architecture != "encoder":
            total += (0 if c.tie_embeddings else c.decoder_vocab_size * d) + c.lm_head_bias * c.decoder_vocab_size
        return total

    @classmethod
    def preset(
        cls, name: str, vocab_size: int, *, hidden_size: int = 0, num_layers: int = 0, num_heads: int = 0
    ) -> TransformerConfig:
        """The original transformer (Vaswani et al. 2017): post-norm, relu, sinusoids, one token table for all.

        Args:
            name: "transformer" (6 + 6 layers, 512 wide, 8 heads), "transformer-big" (1024 wide, 16 heads), or
                "transformer-decoder", the first one's decoder by itself (Liu et al. 2018).
            vocab_size: tokens, of both languages together.
            hidden_size, num_layers, num_heads: 0: as in the paper.

        Returns:
            A configuration to use as it is or, with special tokens for example, through ``dataclasses.replace``.

        Raises:
            ConfigError: there is no preset of that name, or a size is out of range.

        >>> TransformerConfig.preset("transformer", 37000).num_parameters()
        63082496
        """
        if name not in _PRESETS:
            raise ConfigError(f"config: preset must be one of {', '.join(_PRESETS)}, got {name!r}")
        architecture, size, heads, dropout = _PRESETS[name]
        size = hidden_size or size
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=size,
            num_layers=num_layers or 6,
            num_heads=num_heads or heads,
            activation="relu",
            norm_placement="post",
            final_norm=False,
            position="sinusoidal",
            embedding_scale=size**0.5,
            hidden_dropout=dropout,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; ``from_dict`` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransformerConfig:
        """The configuration that these values describe; an unknown name is an error.

        >>> TransformerConfig.from_dict({"architecture": "encoder", "layers": 3})
        Traceback (most recent call last):
        transfuse.errors.ConfigError: config: unknown field 'layers' (did you mean 'num_layers'?)
        """
        return _from_mapping(cls, values, "config")

    def to_json(self) -> str:
        """The fields as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TransformerConfig:
        """The configuration in a JSON object, as ``to_json`` writes it."""
        try:
            values = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"config: not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"config: expected a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)

    def _check_types(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in CHOICES and value not in CHOICES[f.name]:
                raise ConfigError(f"config: {f.name} must be one of {', '.join(CHOICES[f.name])}, got {value!r}")
            kind = _KINDS.get(str(f.type))
            if kind is None:
                continue
            words, types = kind
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise ConfigError(f"config: {f.name} must be {words}, got {value!r}")
            if float in types and isinstance(value, int | float) and not abs(value) < _MOST:
                raise ConfigError(f"config: {f.name} must be finite, got {repr(value)[:40]}")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise ConfigError(f"config: rope_scaling must be a RopeScaling or None, got {self.rope_scaling!r}")
        if not isinstance(self.layer_pattern, tuple) or any(p not in ("global", "local") for p in self.layer_pattern):
            raise ConfigError(f"config: layer_pattern must hold 'global' and 'local' only, got {self.layer_pattern!r}")

    def _check_family(self) -> None:
        from transfuse.models.families import family_names  # which are made of configurations

        if self.family not in (names := family_names()):
            raise ConfigError(f"config: family must be one of {', '.join(names)}, got {self.family!r}")

    def _derive(self) -> None:
        def fill(name: str, value: int) -> None:
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)

        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config: {name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim == 0 and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"config: hidden_size must be a multiple of num_heads, got {self.hidden_size} and {self.num_heads}; "
                "give head_dim if the heads have another size"
            )
        fill("num_kv_heads", self.num_heads)
        fill("head_dim", self.hidden_size // self.num_heads)
        fill("intermediate_size", 4 * self.hidden_size)
        fill("rotary_dim", self.head_dim)
        for name in ("embedding_dropout", "classifier_dropout"):
            if getattr(self, name) == self.hidden_dropout:
                object.__setattr__(self, name, None)  # one spelling of one model
        for name, twin in _DECODER_TWINS.items():
            if self.is_encoder_decoder:
                fill(name, getattr(self, twin))
            else:  # one stack: dataclasses.replace(config, num_layers=...) must not leave an old copy behind
                object.__setattr__(self, name, getattr(self, twin))

    def _check_ranges(self) -> None:
        zero_is_fine = ("position_offset", "type_vocab_size")
        for name, most in _MAXIMA.items():
            value = getattr(self, name)
            least = 0 if name in zero_is_fine else 1
            if value is not None and not least <= value <= most:
                raise ConfigError(f"config: {name} must be between {least} and {most}, got {value}")
        for name in (f"{part}_dropout" for part in ("hidden", "embedding", "attention", "ffn", "classifier")):
            if not 0.0 <= (getattr(self, name) or 0.0) < 1.0:
                raise ConfigError(f"config: {name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("norm_eps", "rope_theta", "softcap", "initializer_range"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"config: {name} must be above 0, got {value}")
        self._check_token_ids()

    def _check_token_ids(self) -> None:
        size = max(self.vocab_size, self.decoder_vocab_size)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            for i in value if isinstance(value, tuple) else (value,):
                if i is None:
                    continue
                if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < size:
                    raise ConfigError(f"config: {name} must be a token id from 0 to {size - 1}, got {value!r}")

    def _check_fit(self) -> None:
        decoder = (self.num_decoder_heads, self.num_decoder_kv_heads)
        for heads, kv_heads in ((self.num_heads, self.num_kv_heads), decoder):
            if heads % kv_heads:
                raise ConfigError(f"config: num_heads must be a multiple of num_kv_heads, got {heads} and {kv_heads}")
        most = min(self.head_dim, self.decoder_head_dim)
        if self.position == "rotary" and (self.rotary_dim % 2 or self.rotary_dim > most):
            raise ConfigError(f"config: rotary_dim must be even and at most head_dim ({most}), got {self.rotary_dim}")
        if self.position == "sinusoidal" and self.hidden_size % 2:
            raise ConfigError(f"config: sinusoidal positions need an even hidden_size, got {self.hidden_size}")
        if self.position == "relative" and (self.relative_buckets % 4 or self.relative_buckets < 4):
            raise ConfigError(f"config: relative_buckets must be a multiple of 4, got {self.relative_buckets}")
        if self.position == "relative" and self.relative_max_distance <= self.relative_buckets // 2:
            raise ConfigError(
                f"config: relative_max_distance must exceed relative_buckets / 2 ({self.relative_buckets // 2}), "
                f"got {self.relative_max_distance}"
            )
        if self.wide_residual and (self.norm, self.norm_placement, self.final_norm) != ("rms", "pre", True):
            raise ConfigError("config: wide_residual needs norm 'rms', norm_placement 'pre' and final_norm")
        if "local" in self.layer_pattern and self.window is None:
            raise ConfigError("config: layer_pattern has local layers, which need window; give its number of keys")
        if self.token_types_are_tokens and self.type_vocab_size:
            raise ConfigError(
                f"config: token_types_are_tokens needs no table of types, got type_vocab_size {self.type_vocab_size}"
            )
        if self.pooler and self.architecture != "encoder":
            raise ConfigError(f"config: pooler belongs to an encoder, got architecture {self.architecture!r}")
        if self.is_encoder_decoder and self.share_embeddings and self.decoder_vocab_size != self.vocab_size:
            raise ConfigError(
                f"config: share_embeddings needs one vocabulary, got vocab_size {self.vocab_size} and "
                f"decoder_vocab_size {self.decoder_vocab_size}; set share_embeddings=False"
            )
        if self.num_parameters() > MAX_PARAMETERS:
            raise ConfigError(
                f"config: these sizes make {self.num_parameters():.3g} parameters, the limit is {MAX_PARAMETERS:.3g}; "
                "check vocab_size, hidden_size, intermediate_size, max_positions and the number of layers"
            )


def _from_mapping(cls: type[Any], values: Mapping[str, Any], what: str) -> Any:
    """Builds a dataclass from a mapping; names that it lacks or misses become one clear error."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what}: expected a mapping of field to value, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.5)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(f"{what}: unknown field {str(name)!r}{hint}")
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
    missing = [n for n in required if n not in values]
    if missing:
        raise ConfigError(f"{what}: missing {', '.join(missing)}")
    return cls(**values)
