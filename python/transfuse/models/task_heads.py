"""Encoders and decoders with a task's head: masked tokens, classes of a text, classes of tokens, spans."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from transfuse.errors import ArgumentError, ConfigError
from transfuse.models.base import TransformerModel
from transfuse.models.config import TransformerConfig
from transfuse.models.decoder import DecoderBody
from transfuse.models.encoder import Encoder
from transfuse.models.heads import MaskedLMHead
from transfuse.models.outputs import ModelOutput, last_hidden
from transfuse.models.seq2seq import Seq2SeqBody
from transfuse.models.stack import check_not_empty


class ModelWithHead(TransformerModel):
    """A stack and, in a subclass, what reads its output.

    The stack is under ``encoder``, ``decoder`` or ``seq2seq``, as the configuration says. An encoder-decoder's decoder
    reads the same text again, shifted right (BART, T5).
    """

    takes_decoders = True
    encoder: Encoder
    decoder: DecoderBody
    seq2seq: Seq2SeqBody

    def __init__(self, config: TransformerConfig, dtype: torch.dtype | None) -> None:
        self._check(config, dtype)
        super().__init__()
        self.config = config
        if config.architecture == "decoder" and self.takes_decoders:
            self.decoder = DecoderBody(config, device="meta", dtype=dtype)
        elif config.is_encoder_decoder and self.takes_decoders:
            self.seq2seq = Seq2SeqBody(config, device="meta", dtype=dtype)
        else:
            self.encoder = Encoder(config, device="meta", dtype=dtype)

    @property
    def body(self) -> Encoder | DecoderBody | Seq2SeqBody:
        """The stack without its head."""
        if hasattr(self, "seq2seq"):
            return self.seq2seq
        return self.decoder if self.config.architecture == "decoder" else self.encoder

    def read(self, out: ModelOutput, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> ModelOutput:
        """Adds the head's scores to what the stack gave for these tokens."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """The stack's output with the head's scores; arguments as of :meth:`Encoder.forward`.

        An encoder-decoder has no token types and counts positions itself: None for both.
        """
        body, also = self.body, {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        if not isinstance(body, Seq2SeqBody):
            out = body(input_ids, attention_mask, token_type_ids, position_ids, **also)
        elif token_type_ids is None and position_ids is None:
            out = body(input_ids, attention_mask, body.shift_right(input_ids), **also)
        else:
            raise ArgumentError("token_type_ids, position_ids: an encoder-decoder takes neither; leave them out")
        return self.read(out, input_ids, attention_mask)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout before a classifier."""
        return F.dropout(x, self.config.dropout_of_classifier, self.training)


