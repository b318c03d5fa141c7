"""One vector for a text: the model's last hidden states, pooled over the text's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from transfuse.errors import ArgumentError
from transfuse.models.base import TransformerModel
from transfuse.models.stack import Stack
from transfuse.models.task_heads import ModelWithHead
from transfuse.models.tokenizer import Tokenizer, as_texts
from transfuse.tasks.running import check_pair, longest, run

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
    progress: bool | None = None,
) -> torch.Tensor:
    """Vectors whose cosine says how alike two texts are, if the model was trained for it.

    Texts of like length share a batch, so little is computed on padding; the order of the result is that of the texts.

    Args:
        model: an Encoder or Decoder, or one with a task's head. Put into eval mode for the duration.
        tokenizer: the model's.
        texts: one text or several.
        batch_size: texts at a time.
        pooling: what stands for the text: the ``mean`` or ``max`` over its tokens, the ``first`` of them (BERT's [CLS])
            or the ``last`` (decoders).
        normalize: scale every vector to length 1, so that a dot product is a cosine.
        max_length: cut longer texts to so many tokens; None: to what tokenizer and model allow.
        progress: show a bar on standard error; None: on a terminal, if there is much to do.

    Returns:
        (texts, hidden_size) in the model's dtype, on its device; pooled in fp32.

    Raises:
        ArgumentError: pooling is unknown, batch_size or max_length below 1, a text without tokens, or a model of
            another kind. CheckpointError: the tokenizer is another model's.

    >>> import transfuse
    >>> from tokenizers import Tokenizer as Backend, models
    >>> vocab = {"[PAD]": 0, "a": 1, "b": 2, "c": 3}
    >>> tokenizer = transfuse.models.tokenizer.Tokenizer(Backend(models.BPE(vocab, [])))
    >>> model = transfuse.Encoder(transfuse.TransformerConfig("encoder", 4, 16, num_layers=1, num_heads=2))
    >>> vectors = embed(model, tokenizer, ["ab", "cab", "ab"], batch_size=2)
    >>> vectors.shape, torch.allclose(vectors @ vectors.T, torch.ones(3, 3)), torch.allclose(vectors[0], vectors[2])
    (torch.Size([3, 16]), False, True)
    """
    # A model with a task's head has the stack that makes vectors inside.
    body = model.body if isinstance(model, ModelWithHead) else model
    if isinstance(body, TransformerModel) and not isinstance(body, Stack):
        raise ArgumentError("embed: expected an Encoder or a Decoder, got an encoder-decoder; give its .encoder")
    check_pair("embed", body, tokenizer, (Stack,), "transfuse.from_pretrained(..., task='encoder')")
    pool = _POOLS.get(pooling) if isinstance(pooling, str) else None
    if pool is None:
        raise ArgumentError(f"embed: pooling must be one of {', '.join(_POOLS)}, got {pooling!r}")
    texts = as_texts("embed: texts", texts)
    limit = longest(body, tokenizer) if max_length is None else max_length
    encodings = [windows[0] for windows in tokenizer.windows(texts, max_length=limit)]
    if empty := [i for i, encoding in enumerate(encodings) if not encoding.ids]:
        raise ArgumentError(f"embed: every text must hold a token, texts[{empty[0]}] is {texts[empty[0]]!r}")
    vectors: list[torch.Tensor] = [torch.empty(0)] * len(texts)
    for chosen, batch, out in run("embed", body, tokenizer, encodings, batch_size, progress):
        assert out.last_hidden_state is not None
        hidden = out.last_hidden_state
        pooled = pool(hidden.float(), batch["attention_mask"].bool()[..., None])
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
