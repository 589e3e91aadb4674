"""QuireCache: transformers' Cache over quire's pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, get_layer_types_and_kwargs

from .. import _quire
from ..errors import InvalidArgumentError, UnsupportedError
from ..layout import KVCacheSpec, allocate_cache, cache_bytes
from ..modes import mode_info
from ..plan import AttentionPlan, AttentionProblem, plan_unified_attention, problem_of
from .attention import Rows
from .memory import GrowingMemory, capacity_of
from .pages import Pages, Step, Window


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
            raise UnsupportedError(f"layer {self.index} stores keys {list(key_states.shape)} and values "
                                   f"{list(value_states.shape)}; supported: [batch, heads, tokens, head_size]")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.spec = KVCacheSpec(self.mode, head_size=key_states.shape[3], head_size_v=value_states.shape[3],
                                num_kv_heads=key_states.shape[1], block_size=self.cache.block_size,
                                model_dtype=self.dtype, packing="kv_in_block")
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
                mode=self.mode)
        return self._views

    def _paged(self, one: _quire.Tensor, offset: int) -> torch.Tensor:
        """A part of every page, as ``one`` is of one page."""
        dtype = getattr(torch, one.dtype)
        memory = self._memory.tensor
        whole = memory[: memory.numel() // self.page_bytes * self.page_bytes].view(dtype)
        return whole.as_strided((memory.numel() // self.page_bytes, *one.shape[1:]),
                                (self.page_bytes // dtype.itemsize, *one.strides[1:]), offset // dtype.itemsize)

    def _copy_pages(self, source: torch.Tensor, target: torch.Tensor) -> None:
        memory = self._memory.tensor
        pages = memory[: memory.numel() // self.page_bytes * self.page_bytes].view(-1, self.page_bytes)
        pages[target] = pages[source]

    # ---- a forward pass ----------------------------------------------------------------------------------------------

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Rows, Rows]:
        """Hands the new rows to the attention function, which stores them: only there the padding is known."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return Rows(self, key_states), Rows(self, value_states)

    def attend(self, query: torch.Tensor, key: Rows, value: Rows, mask: torch.Tensor | None, scaling: float | None,
               sliding_window: int | None, softcap: float | None, sinks: torch.Tensor | None) -> torch.Tensor:
        """Stores the rows, unless another layer has, and attends. query: [B, Hq, L, d]; answers [B, L, Hq, dv]."""
        batch, num_heads, num_columns, head_size = query.shape
        if sliding_window is not None and sliding_window != self.window.size:
            raise InvalidArgumentError(
                f"layer {self.index} attends with sliding_window {sliding_window}, and QuireCache was made for "
                f"{self.window.size or 'none'}; give it the config of this model")
        step = self._step_of(key, batch, num_columns, mask)
        views = self._views_of(step.num_pages)
        if not key.stored:
            if step.copies is not None:
                self._copy_pages(*step.copies)
            _quire.reshape_and_cache(_rows(key.tensor), _rows(value.tensor), views, step.slots)
            key.stored = True
            key.tensor = value.tensor = None
            self.columns = step.end
        rows = _rows(query)
        out = torch.empty(batch * num_columns, num_heads, self.spec.head_size_v, dtype=query.dtype, device=query.device)
        if step.rows is not None:
            rows, whole = rows.index_select(0, step.rows), out.zero_()
            out = torch.empty(len(step.rows), *whole.shape[1:], dtype=out.dtype, device=out.device)
        arguments = (rows, out, views, step.cu_seqlens_q, step.seq_lens, step.block_table,
                     head_size**-0.5 if scaling is None else float(scaling))
        plan = self.cache.plan_of(self, step, arguments)
        _quire.run_unified_attention(plan, *arguments, **self.window.mask, softcap=softcap or 0.0,
                                     sinks=self._float_sinks(sinks), workspace=self.cache.workspace_of(plan, query.device))
        if step.rows is not None:
            out = whole.index_copy_(0, step.rows, out)
        return out.view(batch, num_columns, num_heads, self.spec.head_size_v)

    def _step_of(self, key: Rows, batch: int, num_columns: int, mask: torch.Tensor | None) -> Step:
        """This pass: the first layer of a group makes it, the others find it."""
        pages = self.pages
        if key.stored:
            return pages.step
        if self.columns == pages.columns:
            return pages.advance(batch, num_columns, mask)
        step = pages.step
        if step is None or self.columns + num_columns != step.end or (batch, num_columns) != (step.batch, step.num_columns):
            raise InvalidArgumentError(
                f"layer {self.index} holds {self.columns} columns and got {num_columns} more, and layers like it hold "
                f"{pages.columns}; a QuireCache serves one model, whose layers all see every token")
        return step

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

    def __init__(self, config: Any, mode: str | Sequence[str] = "int4_per_token_head", *,
                 skip_layers: Collection[int] = (), block_size: int = 16):
        config = config.get_text_config(decoder=True)
        types, arguments = get_layer_types_and_kwargs(config)
        modes = [mode] * len(types) if isinstance(mode, str) else list(mode)
        if len(modes) != len(types):
            raise InvalidArgumentError(f"mode has {len(modes)} entries; supported: one name, or {len(types)}, one a layer")
        for index in skip_layers:
            if not -len(types) <= index < len(types):
                raise InvalidArgumentError(f"skip_layers has {index}; the model has {len(types)} layers")
            modes[index] = "auto"
        self.block_size = block_size
        self._pages: dict[tuple[Window, torch.device], Pages] = {}
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
            elif kind in ("linear_attention", "conv", "moe", "mlp"):  # they keep a state and no keys
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments))
                continue
            else:
                raise UnsupportedError(f"layer {index} of {type(config).__name__} is of type {kind}; supported: full, sliding and "
                                       "chunked attention, and layers that keep a state (linear_attention, conv)")
            layers.append(QuireLayer(self, index, name, window))
        super().__init__(layers=layers)

    def pages_of(self, window: Window, device: torch.device) -> Pages:
        """The pages of the layers with that window on that device."""
        if (window, device) not in self._pages:
            self._pages[window, device] = Pages(window, self.block_size, device)
        return self._pages[window, device]

    def plan_of(self, layer: QuireLayer, step: Step, arguments: tuple) -> AttentionPlan:
        """The plan of a call: made once for a batch's shape, and again when the longest sequence outgrows its bound."""
        query = arguments[0]
        bound = 256
        while bound < step.max_seq_len:
            bound += max(bound // 4, 256) if bound & (bound - 1) == 0 else bound & -bound
        key = (layer.mode, layer.spec.num_kv_heads, layer.spec.head_size, layer.spec.head_size_v, layer.dtype,
               query.shape[1], query.dtype, query.device, step.batch, step.num_columns, bound)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= 64:
                self._plans.clear()
            problem = problem_of(*arguments, **layer.window.mask, max_query_len=step.num_columns, max_seq_len=bound)
            problem = dataclasses.replace(problem, max_num_tokens=step.batch * step.num_columns, max_batch=step.batch,
                                          max_query_len=step.num_columns, max_seq_len=bound)
            plan = self._plans[key] = plan_unified_attention(problem)
        return plan

    def workspace_of(self, plan: AttentionPlan, device: torch.device) -> torch.Tensor | None:
        """One workspace serves all layers of a device."""
        if plan.workspace_bytes == 0:
            return None
        workspace = self._workspaces.get(device)
        if workspace is None or workspace.numel() < plan.workspace_bytes:
            workspace = self._workspaces[device] = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
        return workspace