class MaskedLM(ModelWithHead):
    """Scores of every token of the vocabulary at every position: BERT's pre-training task.

    >>> config = TransformerConfig("encoder", vocab_size=100, hidden_size=32, num_layers=2, num_heads=4)
    >>> MaskedLM(config).eval()(torch.tensor([[5, 6, 7]])).logits.shape
    torch.Size([1, 3, 100])
    """

    takes_decoders = False

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, dtype)
        self.head = MaskedLMHead(config, dtype=dtype)
        self._materialise(device, dtype)

    def read(self, out: ModelOutput, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> ModelOutput:
        """logits: (batch, length, vocab_size)."""
        return replace(out, logits=self.head(last_hidden(out), self.encoder.embeddings.token.weight))


class Pretraining(MaskedLM):
    """BERT's two pre-training tasks at once: masked tokens, and whether the second sentence follows the first.

    Raises:
        ConfigError: the configuration has no pooler.

    >>> config = TransformerConfig("encoder", vocab_size=100, hidden_size=32, num_layers=2, num_heads=4, pooler=True)
    >>> out = Pretraining(config).eval()(torch.tensor([[5, 6, 7]]))
    >>> out.prediction_logits.shape, out.seq_relationship_logits.shape
    (torch.Size([1, 3, 100]), torch.Size([1, 2]))
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device="meta", dtype=dtype)
        _needs_pooler(type(self).__name__, config)
        self.classifier = _classifier("Pretraining", config, 2, dtype)
        self._materialise(device, dtype)

    def read(self, out: ModelOutput, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> ModelOutput:
        """logits: (batch, length, vocab_size), seq_relationship_logits: (batch, 2)."""
        out = super().read(out, input_ids, attention_mask)
        return replace(out, seq_relationship_logits=self.classifier(_pooled(out)))


class NextSentencePredictor(ModelWithHead):
    """Scores of whether the second sentence follows the first (0) or not (1).

    Raises:
        ConfigError: the configuration has no pooler.

    >>> config = TransformerConfig("encoder", vocab_size=100, hidden_size=32, num_layers=2, num_heads=4, pooler=True)
    >>> NextSentencePredictor(config).eval()(torch.tensor([[5, 6, 7]])).logits.shape
    torch.Size([1, 2])
    """

    takes_decoders = False

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, dtype)
        _needs_pooler(type(self).__name__, config)
        self.classifier = _classifier("NextSentencePredictor", config, 2, dtype)
        self._materialise(device, dtype)

    def read(self, out: ModelOutput, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> ModelOutput:
        """logits: (batch, 2)."""
        return replace(out, logits=self.classifier(_pooled(out)))


class SequenceClassifier(ModelWithHead):
    """Scores of a text's classes.

    An encoder's are read from its pooled first token, a decoder's from the last token, which saw all others (which one
    it is follows from the mask, and from pad_token_id where the configuration has one), an encoder-decoder's from the
    last end token, pooled by a matrix of its own.

    Raises:
        ConfigError: an encoder's configuration has no pooler, or num_labels is below 1.

    >>> config = TransformerConfig("encoder", vocab_size=100, hidden_size=32, num_layers=2, num_heads=4, pooler=True)
    >>> SequenceClassifier(config, num_labels=3).eval()(torch.tensor([[5, 6, 7]])).logits.shape
    torch.Size([1, 3])
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_labels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, dtype)
        decodes = config.architecture == "decoder"
        self.pooler: nn.Linear | None = None
        if config.is_encoder_decoder:
            self.pooler = nn.Linear(config.hidden_size, config.hidden_size, device="meta", dtype=dtype)
        elif not decodes:
            _needs_pooler("SequenceClassifier", config)
        self.classifier = _classifier("SequenceClassifier", config, num_labels, dtype, bias=not decodes)
        self._materialise(device, dtype)

    def read(self, out: ModelOutput, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> ModelOutput:
        """logits: (batch, num_labels)."""
        if self.pooler is not None:
            end = _last_end(last_hidden(out), input_ids, self.config.eos_token_id)
            pooled = torch.tanh(self.pooler(self._drop(end)))
            return replace(out, pooler_output=pooled, logits=self.classifier(self._drop(pooled)))
        if self.config.architecture != "decoder":
            return replace(out, logits=self.classifier(self._drop(_pooled(out))))
        last = _last_tokens(input_ids, attention_mask, self.config.pad_token_id)
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        return replace(out, logits=self.classifier(last_hidden(out)[rows, last]))


class TokenClassifier(ModelWithHead):
    """Scores of every token's classes.

    Raises:
        ConfigError: num_labels is below 1.

    >>> config = TransformerConfig("encoder", vocab_size=100, hidden_size=32, num_layers=2, num_heads=4)
    >>> TokenClassifier(config, num_labels=5).eval()(torch.tensor([[5, 6, 7]])).logits.shape
    torch.Size([1, 3, 5])
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_labels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, dtype)
        self.classifier = _classifier("TokenClassifier", config, num_labels, dtype)
        self._materialise(device, dtype)

    def read(self, out: ModelOutput, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> ModelOutput:
        """logits: (batch, length, num_labels)."""
        return replace(out, logits=self.classifier(self._drop(last_hidden(out))))


class SpanClassifier(ModelWithHead):
    """Scores of where an answer starts and ends: extractive question answering.

    >>> config = TransformerConfig("encoder", vocab_size=100, hidden_size=32, num_layers=2, num_heads=4)
    >>> SpanClassifier(config).eval()(torch.tensor([[5, 6, 7]])).start_logits.shape
    torch.Size([1, 3])
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, dtype)
        self.classifier = _classifier("SpanClassifier", config, 2, dtype)
        self._materialise(device, dtype)

    def read(self, out: ModelOutput, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> ModelOutput:
        """start_logits, end_logits: (batch, length) each."""
        start, end = self.classifier(last_hidden(out)).unbind(-1)
        return replace(out, start_logits=start, end_logits=end)


def _classifier(
    name: str, config: TransformerConfig, labels: int, dtype: torch.dtype | None, bias: bool = True
) -> nn.Linear:
    if isinstance(labels, bool) or not isinstance(labels, int) or not 1 <= labels <= 2**24:
        raise ConfigError(f"{name}: num_labels must be between 1 and {2**24}, got {labels!r}")
    return nn.Linear(config.hidden_size, labels, bias=bias, device="meta", dtype=dtype)


def _needs_pooler(name: str, config: TransformerConfig) -> None:
    if not config.pooler:
        raise ConfigError(f"{name}: reads the pooled first token; set pooler=True")


def _pooled(out: ModelOutput) -> torch.Tensor:
    assert out.pooler_output is not None
    return out.pooler_output


def _last_end(states: torch.Tensor, ids: torch.Tensor, eos: int | tuple[int, ...] | None) -> torch.Tensor:
    """(batch, hidden_size): the state at each row's last end token. On a GPU nobody waits to see that a row has one."""
    if eos is None:
        raise ArgumentError("SequenceClassifier: reads the last end token, and the configuration has no eos_token_id")
    ends = torch.isin(ids, torch.tensor(eos, device=ids.device))
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(ends.any(1).all()):
        rows = (~ends.any(1)).nonzero().flatten().tolist()
        raise ArgumentError(f"input_ids: expected an end token ({eos}) in every row, rows {rows} have none; append it")
    last = (ends * torch.arange(ids.shape[1], device=ids.device)).amax(1)
    return states[torch.arange(ids.shape[0], device=ids.device), last]


def _last_tokens(ids: torch.Tensor, mask: torch.Tensor | None, pad_token_id: int | None) -> torch.Tensor:
    """(batch,): where each row's last token is that is neither masked nor, if the row has another one, padding."""
    check_not_empty(ids)
    tokens = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if pad_token_id is not None:
        others = tokens & (ids != pad_token_id)
        tokens = torch.where(others.any(1, keepdim=True), others, tokens)
    return (tokens * torch.arange(ids.shape[1], device=ids.device)).amax(1)
