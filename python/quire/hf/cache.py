"""QuireCache: transformers' Cache over quire's pages."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, get_layer_types_and_kwargs

from .. import _quire
from ..errors import InvalidArgumentError, UnsupportedError
from ..layout import KVCacheSpec, allocate_cache, cache_bytes
from ..modes import mode_info
from ..plan import AttentionPlan, plan_unified_attention, problem_of
from .attention import Rows
from .memory import GrowingMemory, capacity_of
from .pages import HostMask, Pages, Step, Window


class QuireLayer(CacheLayerMixin):
    """The rows of one layer: pages that grow where they are, and where they end."""

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: QuireCache, index: int, mode: str, window: Window):
        super().__init__()
        self.cache, self.index, self.mode, self.window = cache, index, mode, window
        self.is_sliding = window.size > 0
        self.columns = 0
        self.pages: Pages | None = None
        self._memory: GrowingMemory | None = None
        self._views: _quire.KVCacheViews | None = None
        self._viewed: torch.Tensor | None = None
        self._sinks: torch.Tensor | None = None

    def __repr__(self) -> str:
        return f"QuireLayer(mode={self.mode!r}, window={self.window.size or None})"

    # ---- memory ------------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Learns heads, head sizes, dtype and device. key_states: [B, Hk, L, d], value_states: [B, Hk, L, dv]."""
        if key_states.ndim != 4 or value_states.ndim != 4:
            raise UnsupportedError(
                f"layer {self.index} stores keys {list(key_states.shape)} and values "
                f"{list(value_states.shape)}; supported: [batch, heads, tokens, head_size]"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.spec = KVCacheSpec(
            self.mode,
            head_size=key_states.shape[3],
            head_size_v=value_states.shape[3],
            num_kv_heads=key_states.shape[1],
            block_size=self.cache.block_size,
            model_dtype=self.dtype,
            packing="kv_in_block",
        )
        sizes = cache_bytes(self.spec, 1)
        # A page has its rows, then the scales of K, then those of V.
        self._offsets = [0, 0, sizes.base, sizes.base + sizes.k_scales]
        self.page_bytes = -(-(sizes.base + sizes.k_scales + sizes.v_scales) // 256) * 256
        self._page = allocate_cache(self.spec, 1)
        self._memory = GrowingMemory(self.device, capacity_of(self.device, len(self.cache.layers)))
        self.pages = self.cache.pages_of(self.window, self.device)
        self.is_initialized = True

    def _views_of(self, num_pages: int) -> _quire.KVCacheViews:
        """The views of the cache, with memory for ``num_pages`` at least."""
        self._memory.commit(num_pages * self.page_bytes)
        if self._viewed is not self._memory.tensor:
            self._viewed = self._memory.tensor
            page = self._page
            parts = [page.key_cache, page.value_cache, page.k_scale_cache, page.v_scale_cache]
            arrays = [None if part is None else quire_tensor(part) for part in parts]
            self._offsets[1] = arrays[1].data_ptr - arrays[0].data_ptr
            self._views = _quire.KVCacheViews(
                *(None if a is None else self._paged(a, offset) for a, offset in zip(arrays, self._offsets)),
                mode=self.mode,
            )
        return self._views

    def _paged(self, one: _quire.Tensor, offset: int) -> torch.Tensor:
        """A part of every page, as ``one`` is of one page."""
        dtype = getattr(torch, one.dtype)
        memory = self._memory.tensor
        whole = memory[: memory.numel() // self.page_bytes * self.page_bytes].view(dtype)
        return whole.as_strided(
            (memory.numel() // self.page_bytes, *one.shape[1:]),
            (self.page_bytes // dtype.itemsize, *one.strides[1:]),
            offset // dtype.itemsize,
        )

    def _copy_pages(self, source: torch.Tensor, target: torch.Tensor) -> None:
        memory = self._memory.tensor
        pages = memory[: memory.numel() // self.page_bytes * self.page_bytes].view(-1, self.page_bytes)
        pages[target] = pages[source]

    def copy(self, cache: QuireCache) -> QuireLayer:
        """The same rows in memory of their own, as a layer of ``cache``."""
        other = copy.copy(self)
        other.cache, other._views, other._viewed, other._sinks = cache, None, None, None
        if self.is_initialized:
            other.pages = cache.pages_of(self.window, self.device)
            other._offsets = list(self._offsets)
            other._memory = GrowingMemory(self.device, capacity_of(self.device, len(cache.layers)))
            used = self.pages.num_pages * self.page_bytes
            other._memory.commit(used)
            if used:
                other._memory.tensor[:used] = self._memory.tensor[:used]
        return other

    # ---- a forward pass ----------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Rows, Rows]:
        """Hands the new rows to the attention function, which stores them: only there the padding is known."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return Rows(self, key_states), Rows(self, value_states)

    def attend(
        self,
        query: torch.Tensor,
        key: Rows,
        value: Rows,
        mask: torch.Tensor | None,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Stores the rows, unless another layer has, and attends. query: [B, Hq, L, d]; answers [B, L, Hq, dv]."""
        batch, num_heads, num_columns, head_size = query.shape
        if sliding_window is not None and sliding_window != self.window.size:
            raise InvalidArgumentError(
                f"layer {self.index} attends with sliding_window {sliding_window}, and QuireCache was made for "
                f"{self.window.size or 'none'}; give it the config of this model"
            )
        scale = head_size**-0.5 if scaling is None else float(scaling)
        steps = self._steps_of(key, batch, num_columns, mask)
        options = {**self.window.mask, "softcap": softcap or 0.0, "sinks": self._float_sinks(sinks)}
        outs, begin = [], 0
        for step in steps:
            columns = slice(begin, begin + step.num_columns)
            views = self._views_of(step.num_pages)
            if not key.stored:
                if step.copies is not None:
                    self._copy_pages(*step.copies)
                _quire.reshape_and_cache(
                    _rows(key.tensor[:, :, columns]), _rows(value.tensor[:, :, columns]), views, step.slots
                )
                self.columns = step.end
            outs.append(self._read(query[:, :, columns], step, views, scale, options))
            begin = columns.stop
        if not key.stored:
            key.stored, key.tensor, value.tensor = True, None, None
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _read(
        self, query: torch.Tensor, step: Step, views: _quire.KVCacheViews, scale: float, options: dict[str, Any]
    ) -> torch.Tensor:
        """Attends from the columns of one step: [B, Hq, L, d] to [B, L, Hq, dv]."""
        batch, num_heads, num_columns, _ = query.shape
        rows = _rows(query)
        out = torch.empty(len(rows), num_heads, self.spec.head_size_v, dtype=query.dtype, device=query.device)
        if step.rows is not None:
            rows, whole = rows.index_select(0, step.rows), out.zero_()
            out = torch.empty(len(rows), *whole.shape[1:], dtype=out.dtype, device=out.device)
        arguments = (rows, out, views, step.cu_seqlens_q, step.seq_lens, step.block_table, scale)
        plan = self.cache.plan_of(self, step, arguments)
        _quire.run_unified_attention(plan, *arguments, **options, workspace=self.cache.workspace_of(plan, query.device))
        if step.rows is not None:
            out = whole.index_copy_(0, step.rows, out)
        return out.view(batch, num_columns, num_heads, self.spec.head_size_v)

    def _steps_of(self, key: Rows, batch: int, num_columns: int, mask: torch.Tensor | None) -> list[Step]:
        """This pass: the first layer of a group makes it, the others find it."""
        pages = self.pages
        if key.stored:
            return pages.steps
        if self.columns == pages.columns:
            return pages.advance(batch, num_columns, self.cache.host_mask(mask, batch, self.columns, num_columns))
        steps = pages.steps
        if (
            not steps
            or self.columns + num_columns != pages.columns
            or batch != pages.batch
            or (sum(step.num_columns for step in steps) != num_columns)
        ):
            raise InvalidArgumentError(
                f"layer {self.index} holds {self.columns} columns and got {num_columns} more, and layers like it hold "
                f"{pages.columns}; a QuireCache serves one model, whose layers all see every token"
            )
        return steps

    def _float_sinks(self, sinks: torch.Tensor | None) -> torch.Tensor | None:
        if sinks is None or sinks.dtype == torch.float32:
            return None if sinks is None else sinks.detach()
        if self._sinks is None:
            self._sinks = torch.empty(sinks.shape, dtype=torch.float32, device=sinks.device)
        return self._sinks.copy_(sinks.detach())

    # ---- what transformers asks --------------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def offload(self) -> None:
        raise UnsupportedError("QuireCache does not offload layers")

    prefetch = offload


def quire_tensor(array: Any) -> _quire.Tensor:
    return array if isinstance(array, _quire.Tensor) else _quire.Tensor(array)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[B, H, L, d] as [B * L, H, d]: a view where one of B and L is 1."""
    return x.transpose(1, 2).reshape(x.shape[0] * x.shape[2], x.shape[1], x.shape[3])


class QuireCache(Cache):
    """A KV cache for ``model.generate(past_key_values=...)`` in a mode of quire.

        model.set_attn_implementation("quire")
        model.generate(**inputs, past_key_values=quire.hf.QuireCache(model.config, mode="int4_per_token_head"))

    config: the model's config, or its text config. mode: a kv_cache_dtype for all layers, or a list of one for each.
    skip_layers: layers that keep the model's own dtype; -1 is the last. block_size: tokens of a page.

    Memory grows by pages, and what is stored is never copied. Layers with a window drop pages that left it. After
    ``generate`` the cache holds all tokens but the last, and goes on with the next call.
    """

    def __init__(
        self,
        config: Any,
        mode: str | Sequence[str] = "int4_per_token_head",
        *,
        skip_layers: Collection[int] = (),
        block_size: int = 16,
    ):
        config = config.get_text_config(decoder=True)
        types, arguments = get_layer_types_and_kwargs(config)
        if isinstance(arguments, dict):  # transformers 5.17 has the same ones for all layers
            arguments = [arguments] * len(types)
        modes = [mode] * len(types) if isinstance(mode, str) else list(mode)
        if len(modes) != len(types):
            raise InvalidArgumentError(
                f"mode has {len(modes)} entries; supported: one name, or {len(types)}, one a layer"
            )
        for index in skip_layers:
            if not -len(types) <= index < len(types):
                raise InvalidArgumentError(f"skip_layers has {index}; the model has {len(types)} layers")
            modes[index] = "auto"
        self.block_size = block_size
        self._pages: dict[tuple[Window, torch.device], Pages] = {}
        self._record_past = False
        self._host_mask: HostMask | None = None
        self._in_pieces = not getattr(config, "num_kv_shared_layers", 0)
        self._plans: dict[tuple, AttentionPlan] = {}
        self._workspaces: dict[torch.device, torch.Tensor] = {}
        layers = []
        for index, (kind, name) in enumerate(zip(types, modes)):
            mode_info(name)
            if kind == "full_attention":
                window = Window()
            elif kind == "sliding_attention":
                window = Window(config.sliding_window)
            elif kind == "chunked_attention":
                window = Window(config.attention_chunk_size, chunked=True)
            elif kind in ("linear_attention", "conv", "moe", "mlp", "dummy"):  # they keep no keys of their own
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments[index]))
                continue
            else:
                raise UnsupportedError(
                    f"layer {index} of {type(config).__name__} is of type {kind}; supported: full, sliding and "
                    "chunked attention, and layers that keep a state (linear_attention, conv)"
                )
            layers.append(QuireLayer(self, index, name, window))
        super().__init__(layers=layers)

    def pages_of(self, window: Window, device: torch.device) -> Pages:
        """The pages of the layers with that window on that device."""
        if (window, device) not in self._pages:
            self._pages[window, device] = Pages(window, self.block_size, device, self._in_pieces)
            self._pages[window, device].record_past = self._record_past
        return self._pages[window, device]

    def plan_of(self, layer: QuireLayer, step: Step, arguments: tuple) -> AttentionPlan:
        """The plan of a call: made once for a batch's shape, and again when the longest sequence outgrows its bound."""
        query = arguments[0]
        quarter = max(256, 1 << step.max_seq_len.bit_length() - 3)
        bound = -(-step.max_seq_len // quarter) * quarter
        key = (
            layer.mode,
            layer.spec.num_kv_heads,
            layer.spec.head_size,
            layer.spec.head_size_v,
            layer.dtype,
            query.shape[1],
            query.dtype,
            query.device,
            step.batch,
            step.num_columns,
            bound,
        )
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= 64:
                self._plans.clear()
            problem = problem_of(*arguments, **layer.window.mask, max_query_len=step.num_columns, max_seq_len=bound)
            problem = dataclasses.replace(
                problem,
                max_num_tokens=step.batch * step.num_columns,
                max_batch=step.batch,
                max_query_len=step.num_columns,
                max_seq_len=bound,
            )
            plan = self._plans[key] = plan_unified_attention(problem)
        return plan

    def host_mask(self, mask: torch.Tensor | None, batch: int, columns: int, num_columns: int) -> HostMask | None:
        """A pass's mask on the host: read from the device once, for all groups of layers."""
        if mask is None:
            return None
        if mask.shape != (batch, columns + num_columns):
            raise InvalidArgumentError(
                f"attention_mask is {list(mask.shape)}; supported: [{batch}, {columns + num_columns}], the {columns} "
                f"columns in the cache and the {num_columns} new ones, True or 1 for tokens"
            )
        key = (batch, columns, num_columns)
        in_pass = any(pages.columns == columns + num_columns for pages in self._pages.values())
        if self._host_mask is None or self._host_mask.key != key or not in_pass:
            new = mask[:, columns:].to("cpu", torch.bool)
            self._host_mask = HostMask(key, None if new.all() else new, mask[:, :columns].sum(1).to("cpu"))
        return self._host_mask

    def workspace_of(self, plan: AttentionPlan, device: torch.device) -> torch.Tensor | None:
        """One workspace serves all layers of a device."""
        if plan.workspace_bytes == 0:
            return None
        workspace = self._workspaces.get(device)
        if workspace is None or workspace.numel() < plan.workspace_bytes:
            workspace = self._workspaces[device] = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
        return workspace

    # ---- between passes ----------------------------------------------------------------------------------------------

    @property
    def num_bytes(self) -> int:
        """The bytes of all pages that hold tokens, their empty slots included; not the states of linear layers."""
        total = 0
        for layer in self.layers:
            if not isinstance(layer, QuireLayer):
                continue
            if layer.is_initialized:
                total += layer.pages.pages_in_use * layer.page_bytes
        return total

    def reset(self) -> None:
        """Forgets all tokens and keeps the memory."""
        for pages in self._pages.values():
            pages.clear()
        self._after("reset")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Makes sequence i that of ``beam_idx[i]``. No page is copied: beams share pages until they write to them."""
        self._select("reorder_cache", beam_idx, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the sequences of ``indices``, in that order."""
        self._select("batch_select_indices", indices, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence ``repeats`` times; the copies share pages until they write to them."""
        self._select("batch_repeat_interleave", None, repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` columns. A positive number is the length to keep, as in transformers.

        After activate_past_recording(), it also lets layers with a window drop what left it.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted generation gives a tensor
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        for pages in self._pages.values():
            pages.crop(-tokens_to_remove)
        self._after("crop", tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Lets layers with a window keep what leaves it until the next crop(), so that crop can go back that far."""
        self._record_past = True
        for pages in self._pages.values():
            pages.record_past = True
        self._after("activate_past_recording")

    def _select(self, method: str, indices: torch.Tensor | None, argument: Any) -> None:
        for pages in self._pages.values():
            chosen = torch.arange(pages.batch).repeat_interleave(argument) if indices is None else indices
            pages.select(chosen)
        self._after(method, argument)

    def _after(self, method: str, *arguments: Any) -> None:
        """Tells the layers what happened to their pages, and those without pages to do the same."""
        self._host_mask = None
        for layer in self.layers:
            if not isinstance(layer, QuireLayer):
                if hasattr(layer, method):
                    getattr(layer, method)(*arguments)
            elif layer.pages is not None:
                layer.columns = layer.pages.columns

    def __deepcopy__(self, memo: dict) -> QuireCache:
        """A cache of its own with the same tokens: a prompt's cache can serve many continuations."""
        other = copy.copy(self)
        memo[id(self)] = other
        other._workspaces = {}
        other._pages = {key: pages.copy() for key, pages in self._pages.items()}
        other.layers = [
            layer.copy(other) if isinstance(layer, QuireLayer) else copy.deepcopy(layer, memo) for layer in self.layers
        ]
        return other
