"""Words for the gaps in a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transfuse.errors import ArgumentError
from transfuse.models import MaskedLM
from transfuse.models.tokenizer import Tokenizer, as_texts
from transfuse.tasks.running import at_least, check_pair, longest, run


@dataclass(frozen=True)
class Filling:
    """What a gap may hold: the token as text, its id, how likely it is, and the whole text with it in place."""

    token: str
    token_id: int
    score: float
    text: str


def fill_mask(
    model: MaskedLM,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    top_k: int = 5,
    targets: Sequence[str] | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> list[list[list[Filling]]]:
    """The likeliest tokens for each mask token in each text. Several in one text are filled independently.

    Args:
        model: a MaskedLM.
        tokenizer: the model's; its ``settings.special["mask"]`` is the text that stands for a gap ("[MASK]", "<mask>").
        texts: one text or several, each with a gap.
        top_k: how many tokens a gap.
        targets: choose among these words only, each a single token; scores stay those among all tokens.
        batch_size: texts at a time; those of like length share a batch.
        progress: show a bar on standard error; None: on a terminal, if there is much to do.

    Returns:
        for each text, in their order, for each of its gaps, the likeliest tokens, best first.

    Raises:
        ArgumentError: the model is of another kind, the tokenizer has no mask token, a text has no gap or is too long,
            a target is not one token.
        CheckpointError: the tokenizer is another model's.

    >>> import transfuse
    >>> from transfuse.models.tokenizer import TokenizerSettings
    >>> from tokenizers import Tokenizer as Backend, models
    >>> backend = Backend(models.BPE({"a": 0, "b": 1, "_": 2}, []))
    >>> _ = backend.add_special_tokens(["_"])
    >>> tokenizer = transfuse.models.tokenizer.Tokenizer(backend, TokenizerSettings({"mask": "_"}))
    >>> model = MaskedLM(transfuse.TransformerConfig("encoder", 3, 16, num_layers=1, num_heads=2))
    >>> [[len(fillings) for fillings in gaps] for gaps in fill_mask(model, tokenizer, ["a_b", "_a_"], top_k=2)]
    [[2], [2, 2]]
    """
    check_pair("fill_mask", model, tokenizer, (MaskedLM,), "transfuse.from_pretrained(..., task='masked-lm')")
    at_least("fill_mask", "top_k", top_k)
    texts = as_texts("fill_mask: texts", texts)
    mask = tokenizer.mask_token_id
    if mask is None:
        raise ArgumentError("fill_mask: the tokenizer has no mask token; the model was not trained to fill gaps")
    allowed = None if targets is None else _target_ids(tokenizer, targets)
    encodings = [windows[0] for windows in tokenizer.windows(texts)]
    limit = longest(model, tokenizer)
    for i, encoding in enumerate(encodings):
        if mask not in encoding.ids:
            name = tokenizer.settings.special["mask"]
            raise ArgumentError(f"fill_mask: every text must hold the gap {name}, texts[{i}] is {texts[i]!r}")
        if limit is not None and len(encoding.ids) > limit:
            raise ArgumentError(
                f"fill_mask: texts[{i}] has {len(encoding.ids)} tokens, the model takes {limit}; cut it"
            )
    found: list[list[list[Filling]]] = [[] for _ in texts]
    for chosen, batch, out in run("fill_mask", model, tokenizer, encodings, batch_size, progress):
        assert out.logits is not None
        for i, row, logits in zip(chosen, batch["input_ids"], out.logits, strict=True):
            ids = encodings[i].ids
            gaps = (row == mask).nonzero()[:, 0]
            scores = logits[gaps].float().softmax(-1)  # (gaps, vocab_size)
            if allowed is not None:
                scores = scores[:, allowed]
            best = scores.topk(min(top_k, scores.shape[-1]))
            for gap, values, tokens in zip(gaps.tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
                chosen_ids = tokens if allowed is None else [allowed[token] for token in tokens]
                # Where another gap stays open, it is to be seen in the text.
                found[i].append(
                    [
                        Filling(
                            tokenizer.decode([token], skip_special_tokens=False),
                            token,
                            score,
                            tokenizer.decode([*ids[:gap], token, *ids[gap + 1 :]], skip_special_tokens=len(gaps) == 1),
                        )
                        for token, score in zip(chosen_ids, values, strict=True)
                    ]
                )
    return found


def _target_ids(tokenizer: Tokenizer, targets: Sequence[str]) -> list[int]:
    """The id of each target, which must be a token by itself."""
    ids = []
    for target in as_texts("fill_mask: targets", targets):
        found = tokenizer.encode(target, add_special_tokens=False)
        if len(found) != 1 or found[0] == tokenizer.unk_token_id:
            raise ArgumentError(
                f"fill_mask: every target must be one token of the vocabulary, {target!r} is "
                f"{', '.join(tokenizer.tokens(found)) or 'none'}"
            )
        ids.append(found[0])
    if not ids:
        raise ArgumentError("fill_mask: expected at least one target, got none; None chooses among all tokens")
    return ids
