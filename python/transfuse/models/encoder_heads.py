"""Encoders with a task's head: masked tokens, classes of a text, classes of tokens, spans."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from transfuse.errors import ConfigError
from transfuse.models.base import TransformerModel
from transfuse.models.config import TransformerConfig
from transfuse.models.encoder import Encoder
from transfuse.models.heads import MaskedLMHead
from transfuse.models.outputs import ModelOutput


class EncoderWithHead(TransformerModel):
    """An encoder under ``encoder`` and, in a subclass, what reads its output; arguments as :meth:`Encoder.forward`."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype | None) -> None:
        self._check(config, dtype)
        super().__init__()
        self.encoder = Encoder(config, device="meta", dtype=dtype)
        self.config = config

    def read(self, encoded: ModelOutput) -> ModelOutput:
        """Adds the head's scores to what the encoder gave."""
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
        """The encoder's output with the head's scores."""
        return self.read(
            self.encoder(
                input_ids,
                attention_mask,
                token_type_ids,
                position_ids,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
            )
        )


class MaskedLM(EncoderWithHead):
    """Scores of every token of the vocabulary at every position: BERT's pre-training task.

    >>> config = TransformerConfig("encoder", vocab_size=100, hidden_size=32, num_layers=2, num_heads=4)
    >>> MaskedLM(config).eval()(torch.tensor([[5, 6, 7]])).logits.shape
    torch.Size([1, 3, 100])
    """

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

    def read(self, encoded: ModelOutput) -> ModelOutput:
        """logits: (batch, length, vocab_size)."""
        hidden = _last(encoded)
        return replace(encoded, logits=self.head(hidden, self.encoder.embeddings.token.weight))


class SequenceClassifier(EncoderWithHead):
    """Scores of a text's classes, from the pooled first token.

    Raises:
        ConfigError: the configuration has no pooler, or num_labels is below 1.

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
        self._check(config, dtype)
        if not config.pooler:
            raise ConfigError("SequenceClassifier: reads the pooled first token; set pooler=True")
        super().__init__(config, dtype)
        self.classifier = _classifier("SequenceClassifier", config, num_labels, dtype)
        self._materialise(device, dtype)

    def read(self, encoded: ModelOutput) -> ModelOutput:
        """logits: (batch, num_labels)."""
        assert encoded.pooler_output is not None
        p = self.config.hidden_dropout
        return replace(encoded, logits=self.classifier(F.dropout(encoded.pooler_output, p, self.training)))


class TokenClassifier(EncoderWithHead):
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

    def read(self, encoded: ModelOutput) -> ModelOutput:
        """logits: (batch, length, num_labels)."""
        p = self.config.hidden_dropout
        return replace(encoded, logits=self.classifier(F.dropout(_last(encoded), p, self.training)))


class SpanClassifier(EncoderWithHead):
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

    def read(self, encoded: ModelOutput) -> ModelOutput:
        """start_logits, end_logits: (batch, length) each."""
        start, end = self.classifier(_last(encoded)).unbind(-1)
        return replace(encoded, start_logits=start, end_logits=end)


def _classifier(name: str, config: TransformerConfig, labels: int, dtype: torch.dtype | None) -> nn.Linear:
    if isinstance(labels, bool) or not isinstance(labels, int) or not 1 <= labels <= 2**24:
        raise ConfigError(f"{name}: num_labels must be between 1 and {2**24}, got {labels!r}")
    return nn.Linear(config.hidden_size, labels, device="meta", dtype=dtype)


def _last(encoded: ModelOutput) -> torch.Tensor:
    assert encoded.last_hidden_state is not None
    return encoded.last_hidden_state
