"""Token, position and type embeddings: what goes into the first layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from transfuse.errors import ArgumentError
from transfuse.models.blocks import make_norm
from transfuse.models.config import TransformerConfig
from transfuse.nn import SinusoidalPositions


class Embeddings(nn.Module):
    """``dropout(norm(scale * token + position + type))``, with the parts that the configuration has.

    Args:
        config: the model.
        vocab_size: rows of the token table; a decoder's may differ from its encoder's.

    >>> config = TransformerConfig("encoder", vocab_size=10, hidden_size=16, num_layers=1, num_heads=2)
    >>> Embeddings(config, 10)(torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), 2).shape
    torch.Size([1, 2, 16])
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        c = config
        self.scale, self.offset, self.types_are_tokens = c.embedding_scale, c.position_offset, c.token_types_are_tokens
        self.dropout = c.dropout_of_embeddings
        self.token = nn.Embedding(vocab_size, c.hidden_size, device=device, dtype=dtype)
        self.position: nn.Module | None = None
        if c.position == "learned":
            rows = c.max_positions + c.position_offset
            self.position = nn.Embedding(rows, c.hidden_size, device=device, dtype=dtype)
        elif c.position == "sinusoidal":
            self.position = SinusoidalPositions(c.hidden_size, c.sinusoidal_layout)
        self.token_type: nn.Embedding | None = None
        if c.type_vocab_size:
            self.token_type = nn.Embedding(c.type_vocab_size, c.hidden_size, device=device, dtype=dtype)
        self.norm = make_norm(c, device, dtype) if c.embedding_norm else None

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None,
        limit: int | None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, length, hidden_size).

        Args:
            input_ids: (batch, length) integers.
            positions: (batch or 1, length) integers; not read where positions are not embedded.
            limit: a bound that all positions are known to be below, or None.
            token_type_ids: (batch, length); None: all 0.

        Raises:
            ArgumentError: an id or a position is outside its table.
        """
        x = _look_up("input_ids", self.token, input_ids)
        if self.scale != 1.0:
            x = x * self.scale
        if isinstance(self.position, SinusoidalPositions):
            assert positions is not None
            x = x + self.position(positions, limit).to(x.dtype)
        elif isinstance(self.position, nn.Embedding):
            assert positions is not None
            x = x + self._learned(positions, limit)
        if self.token_type is not None:
            # without ids all tokens are of type 0: one row for all
            x = x + (self.token_type.weight[0] if token_type_ids is None else self._types(token_type_ids))
        elif token_type_ids is not None and self.types_are_tokens:
            x = x + _look_up("token_type_ids", self.token, token_type_ids)
        elif token_type_ids is not None:
            raise ArgumentError("token_type_ids: this model has no token types; leave it out")
        if self.norm is not None:
            x = self.norm(x)
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def _learned(self, positions: torch.Tensor, limit: int | None) -> torch.Tensor:
        assert isinstance(self.position, nn.Embedding)
        most = self.position.num_embeddings - self.offset
        if limit is not None and limit > most:
            raise ArgumentError(f"input_ids: this model has {most} positions, got a sequence of {limit}; shorten it")
        return _look_up("position_ids", self.position, positions + self.offset if self.offset else positions)

    def _types(self, token_type_ids: torch.Tensor) -> torch.Tensor:
        assert self.token_type is not None
        return _look_up("token_type_ids", self.token_type, token_type_ids)


def _look_up(name: str, table: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    """The table's rows; on a CPU an id outside it becomes a clear error (a GPU cannot tell without waiting)."""
    try:
        return table(ids)
    except IndexError:
        low, high = int(ids.min()), int(ids.max())
        raise ArgumentError(
            f"{name}: values must be from 0 to {table.num_embeddings - 1}, got {low} to {high}; "
            "does the tokenizer belong to this model, is the sequence too long?"
        ) from None
