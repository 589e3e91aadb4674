"""Which page holds which tokens: block tables, lengths, free pages. One object serves all layers that see the same
keys.

Hugging Face counts columns, the padded positions of a batch; pages hold tokens only, so a sequence's length here is its
columns less its padding. A page may belong to several sequences (beams): it is copied before one of them writes to it.
"""

from __future__ import annotations

import copy
import dataclasses

import torch

from ..errors import InvalidArgumentError, UnsupportedError


@dataclasses.dataclass(frozen=True)
class Window:
    """The keys that a query sees: all before it, the last ``size`` or, chunked, those of its chunk of ``size``."""

    size: int = 0  # 0: all
    chunked: bool = False

    def first_key(self, position: int) -> int:
        """The first key that a query at ``position`` sees."""
        if self.chunked:
            return position // self.size * self.size
        return max(0, position - self.size + 1) if self.size else 0

    @property
    def mask(self) -> dict[str, int]:
        """The arguments of unified_attention."""
        if not self.size:
            return {}
        return {"sliding_window": self.size, **({"chunk_lookback": 0} if self.chunked else {})}


@dataclasses.dataclass(frozen=True)
class HostMask:
    """What a pass's attention_mask says, on the host."""

    key: tuple[int, int, int]  # sequences, columns in the cache, new columns
    new: torch.Tensor | None  # [B, new columns] bool: which are tokens; None: all
    visible: torch.Tensor  # [B] int64: tokens among the columns in the cache


class Step:
    """What the ops need to know to store some columns and to attend from them, on the device: the same for all layers.

    Its buffers serve every step with the same number of sequences and columns.
    """

    def __init__(self, batch: int, num_columns: int, device: torch.device):
        self.batch, self.num_columns = batch, num_columns
        self.slots_host = torch.empty(batch, num_columns, dtype=torch.int64)
        self.lens_host = torch.empty(batch, dtype=torch.int32)
        self.every_row = torch.arange(0, (batch + 1) * num_columns, num_columns, dtype=torch.int32, device=device)
        if device.type == "cpu":
            self.slots, self.seq_lens = self.slots_host.view(-1), self.lens_host
        else:
            self.slots = torch.empty(batch * num_columns, dtype=torch.int64, device=device)
            self.seq_lens = torch.empty(batch, dtype=torch.int32, device=device)
        self.cu_seqlens_q = self.every_row
        self.rows: torch.Tensor | None = None  # the rows that are queries; None: all, or padding comes first
        self.block_table: torch.Tensor | None = None
        self.max_seq_len = 0
        self.num_pages = 0  # pages in use have smaller numbers
        self.copies: tuple[torch.Tensor, torch.Tensor] | None = None  # pages to copy before storing: from, to
        self.end = 0  # columns after this step


