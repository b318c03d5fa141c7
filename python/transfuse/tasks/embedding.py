"""One vector for a text: the model's last hidden states, pooled over the text's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from transfuse.errors import ArgumentError
from transfuse.generation.decode import evaluating
from transfuse.generation.prompt import counts_positions
from transfuse.models.tokenizer import Tokenizer, as_texts

if TYPE_CHECKING:
    from transfuse.models import Decoder, Encoder


@torch.no_grad()
def embed(
    model: Encoder | Decoder,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    batch_size: int = 32,
    pooling: str = "mean",
    normalize: bool = True,
    max_length: int | None = None,
) -> torch.Tensor:
    """Vectors whose cosine says how alike two texts are, if the model was trained for it.

    Texts of like length share a batch, so little is computed on padding; the order of the result is that of the texts.

    Args:
        model: an Encoder or Decoder. Put into eval mode for the duration.
        tokenizer: the model's.
        texts: one text or several.
        batch_size: texts at a time.
        pooling: what stands for the text: the ``mean`` or ``max`` over its tokens, the ``first`` of them (BERT's [CLS])
            or the ``last`` (decoders).
        normalize: scale every vector to length 1, so that a dot product is a cosine.
        max_length: cut longer texts to so many tokens; None: to what tokenizer and model allow.

    Returns:
        (texts, hidden_size) in the model's dtype, on its device; pooled in fp32.

    Raises:
        ArgumentError: pooling is unknown, batch_size or max_length below 1, a text without tokens, or a model of
            another kind.

    >>> import transfuse
    >>> from tokenizers import Tokenizer as Backend, models
    >>> vocab = {"[PAD]": 0, "a": 1, "b": 2, "c": 3}
    >>> tokenizer = transfuse.models.tokenizer.Tokenizer(Backend(models.BPE(vocab, [])))
    >>> model = transfuse.Encoder(transfuse.TransformerConfig("encoder", 4, 16, num_layers=1, num_heads=2))
    >>> vectors = embed(model, tokenizer, ["ab", "cab", "ab"], batch_size=2)
    >>> vectors.shape, torch.allclose(vectors @ vectors.T, torch.ones(3, 3)), torch.allclose(vectors[0], vectors[2])
    (torch.Size([3, 16]), False, True)
    """
    pool = _POOLS.get(pooling)
    if pool is None:
        raise ArgumentError(f"embed: pooling must be one of {', '.join(_POOLS)}, got {pooling!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ArgumentError(f"embed: batch_size must be a whole number of at least 1, got {batch_size!r}")
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ArgumentError("embed: expected an Encoder or a Decoder, got an encoder-decoder; give its .encoder")
    texts = as_texts("embed: texts", texts)
    limit = _limit(model, tokenizer) if max_length is None else max_length
    vectors: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    # A text's characters foretell its tokens well enough to sort by.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer([texts[i] for i in chosen], max_length=limit, padding_side="right", device=model.device)
            tokens = batch["attention_mask"].bool()
            if not bool(tokens.any(1).all()):
                empty = chosen[int(tokens.any(1).int().argmin())] if tokens.shape[1] else chosen[0]
                raise ArgumentError(f"embed: every text must hold a token, texts[{empty}] is {texts[empty]!r}")
            hidden = model(**batch).last_hidden_state
            pooled = pool(hidden.float(), tokens[..., None])
            if normalize:
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
            for i, vector in zip(chosen, pooled.to(hidden.dtype), strict=True):
                vectors[i] = vector
    if not texts:
        return torch.empty(0, model.config.hidden_size, dtype=model.dtype, device=model.device)
    return torch.stack(vectors)


# Each takes hidden states (batch, length, hidden_size) and tokens (batch, length, 1) bool, padding on the right.
_POOLS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": lambda hidden, tokens: (hidden * tokens).sum(1) / tokens.sum(1),
    "max": lambda hidden, tokens: hidden.masked_fill(~tokens, float("-inf")).amax(1),
    "first": lambda hidden, tokens: hidden[:, 0],
    "last": lambda hidden, tokens: hidden[torch.arange(len(hidden), device=hidden.device), tokens.sum(1)[:, 0] - 1],
}


def _limit(model: Encoder | Decoder, tokenizer: Tokenizer) -> int | None:
    """The longest input that both the tokenizer and the model were made for."""
    limits = [tokenizer.settings.max_length]
    if counts_positions(model.config):
        limits.append(model.config.max_positions)
    return min((n for n in limits if n is not None), default=None)
