"""What the tests of checkpoint families share: seeded models of transformers, and comparisons with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from transfuse import from_pretrained
from transfuse.models.pretrained import save_pretrained

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
# what a decoder says when it is handed a special token that its small vocabulary lacks
transformers.utils.logging.set_verbosity_error()


def hf(kind: str, changes: dict[str, Any], seed: int = 1) -> Any:
    """A model of a class of transformers, seeded, with eager attention so that it gives its maps."""
    torch.manual_seed(seed)
    cls = getattr(transformers, kind)
    values = {"initializer_range": 0.2, "attn_implementation": "eager", **copy.deepcopy(changes)}
    model = cls(cls.config_class(**values)).eval()
    randomise_small(model)
    return model


@torch.no_grad()
def randomise_small(model: torch.nn.Module) -> None:
    """Biases start at 0 and norms at 1, which would hide a name that maps to the wrong place."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    difference = (ours.float() - theirs.float()).abs().max().item()
    assert difference <= tolerance * theirs.float().abs().max().item()


def padded_batch(config: Any, sides: str = "-rr", length: int = 11, **more: int) -> dict[str, torch.Tensor]:
    """A row for each letter of ``sides``: without padding, padded on the left, on the right; and the ids for types."""
    mask = torch.ones(len(sides), length, dtype=torch.long)
    for row, side in enumerate(sides):
        n = length - 1 if row == 2 else 3 + row
        if side != "-":
            mask[row, slice(length - n, None) if side == "r" else slice(0, n)] = 0
    ids = torch.randint(4, config.vocab_size, mask.shape)
    ids[mask == 0] = config.pad_token_id or 0
    types = {name: torch.randint(0, count, mask.shape) for name, count in more.items()}
    return {"input_ids": ids, "attention_mask": mask, **types}


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Each row's tokens counted from 0: what transformers is to be told where it would count padding too."""
    return (mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def assert_same_outputs(ours: Any, theirs: Any, batch: dict[str, torch.Tensor], **told: torch.Tensor) -> None:
    """Every field that both give, hidden states and attentions among them, at the positions that are tokens."""
    tokens = batch["attention_mask"].bool()
    asked = {"output_hidden_states": True, "output_attentions": True}
    got, expected = ours(**batch, **asked), theirs(**batch, **asked, **told)
    compared = 0
    for name, value in expected.items():
        if name in ("past_key_values", "cross_attentions"):
            continue
        pairs = [(getattr(got, name), value)]
        if isinstance(value, tuple):
            pairs = list(zip(getattr(got, name), value, strict=True))
        for mine, other in pairs:
            assert mine.shape == other.shape, name
            if mine.dim() == 4:  # (batch, heads, queries, keys)
                mine, other = mine.transpose(1, 2), other.transpose(1, 2)
            at_tokens = mine.shape[:2] == tokens.shape
            assert_close(mine[tokens] if at_tokens else mine, other[tokens] if at_tokens else other)
        compared += len(pairs)
    layers = len(got.attentions)
    assert compared >= 2 * layers + 2, f"only {list(expected)} were compared"


def loaded(theirs: Any, folder: Path) -> Any:
    """What is read here of what transformers wrote."""
    theirs.save_pretrained(folder)
    return from_pretrained(folder)


def assert_comes_back(ours: Any, theirs: Any, folder: Path, batch: dict[str, torch.Tensor], **unread: str) -> None:
    """Written here, the model is the same read here, and the same read by transformers, which misses nothing."""
    save_pretrained(ours, folder)
    again = from_pretrained(folder)
    assert type(again) is type(ours)
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))
    kind = type(theirs)
    returned, info = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    state = returned.state_dict()
    for name, before in theirs.state_dict().items():
        if name != unread.get("name"):
            assert torch.equal(before, state[name]), name
    with torch.no_grad():
        assert_close(returned.eval()(**batch)[0], theirs(**batch)[0])
