"""What the packed network keeps between decoding steps: the keys and values of the source and of the target so far.

Sizes in the comments: B sentences, W beams (or samples) of each, S source tokens, N cached target tokens, H heads.
"""

import torch
from torch import nn


def rows_of(sentences: torch.Tensor, count: int) -> torch.Tensor:
    """The rows of these sentences, `[n]` -> `[n * count]`, if each has `count` consecutive rows."""
    return (sentences[:, None] * count + torch.arange(count, device=sentences.device)).flatten()


class TargetCache:
    """
    The keys and values of the target so far. All hypotheses of a sentence share one row.

    Every step appends a column for each hypothesis. A mask restricts each hypothesis to the columns of its own
    ancestors. When beams move, only the mask moves. When the buffers are full, columns without a living descendant are
    dropped. So the buffers hold little more than the distinct histories (beams share most of theirs) and grow rarely.
    Without a mask every hypothesis has its own row (greedy search and sampling).

    Args:
        layers: number of decoder layers.
        rows: B, or the number of hypotheses if each has its own row.
        heads: H.
        d_k, d_v: widths of a head.
        masked: whether a row holds several hypotheses, or prefixes are padded.
        dtype: of keys and values.
    """

    CAPACITY = 32

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        d_k: int,
        d_v: int,
        masked: bool,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.heads = heads
        self.length = 0
        self.keys = [torch.empty(rows, heads, 0, d_k, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.empty(rows, heads, 0, d_v, device=device, dtype=dtype) for _ in range(layers)]
        self.mask = torch.empty(rows, 1, 0, device=device, dtype=torch.float32) if masked else None  # [B, W, N]

    def make_room(self, width: int) -> None:
        """Adds a column for each of a row's `width` hypotheses. To be called before each step."""
        if self.length + width > self.keys[0].shape[2]:
            self._make_buffers(self._living_columns(), width)
        if self.mask is not None:
            rows, width, _ = self.mask.shape
            # Each hypothesis sees only its own new column.
            own = self.mask.new_full((width, width), float("-inf")).fill_diagonal_(0.0)
            self.mask = torch.cat([self.mask, own.expand(rows, width, width)], dim=2)
        self.length += width

    def _living_columns(self) -> torch.Tensor:
        """Columns that some hypothesis sees, in order, `[B, most of a row]`. Rows with fewer are filled with others."""
        rows = len(self.keys[0])
        if self.mask is None:
            return torch.arange(self.length, device=self.keys[0].device).expand(rows, -1)
        living = (self.mask == 0).any(dim=1)  # [B, N]
        most = int(living.sum(dim=1).max())
        return living.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]

    def _make_buffers(self, columns: torch.Tensor, width: int) -> None:
        """Makes new buffers that begin with these columns `[B, n]`, with room for n / 2 more or for 8 steps."""
        rows, length = columns.shape
        capacity = max(self.CAPACITY, length + max(length // 2, 8 * width))
        index = nn.functional.pad(columns, (0, capacity - length))[:, None]  # [B, 1, capacity]
        # Index rows of the buffers viewed as [B * H * capacity, d], so that whole rows are copied.
        firsts = torch.arange(rows * self.heads, device=columns.device).view(rows, self.heads, 1)
        index = (firsts * self.keys[0].shape[2] + index).flatten()

        def taken(states: torch.Tensor) -> torch.Tensor:
            if not self.length:
                return states.new_empty(rows, self.heads, capacity, states.shape[3])
            return states.flatten(0, 2).index_select(0, index).view(rows, self.heads, capacity, -1)

        self.keys, self.values = [taken(keys) for keys in self.keys], [taken(values) for values in self.values]
        if self.mask is not None:
            self.mask = self.mask.take_along_dim(columns[:, None], dim=2)
        self.length = length

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes this step's `[B, W, H, d]` into its columns. Returns all so far, `[B * H, N, d]`."""
        return self._append(self.keys[layer], key), self._append(self.values[layer], value)

    def _append(self, states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        width = new.shape[1]
        states.narrow(2, self.length - width, width).copy_(new.transpose(1, 2))
        return states.flatten(0, 1).narrow(1, 0, self.length)

    def mask_for_heads(self) -> torch.Tensor | None:
        """The mask as `attend` needs it, `[B * H, W, N]`."""
        if self.mask is None:
            return None
        rows, width, length = self.mask.shape
        mask = self.mask.to(self.keys[0].dtype)
        return mask[:, None].expand(rows, self.heads, width, length).reshape(rows * self.heads, width, length)

    def hide_last(self, rows: torch.Tensor) -> None:
        """Masks the last column of these rows (`[B]`, true or false), because it is padding."""
        assert self.mask is not None
        self.mask[:, :, -1].masked_fill_(rows[:, None], float("-inf"))

    def move_beams(self, parents: torch.Tensor) -> None:
        """Makes hypothesis w of each row continue hypothesis `parents[:, w]`; `parents` is `[B, W]`."""
        assert self.mask is not None
        self.mask = self.mask.take_along_dim(parents[:, :, None], dim=1)

    def keep(self, rows: torch.Tensor) -> None:
        """Keeps only these rows."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.mask = None if self.mask is None else self.mask[rows]


class DecoderState:
    """
    The decoder's state between two steps.

    Args:
        cross: keys and values of the source in each layer, `[B * H, S, d]`.
        source_mask: for `attend`, `[B * H, 1, S]`; None if no source is padded.
        target: the cache of the target.
        sentences: B.
    """

    def __init__(
        self,
        cross: list[tuple[torch.Tensor, torch.Tensor]],
        source_mask: torch.Tensor | None,
        target: TargetCache,
        sentences: int,
    ):
        self.cross = cross
        self.source_mask = source_mask
        self.target = target
        self.sentences = sentences
        # The position of the next token: one number, or [B, 1] if padded prefixes make sentences differ.
        self.position: int | torch.Tensor = 0

    def keep(self, sentences: torch.Tensor) -> None:
        """Keeps only these sentences, given by their rows."""

        def kept(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(0, (self.sentences, -1))[sentences].flatten(0, 1)

        self.cross = [(kept(keys), kept(values)) for keys, values in self.cross]
        self.source_mask = None if self.source_mask is None else kept(self.source_mask)
        self.target.keep(rows_of(sentences, self.target.keys[0].shape[0] // self.sentences))
        if isinstance(self.position, torch.Tensor):
            self.position = self.position[sentences]
        self.sentences = len(sentences)
