"""Encoder: every token sees every other (BERT and its kin, and the first half of an encoder-decoder)."""

from __future__ import annotations

import torch
from torch import nn

from transfuse.errors import ConfigError
from transfuse.models.blocks import BlockInputs
from transfuse.models.config import TransformerConfig
from transfuse.models.outputs import ModelOutput
from transfuse.models.stack import Stack, check_not_empty


class Encoder(Stack):
    """A bidirectional transformer: ids in, one vector for each token out.

    Args:
        config: architecture "encoder", or "encoder_decoder" for that one's encoder alone.
        device, dtype: of the parameters; device="meta" allocates nothing.

    Raises:
        ConfigError: the configuration is a decoder's, or larger than this machine's memory.

    Padding changes nothing for the real tokens, on whichever side it is:

    >>> config = TransformerConfig("encoder", vocab_size=100, hidden_size=32, num_layers=2, num_heads=4,
    ...                            norm_placement="post", embedding_norm=True, final_norm=False)
    >>> model = Encoder(config).eval()
    >>> alone = model(torch.tensor([[5, 6, 7]])).last_hidden_state
    >>> mask = torch.tensor([[1, 1, 1, 0, 0]])
    >>> padded = model(torch.tensor([[5, 6, 7, 0, 0]]), attention_mask=mask).last_hidden_state
    >>> torch.allclose(alone, padded[:, :3], atol=1e-5)
    True
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._check(config, dtype)
        if config.architecture == "decoder":
            raise ConfigError("Encoder: the configuration's architecture is 'decoder'; use transfuse.Decoder")
        super().__init__(config, decoder=False, dtype=dtype)
        self.pooler: nn.Linear | None = None
        if config.pooler:
            self.pooler = nn.Linear(config.hidden_size, config.hidden_size, device="meta", dtype=dtype)
        self._pool = torch.relu if config.pooler_activation == "relu" else torch.tanh
        self._materialise(device, dtype)

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
        """Encodes a batch.

        Args:
            input_ids: (batch, length) int64 or int32.
            attention_mask: (batch, length), 1 = token, 0 = padding; None: no padding.
            token_type_ids: (batch, length) segments; None: all 0.
            position_ids: (batch or 1, length); None: each row's tokens are counted from 0, padding left out.
            output_hidden_states: also give the embeddings and every layer's output.
            output_attentions: also give every layer's probabilities; they are computed only then.

        Returns:
            last_hidden_state (batch, length, hidden_size), and pooler_output (batch, hidden_size) with a pooler.

        Raises:
            ArgumentError, DtypeError: a shape, an id or a dtype is wrong.
        """
        inputs = BlockInputs(attentions=[] if output_attentions else None)
        last, states = self._run(
            input_ids, attention_mask, token_type_ids, position_ids, None, inputs, output_hidden_states
        )
        return ModelOutput(
            last_hidden_state=last,
            pooler_output=None if self.pooler is None else self._pool(self.pooler(_first(last, inputs.mask))),
            hidden_states=states,
            attentions=None if inputs.attentions is None else tuple(inputs.attentions),
        )


def _first(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, hidden_size): each row's first token of x (batch, length, hidden_size); mask: (batch, 1, 1, length)."""
    check_not_empty(x)
    if mask is None:
        return x[:, 0]
    return x[torch.arange(x.shape[0], device=x.device), mask[:, 0, 0].int().argmax(1)]
