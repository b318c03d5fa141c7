"""The key/value cache of a decoder: allocated once, appended to in place, read as views."""

from __future__ import annotations

import math

import torch

from transfuse.errors import ArgumentError
from transfuse.models.placement import machine_memory, usable_device
from transfuse.ops.rotary import rotary_append, write_new


class LayerKeyValues:
    """One layer's share of a :class:`KVCache`: its self-attention buffers, and its cross-attention pair once known."""

    __slots__ = ("cross", "keys", "owner", "values")

    def __init__(self, owner: KVCache, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.owner = owner
        self.keys, self.values = keys, values  # (batch, kv_heads, max_length, head_dim)
        self.cross: tuple[torch.Tensor, torch.Tensor] | None = None  # (batch, kv_heads, source_length, head_dim) each

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes k and v (batch, kv_heads, new, head_dim) behind the filled positions; views of all, new included.

        The cache's length moves on by :meth:`KVCache.advance`, after the last layer.
        """
        start, stop = self.owner.length, self.owner.length + k.shape[2]
        write_new(k, v, self.keys, self.values, start)
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def append_turned(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """:meth:`append` of k turned and of v (batch, new, kv_heads, head_dim), and q turned, in one launch.

        For kernels alone: nothing here has a gradient.
        """
        start, stop = self.owner.length, self.owner.length + k.shape[1]
        q = rotary_append(q, k, v, cos, sin, self.keys, self.values, start)
        return q, self.keys[:, :, :stop], self.values[:, :, :stop]


class KVCache:
    """Keys and values of the tokens a decoder has read, for all its layers; ``model.new_cache(...)`` makes one.

    Nothing is copied in a step but the new keys and values. Padding is remembered: a mask is needed only in the call
    that has padding in it.

    Args:
        num_layers: decoder layers.
        batch: rows.
        num_kv_heads: key/value heads.
        max_length: positions that fit.
        head_dim: size of a head.
        dtype, device: of the buffers.

    Attributes:
        length: positions filled, the same in every row (padding included).
        max_length: positions that fit.
        layers: one :class:`LayerKeyValues` a layer.

    Raises:
        ArgumentError: batch or max_length is below 1.

    >>> import transfuse
    >>> config = transfuse.TransformerConfig("decoder", vocab_size=50, hidden_size=16, num_layers=2, num_heads=2)
    >>> model = transfuse.Decoder(config).eval()
    >>> cache = model.new_cache(batch=1, max_length=8)
    >>> step = [model(torch.tensor([[t]]), cache=cache).logits for t in (3, 1, 4)]
    >>> cache.length, torch.allclose(step[2], model(torch.tensor([[3, 1, 4]])).logits[:, 2:], atol=1e-5)
    (3, True)
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        _check_sizes(batch, max_length)
        self.length = 0
        self.max_length = max_length
        self.mask: torch.Tensor | None = None  # (batch, max_length) bool, True = token; None: no padding so far
        self.cross_mask: torch.Tensor | None = None  # (batch, 1, 1, source_length) bool; None: no padding
        shape = (batch, num_kv_heads, max_length, head_dim)
        _check_memory(2 * num_layers * math.prod(shape), shape, dtype or torch.get_default_dtype(), device)
        # zeros, not empty: a kernel may load a tile beyond the filled length, and 0 * NaN is NaN
        self.layers = [
            LayerKeyValues(self, *(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
            for _ in range(num_layers)
        ]

    def __repr__(self) -> str:
        rows, heads, _, dim = self.layers[0].keys.shape
        return (
            f"KVCache(layers={len(self.layers)}, batch={rows}, kv_heads={heads}, length={self.length} of "
            f"{self.max_length}, head_dim={dim}, cross={self.has_cross}, {self.bytes() / 2**20:.1f} MiB)"
        )

    @property
    def batch(self) -> int:
        """Rows."""
        return self.layers[0].keys.shape[0]

    @property
    def layout(self) -> tuple[int, int, int]:
        """(layers, kv_heads, head_dim): what must be a model's own."""
        _, heads, _, dim = self.layers[0].keys.shape
        return len(self.layers), heads, dim

    @property
    def has_cross(self) -> bool:
        """Whether the cross-attention keys of the source are stored: the encoder need not run again."""
        return self.layers[-1].cross is not None

    def bytes(self) -> int:
        """Memory of all buffers."""
        tensors = [t for layer in self.layers for t in (layer.keys, layer.values, *(layer.cross or ()))]
        return sum(t.numel() * t.element_size() for t in tensors)

    def check_room(self, batch: int, new: int) -> None:
        """Raises ArgumentError unless ``new`` more positions fit and the batch is the cache's."""
        if batch != self.batch:
            raise ArgumentError(f"KVCache: made for {self.batch} rows, got a batch of {batch}")
        if self.length + new > self.max_length:
            raise ArgumentError(
                f"KVCache: {new} more positions do not fit, {self.length} of {self.max_length} are filled; make it "
                f"with max_length={self.length + new} or more"
            )

    def remember_mask(self, mask: torch.Tensor | None, new: int) -> torch.Tensor | None:
        """Notes which of the positions are tokens; gives those of all positions, new included, or None if all are.

        Args:
            mask: (batch, new) or (batch, length + new) bool, True = token; None: all new ones are.
            new: how many positions are being added.
        """
        stop = self.length + new
        if mask is None and self.mask is None:
            return None
        if self.mask is None:
            self.mask = torch.ones(self.batch, self.max_length, dtype=torch.bool, device=self.layers[0].keys.device)
        if mask is None:
            self.mask[:, self.length : stop] = True
        else:
            self.mask[:, stop - mask.shape[1] : stop] = mask
        return self.mask[:, :stop]

    def advance(self, new: int) -> None:
        """Counts ``new`` positions as filled, once all layers have appended them."""
        self.length += new

    def crop(self, length: int) -> None:
        """Forgets all positions from ``length`` on (speculative decoding takes back rejected tokens).

        The source's cross-attention keys stay: another source needs a new cache.

        Raises:
            ArgumentError: length is not between 0 and the filled length.
        """
        if not 0 <= length <= self.length:
            raise ArgumentError(f"KVCache.crop: length must be between 0 and {self.length}, got {length}")
        self.length = length

    def reorder(self, index: torch.Tensor, start: int = 0) -> None:
        """Row i becomes a copy of row ``index[i]``, in place (beam search).

        Args:
            index: (batch,) integers; after :meth:`widen`, each one of the copies of its row's own prompt.
            start: positions before it stay as they are: rows that change places are equal there.
        """
        self._check_rows("reorder", index)
        if index.shape[0] != self.batch:
            raise ArgumentError(f"KVCache.reorder: index must have shape ({self.batch},), got {tuple(index.shape)}")
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                filled = buffer[:, :, start : self.length]
                filled.copy_(filled.index_select(0, index))
        if self.mask is not None:
            self.mask = self.mask.index_select(0, index)
        self._select_cross(index)

    def widen(self, copies: int) -> None:
        """Each row becomes ``copies`` rows next to one another: the beams of a prompt, or several draws.

        The copies share the row's cross-attention keys, which are not copied.
        """
        _check_sizes(copies, self.max_length)
        keys = self.layers[0].keys
        shape = (self.batch * copies, *keys.shape[1:])
        _check_memory(2 * len(self.layers) * math.prod(shape), shape, keys.dtype, keys.device)
        self._select_self(torch.arange(self.batch, device=keys.device).repeat_interleave(copies))

    def select(self, rows: torch.Tensor) -> None:
        """Keeps these rows, in this order; repeats are fine (drop finished rows): (n,) integers."""
        self._check_rows("select", rows)
        self._select_cross(rows)
        self._select_self(rows)

    def _select_self(self, rows: torch.Tensor) -> None:
        for layer in self.layers:
            layer.keys, layer.values = self._take(layer.keys, rows), self._take(layer.values, rows)
        if self.mask is not None:
            self.mask = self.mask.index_select(0, rows)

    def _take(self, buffer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        taken = buffer.new_zeros(rows.shape[0], *buffer.shape[1:])
        taken[:, :, : self.length] = buffer[:, :, : self.length].index_select(0, rows)
        return taken

    def _select_cross(self, rows: torch.Tensor) -> None:
        """The cross-attention keys of these rows; those that share a source go on sharing it if they stay together."""
        cross = self.layers[-1].cross
        if cross is None:
            return
        shared = self.batch // cross[0].shape[0]
        sources = rows // shared
        if shared > 1 and rows.shape[0] % shared == 0:
            first = sources[::shared]
            if torch.equal(sources, first.repeat_interleave(shared)):
                sources = first
        if torch.equal(sources, torch.arange(cross[0].shape[0], device=rows.device)):
            return  # all there, in their places: beams that change places do so among themselves
        for layer in self.layers:
            if layer.cross is not None:
                layer.cross = (layer.cross[0].index_select(0, sources), layer.cross[1].index_select(0, sources))
        if self.cross_mask is not None:
            self.cross_mask = self.cross_mask.index_select(0, sources)

    def _check_rows(self, name: str, rows: torch.Tensor) -> None:
        whole = isinstance(rows, torch.Tensor) and rows.dtype in (torch.int32, torch.int64)
        if not whole or rows.dim() != 1 or rows.shape[0] < 1:
            got = f"{tuple(rows.shape)} {rows.dtype}" if isinstance(rows, torch.Tensor) else type(rows).__name__
            raise ArgumentError(f"KVCache.{name}: expected row numbers (n,), int64 or int32, got {got}")
        if rows.device.type != "cpu":
            return  # reading them would make the host wait
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= self.batch:
            raise ArgumentError(f"KVCache.{name}: row numbers must be from 0 to {self.batch - 1}, got {low} to {high}")


def _check_sizes(batch: int, max_length: int) -> None:
    for value in (batch, max_length):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(
                f"KVCache: batch and max_length must be whole numbers of at least 1, got {batch!r} and {max_length!r}"
            )


def _check_memory(elements: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> None:
    """Refuses buffers larger than the machine's memory; a GPU's allocator says so by itself."""
    memory, need = machine_memory(), elements * dtype.itemsize
    if 0 < memory < need and usable_device(device).type == "cpu":
        raise ArgumentError(
            f"KVCache: keys and values of shape {shape} need {need / 2**30:,.1f} GiB for all layers, this machine has "
            f"{memory / 2**30:,.1f} GiB; take fewer rows or positions"
        )
