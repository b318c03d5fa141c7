"""What a model returns: one dataclass for all of them, with the names that transformers uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.export

from transfuse.models.cache import KVCache


@dataclass
class ModelOutput:
    """Fields that a model does not have, or was not asked for, are None.

    Attributes:
        last_hidden_state: (batch, length, hidden_size), after the final norm; of the decoder where there are two.
        logits: (batch, length, vocab_size), or what the head gives.
        pooler_output: (batch, hidden_size).
        hidden_states: with output_hidden_states, num_layers + 1 of (batch, length, hidden_size): the embeddings, then
            each layer's output, the last one after the final norm.
        attentions: with output_attentions, num_layers of (batch, heads, length, keys).
        cross_attentions: likewise, (batch, heads, length, source_length).
        cache: the cache that was given, now longer.
        encoder_last_hidden_state, encoder_hidden_states, encoder_attentions: an encoder-decoder's other half; None when
            the encoder did not run because the cache holds what is needed of it.
        start_logits, end_logits: (batch, length), of a SpanClassifier.
        seq_relationship_logits: (batch, 2), of a Pretraining model: the second sentence follows, or it does not.
    """

    last_hidden_state: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    cache: KVCache | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    seq_relationship_logits: torch.Tensor | None = None

    @property
    def decoder_hidden_states(self) -> tuple[torch.Tensor, ...] | None:
        """``hidden_states``, by the name that an encoder-decoder of transformers gives it."""
        return self.hidden_states

    @property
    def prediction_logits(self) -> torch.Tensor | None:
        """``logits``, by the name that a pre-training model of transformers gives it."""
        return self.logits

    @property
    def decoder_attentions(self) -> tuple[torch.Tensor, ...] | None:
        """``attentions``, by the name that an encoder-decoder of transformers gives it."""
        return self.attentions


def last_hidden(out: ModelOutput) -> torch.Tensor:
    """``last_hidden_state``, which every stack gives."""
    assert out.last_hidden_state is not None
    return out.last_hidden_state


# torch.export and data parallel wrappers then see the tensors in it.
torch.export.register_dataclass(ModelOutput, serialized_type_name="transfuse.models.ModelOutput")
