"""What stands on a stack: the output head, and the task heads of encoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from transfuse.models.blocks import make_norm
from transfuse.models.config import TransformerConfig
from transfuse.nn import ActivatedLinear


class OutputHead(nn.Module):
    """Scores over the vocabulary: ``(logit_scale * h) W^T + b``; W is the token table where they are tied.

    A tied head has no weight of its own, so a state_dict holds the table once.

    >>> config = TransformerConfig("decoder", vocab_size=10, hidden_size=4, num_layers=1, num_heads=1)
    >>> list(OutputHead(config).state_dict())
    []
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = "meta",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rows = config.decoder_vocab_size
        self.scale, self.std = config.logit_scale, config.initializer_range
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if not config.tie_embeddings:
            self.weight = nn.Parameter(torch.empty(rows, config.hidden_size, device=device, dtype=dtype))
        if config.lm_head_bias:
            self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Weight normal, bias 0."""
        if self.weight is not None:
            nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"tied={self.weight is None}, bias={self.bias is not None}"

    def forward(self, hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """hidden: (..., hidden_size), table: (vocab_size, hidden_size), read if tied -> (..., vocab_size)."""
        if self.scale != 1.0:
            hidden = hidden * self.scale
        return F.linear(hidden, table if self.weight is None else self.weight, self.bias)


class MaskedLMHead(nn.Module):
    """``norm(act(W h + b))`` and then the token table: what BERT predicts masked tokens with.

    >>> config = TransformerConfig("encoder", vocab_size=10, hidden_size=4, num_layers=1, num_heads=1)
    >>> sorted(MaskedLMHead(config, device="cpu").state_dict())
    ['bias', 'dense.bias', 'dense.weight', 'norm.bias', 'norm.weight']
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = "meta",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        c = config
        self.dense = ActivatedLinear(c.hidden_size, c.hidden_size, activation=c.activation, device=device, dtype=dtype)
        self.norm = make_norm(c, device, dtype)
        self.decoder: nn.Linear | None = None
        if not c.tie_embeddings:
            self.decoder = nn.Linear(c.hidden_size, c.vocab_size, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(c.vocab_size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """The bias 0; the sub-modules have their own."""
        nn.init.zeros_(self.bias)

    def forward(self, hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """hidden: (..., hidden_size), table: (vocab_size, hidden_size), read if tied -> (..., vocab_size)."""
        hidden = self.norm(self.dense(hidden))
        return F.linear(hidden, table if self.decoder is None else self.decoder.weight, self.bias)