class Pages:
    """The pages of one group of layers: same window, same device."""

    def __init__(self, window: Window, block_size: int, device: torch.device, in_pieces: bool):
        self.in_pieces = (
            in_pieces  # whether a layer reads its rows right after storing them, and never again in that pass
        )
        self.window, self.block_size, self.device = window, block_size, device
        self.record_past = False  # keep keys out of the window until the next crop
        self._steps: dict[tuple[int, int, int], Step] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets all tokens; pages are free, and keep their memory."""
        self.columns = 0
        self.lens: torch.Tensor | None = None  # [B] int64
        self.table = torch.zeros(
            0, 0, dtype=torch.int32
        )  # [B, width]; row b has pages from first[b] to ceil(lens[b] / bs)
        self.first = torch.zeros(0, dtype=torch.int64)
        self.real: torch.Tensor | None = None  # [B, >= columns] bool: which columns are tokens; None: all
        self.refs = torch.zeros(0, dtype=torch.int64)
        self.free: list[int] = []
        self.num_pages = 0
        self.shared = False
        self._device_table: torch.Tensor | None = None
        self._table_changed = True
        self.steps: list[Step] = []  # of the last forward pass

    @property
    def batch(self) -> int:
        return 0 if self.lens is None else len(self.lens)

    @property
    def pages_in_use(self) -> int:
        return self.num_pages - len(self.free)

    def copy(self) -> Pages:
        """The same tables, to be changed apart."""
        other = copy.copy(self)
        for name in ("lens", "first", "table", "real", "refs"):
            value = getattr(self, name)
            setattr(other, name, None if value is None else value.clone())
        other.free, other._steps, other.steps = list(self.free), {}, []
        other._device_table, other._table_changed = None, True
        return other

    # ---- a forward pass ----------------------------------------------------------------------------------------------

    def advance(self, batch: int, num_columns: int, mask: HostMask | None) -> list[Step]:
        """Makes room for ``num_columns`` more of each sequence, in one step or, where a window lets a long prompt's
        pages go while it is read, in several."""
        if self.lens is not None and batch != self.batch:
            raise InvalidArgumentError(
                f"the batch has {batch} sequences, and QuireCache holds {self.batch}; call reset() "
                "for other sequences, or batch_select_indices() to keep some"
            )
        self._check_history(mask, num_columns)
        if self.lens is None:
            self.lens = torch.zeros(batch, dtype=torch.int64)
            self.first = torch.zeros(batch, dtype=torch.int64)
            self.table = torch.zeros(batch, 8, dtype=torch.int32)
        piece = num_columns
        if self.window.size and self.in_pieces and not self.record_past:
            piece = max(self.window.size, 1024)
        self.steps = []
        for begin in range(0, num_columns, piece):
            count = min(piece, num_columns - begin)
            new = None if mask is None or mask.new is None else mask.new[:, begin : begin + count]
            self.steps.append(self._advance(self._step(batch, count, len(self.steps)), new))
        self._to_device()
        return self.steps

    def _advance(self, step: Step, new: torch.Tensor | None) -> Step:
        """One step. ``new``: which of its columns are tokens, [B, columns] bool on the host; None: all."""
        if not self.record_past:
            self._release()
        counts = step.num_columns if new is None else new.sum(1)
        step.copies = self._unshare(counts) if self.shared else None
        self._take_pages(counts)
        self._slots(step, new)
        self.lens += counts
        if new is not None or self.real is not None:
            self._remember(new, step.num_columns)
        self.columns += step.num_columns
        step.lens_host.copy_(self.lens)
        step.max_seq_len = int(self.lens.max())
        step.num_pages, step.end = self.num_pages, self.columns
        self._query_rows(step, new)
        return step

    def _check_history(self, mask: HostMask | None, num_columns: int) -> None:
        """What is stored cannot be masked or unmasked later."""
        if self.columns == 0:
            return
        if mask is None:
            if self.real is not None and not self.real[:, : self.columns].all():
                raise InvalidArgumentError(
                    "attention_mask is not given, but was before and had padding; give one for all "
                    f"{self.columns + num_columns} columns"
                )
            return
        if not torch.equal(mask.visible, self.lens):
            raise InvalidArgumentError(
                f"attention_mask shows {mask.visible.tolist()} tokens among the {self.columns} columns that the cache "
                f"holds, which were stored with {self.lens.tolist()}; what is stored cannot be masked or unmasked later"
            )

    def _step(self, batch: int, num_columns: int, index: int) -> Step:
        key = (batch, num_columns, index)
        if key not in self._steps:
            if index == 0 and len(self._steps) >= 8:  # prompts of all lengths; decoding asks for the same again
                self._steps.clear()
            self._steps[key] = Step(batch, num_columns, self.device)
        return self._steps[key]

    def _release(self) -> None:
        """Frees the pages that no later query sees."""
        if not self.window.size:
            return
        for b, position in enumerate(self.lens.tolist()):
            first = self.window.first_key(position) // self.block_size
            for column in range(int(self.first[b]), first):
                page = int(self.table[b, column])
                self.refs[page] -= 1
                if self.refs[page] == 0:
                    self.free.append(page)
            self.first[b] = max(first, int(self.first[b]))

    def _unshare(self, counts) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Gives sequences that are about to write to a shared page one of their own."""
        offset = self.lens % self.block_size
        last = (self.lens // self.block_size).clamp_(max=self.table.shape[1] - 1)
        page = self.table.gather(1, last[:, None])[:, 0].long()
        writes = (offset > 0) & (torch.as_tensor(counts) > 0)
        source, target = [], []
        for b in writes.nonzero()[:, 0].tolist():
            old = int(page[b])
            if self.refs[old] > 1:
                fresh = self._new_page()
                self.refs[old] -= 1
                self.table[b, last[b]] = fresh
                self._table_changed = True
                source.append(old)
                target.append(fresh)
        if not source:
            return None
        return torch.tensor(source, device=self.device), torch.tensor(target, device=self.device)

    def _new_page(self) -> int:
        if self.free:
            page = self.free.pop()
        else:
            page = self.num_pages
            self.num_pages += 1
            if page >= len(self.refs):
                self.refs = torch.cat([self.refs, self.refs.new_zeros(max(64, len(self.refs)))])
        self.refs[page] = 1
        return page

    def _take_pages(self, counts) -> None:
        """A page for every token to come."""
        have = -(-self.lens // self.block_size)
        need = -(-(self.lens + counts) // self.block_size)
        if torch.equal(have, need):
            return
        width = int(need.max())
        if width > self.table.shape[1]:
            self.table = torch.nn.functional.pad(
                self.table, (0, max(width, 2 * self.table.shape[1]) - self.table.shape[1])
            )
        for b, (begin, end) in enumerate(zip(have.tolist(), need.tolist())):
            if begin < end:
                self.table[b, begin:end] = torch.tensor(
                    [self._new_page() for _ in range(begin, end)], dtype=torch.int32
                )
        self._table_changed = True

    def _slots(self, step: Step, new: torch.Tensor | None) -> None:
        if new is None:
            position = self.lens[:, None] + torch.arange(step.num_columns)
        else:
            position = (self.lens[:, None] + new.cumsum(1) - 1).clamp_(min=0)
        slots = self.table.gather(1, position // self.block_size).long()
        slots.mul_(self.block_size).add_(position % self.block_size)
        if new is not None:
            slots.masked_fill_(~new, -1)
        step.slots_host.copy_(slots)

    def _query_rows(self, step: Step, new: torch.Tensor | None) -> None:
        """Padding that comes before all tokens has positions before the sequence, where the op sees no keys and
        answers 0. Other padding has to be left out."""
        if new is None or bool((new[:, 1:] >= new[:, :-1]).all()):
            step.rows, step.cu_seqlens_q = None, step.every_row
            return
        step.rows = new.flatten().nonzero()[:, 0].to(self.device)
        ends = torch.nn.functional.pad(new.sum(1).cumsum(0), (1, 0))
        step.cu_seqlens_q = ends.to(self.device, torch.int32)

    def _to_device(self) -> None:
        """A column of the table is written once, so all steps of a pass can have the table of the last."""
        table = self.table
        if self.device.type != "cpu":
            if self._device_table is None or self._device_table.shape != table.shape:
                self._device_table = torch.empty_like(table, device=self.device)
                self._table_changed = True
            if self._table_changed:  # from memory that is not pinned, copies return when the host's side has been read
                self._device_table.copy_(table, non_blocking=True)
                self._table_changed = False
            table = self._device_table
        for step in self.steps:
            step.block_table = table
            if self.device.type != "cpu":
                step.slots.copy_(step.slots_host.view(-1), non_blocking=True)
                step.seq_lens.copy_(step.lens_host, non_blocking=True)

    def _remember(self, new: torch.Tensor | None, num_columns: int) -> None:
        end = self.columns + num_columns
        if self.real is None:
            self.real = torch.ones(self.batch, max(256, 2 * end), dtype=torch.bool)
        elif end > self.real.shape[1]:
            self.real = torch.nn.functional.pad(self.real, (0, end), value=True)
        self.real[:, self.columns : end] = True if new is None else new

    # ---- between passes ----------------------------------------------------------------------------------------------

    def select(self, indices: torch.Tensor) -> None:
        """Makes the batch that of ``indices``; a sequence may be taken several times."""
        if self.lens is None:
            return
        indices = indices.to("cpu")
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        indices = indices.long()
        self.lens, self.first, self.table = self.lens[indices], self.first[indices], self.table[indices]
        if self.real is not None:
            self.real = self.real[indices]
        self._recount()

    def crop(self, num_columns: int) -> None:
        """Removes the last ``num_columns``, or all there are."""
        if self.lens is None:
            return
        columns = max(0, self.columns - num_columns)
        gone = self.columns - columns
        lens = self.lens - (gone if self.real is None else self.real[:, columns : self.columns].sum(1))
        for b, length in enumerate(lens.tolist()):
            if length and self.window.first_key(length) < int(self.first[b]) * self.block_size:
                raise UnsupportedError(
                    f"crop by {num_columns} tokens needs keys that a layer with a window of {self.window.size} has "
                    "dropped; call activate_past_recording() on the cache before the tokens are stored"
                )
        self.columns, self.lens = columns, lens
        self._release()
        self._recount()

    def _recount(self) -> None:
        column = torch.arange(self.table.shape[1])
        used = (column >= self.first[:, None]) & (column < -(-self.lens // self.block_size)[:, None])
        self.refs = torch.bincount(self.table[used], minlength=self.num_pages)
        self.free = (self.refs[: self.num_pages] == 0).nonzero()[:, 0].flip(0).tolist()
        self.shared = bool((self.refs > 1).any())
        self._table_changed = True
        self.steps = []
