"""The extension module. Its docstrings come from this file (python/docstrings.py).

T tokens are stored, N query tokens of B sequences read; Hk KV heads, Hq query heads, Hq % Hk == 0; d = head_size of K,
dv of V. Float means float32, float16 or bfloat16. An array is a torch.Tensor, a numpy.ndarray, a cupy.ndarray, a
jax.Array (as an input), a quire.Tensor, or anything that has __dlpack__ or the buffer protocol; None stands for one
that is not given. No array is ever copied.
"""

from typing import Any

Array = Any
Stream = Any

class Tensor:
    """A view of memory that another object owns: pointer, dtype, shape, strides, device.

    It goes on to other libraries without a copy: ``torch.from_dlpack(t)``, ``numpy.from_dlpack(t)``,
    ``numpy.asarray(t)``. The memory lives as long as the view.
    """

    def __init__(self, array: Array, dtype: str | None = None) -> None:
        """Views any array. ``dtype``, where given, takes the place of the array's own and must have as many bytes: for
        bfloat16 and float8 in libraries that have no such dtype, ``Tensor(x, "bfloat16")`` of x in uint8 or uint16
        being the usual case."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The extents."""
    @property
    def strides(self) -> tuple[int, ...]:
        """The strides, in elements."""
    @property
    def ndim(self) -> int:
        """The number of dimensions, 0 to 6."""
    @property
    def dtype(self) -> str:
        """The name of the dtype: "float32", "bfloat16", "float8_e4m3fn" and so on."""
    @property
    def device(self) -> str:
        """ "cpu" or "cuda:0" and so on."""
    @property
    def data_ptr(self) -> int:
        """The address of the first element."""
    @property
    def read_only(self) -> bool:
        """Whether the memory must not be written."""
    @property
    def bits(self) -> memoryview:
        """The same memory as unsigned integers of as many bytes, on the CPU: what NumPy can show of bfloat16 and
        float8, ``numpy.asarray(t.bits)``."""
    def __dlpack__(self, *, stream: Any = None, max_version: tuple[int, int] | None = None,
                   dl_device: tuple[int, int] | None = None, copy: bool | None = None) -> Any:
        """The capsule of the array API standard. Nothing is synchronized: a view does not know who writes to it."""
    def __dlpack_device__(self) -> tuple[int, int]:
        """(1, 0) for the CPU, (2, index) for CUDA."""

def allocate(num_bytes: int) -> Tensor:
    """Host memory of that many bytes, zeroed, at an address that is a multiple of 64: [num_bytes] uint8."""

def modes() -> list[dict[str, Any]]:
    """quire.modes, as dicts."""

def mode_info(name: str) -> dict[str, Any]:
    """quire.mode_info, as a dict."""

def register_mode(name: str, aliases: list[str] = []) -> None:
    """Adds a mode that is not in the table, to be served by a backend that is registered for it.

    Name and aliases must be new and differ, and are 1 to 64 letters, digits, '_', '-' and '.'. Thread-safe.
    AlreadyExistsError where one of them is taken, InvalidArgumentError where it is no name.
    """

def packing_factor(value: int) -> int:
    """Elements of a row for each element of the cache, of a KVQuantMode's number."""

def packed_head_size(value: int, head_size: int) -> int:
    """head_size / packing_factor; InvalidArgumentError where that is no whole number."""

def get_kv_quant_mode(kv_cache_dtype: str) -> int:
    """The KVQuantMode's number of a kv_cache_dtype; 0, NONE, for what the enum does not know."""

def mode_from_kv_quant_mode(value: int) -> str:
    """The mode of a KVQuantMode's number."""

def set_num_threads(num_threads: int) -> None:
    """How many of quire's own threads an op on the CPU uses, 1 to 4096; 0, the default, takes as many as OpenMP would
    (OMP_NUM_THREADS, else one for each processor). Not to be called while an op runs on another thread. Results have
    the same bits on any number of threads."""

def num_threads() -> int:
    """The number of parts that the next op of the CPU on this thread would be cut into."""

def version() -> str:
    """The version of libquire."""

def register_backend(mode: str, backend_class: type) -> None:
    """quire.register_backend, of any class that has the methods of QuantKVBackend."""

def backend_object(mode: str) -> Any:
    """The object of a mode whose backend is written in Python, None for the library's own. Raises what
    quire.get_backend does."""

def has_backend(mode: str) -> bool:
    """Whether the mode has a backend, constructed or not."""

def backend_needs_scale_caches(mode: str) -> bool:
    """QuantKVBackend.needs_scale_caches of a mode's backend."""

def backend_packing_factor(mode: str) -> int:
    """QuantKVBackend.packing_factor of a mode's backend."""

def backend_packed_head_size(mode: str, head_size: int) -> int:
    """QuantKVBackend.packed_head_size of a mode's backend."""

def backend_row_bytes(mode: str, head_size: int, is_value: bool) -> int:
    """QuantKVBackend.row_bytes of a mode's backend."""

def backend_scale_caches(mode: str, num_blocks: int, block_size: int,
                         num_kv_heads: int) -> tuple[Tensor | None, Tensor | None]:
    """QuantKVBackend.allocate_scale_caches of a mode's backend."""

def make_layout(spec: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """quire.make_layout, as dicts: what it resolved of the spec, and the layout's fields."""

def cache_bytes(spec: Any, num_blocks: int) -> tuple[int, int, int, int]:
    """quire.cache_bytes, as a tuple."""

class KVCacheViews:
    """The arrays of one layer's cache, as both ops take them. Read once, here: an engine keeps one for each layer.

    The arrays are kept alive, and must stay where they are: an array that is resized afterwards leaves these views
    behind.
    """

    def __init__(self, key_cache: Array, value_cache: Array, k_scale_cache: Array | None = None,
                 v_scale_cache: Array | None = None, *, k_page_meta: Array | None = None,
                 v_page_meta: Array | None = None, k_head_vector: Array | None = None,
                 v_head_vector: Array | None = None, mode: str | None = None) -> None:
        """Views a cache in arrays of your own, of any strides.

        key_cache, value_cache: [num_blocks, block_size, Hk, row], row being the format's row in elements of the cache's
        dtype; last stride 1. reshape_and_cache also takes the head-major layout of float modes and of fp8 per tensor:
        key_cache [num_blocks, Hk, d/x, block_size, x] and value_cache [num_blocks, Hk, dv, block_size].
        k_scale_cache, v_scale_cache: [num_blocks, block_size, Hk] float32, of the ``*_per_token_head`` modes only.
        k_page_meta, v_page_meta [num_blocks, Hk, page bytes] uint8 and k_head_vector [Hk, d], v_head_vector [Hk, dv]
        float32 are for formats whose rows are stored less a centre; no format of this version has one.
        mode: a kv_cache_dtype, which the ops then need not be told.
        """

    @property
    def key_cache(self) -> Array:
        """The array of the keys: what was given, or a quire.Tensor."""
    @property
    def value_cache(self) -> Array:
        """The array of the values."""
    @property
    def k_scale_cache(self) -> Array | None:
        """The scales of the keys, or None."""
    @property
    def v_scale_cache(self) -> Array | None:
        """The scales of the values, or None."""
    @property
    def k_page_meta(self) -> Array | None:
        """Metadata of the pages' keys, or None."""
    @property
    def v_page_meta(self) -> Array | None:
        """Metadata of the pages' values, or None."""
    @property
    def k_head_vector(self) -> Array | None:
        """The keys' centres, or None."""
    @property
    def v_head_vector(self) -> Array | None:
        """The values' centres, or None."""
    @property
    def mode(self) -> str | None:
        """The kv_cache_dtype, where the views know it."""
    def with_mode(self, mode: str) -> KVCacheViews:
        """The same arrays, of another mode."""

def make_views(spec: Any, num_blocks: int, base: Array, v_base: Array | None = None, k_scale_base: Array | None = None,
               v_scale_base: Array | None = None) -> KVCacheViews:
    """The views of memory that is laid out as make_layout(spec) says, for a cache of num_blocks pages.

    Each base is a writable, contiguous array of any dtype with at least the bytes that cache_bytes(spec, num_blocks)
    says; ``base`` holds K, and V unless packing is "separate". All are on one device.
    """

class AttentionPlan:
    """What plan_unified_attention chose. It does not change, and serves every call inside the bounds of its problem."""

    @property
    def problem(self) -> Any:
        """The AttentionProblem it was made for."""
    @property
    def workspace_bytes(self) -> int:
        """The bytes of the workspace; they grow only with the bounds."""
    @property
    def tensor_cores(self) -> bool:
        """Whether its products are of 16-bit numbers; otherwise they are of fp32."""
    def describe(self) -> str:
        """The kernels that will run, in words: for logs and benchmarks."""

def plan_unified_attention(problem: Any) -> AttentionPlan:
    """Plans unified_attention for an AttentionProblem. A pure function: it asks no device, but for the facts of the
    problem's device where its ``arch`` is None."""

def supports(problem: Any) -> tuple[bool, int]:
    """quire.supports, as a tuple."""

def device_arch(device: Any) -> tuple[int, int, int, int]:
    """quire.device_arch, as a tuple."""

def device_count(type: str) -> int:
    """quire.device_count."""

def reshape_and_cache(key: Array, value: Array, cache: KVCacheViews, slot_mapping: Array, *, mode: str | None = None,
                      k_scale: Array | None = None, v_scale: Array | None = None, error_counter: Array | None = None,
                      stream: Stream = None) -> None:
    """Encodes rows of keys and values and puts them into the slots of a paged cache.

    key: [T, Hk, d] Float (also float8 where the cache is the same float8: copied). value: [T, Hk, dv].
    cache: a KVCacheViews.
    slot_mapping: [<= T] int64 or int32; block * block_size + offset, negative: that token is skipped. The slots of a
    call must be unique.
    mode: a kv_cache_dtype; None: that of the cache.
    k_scale, v_scale: float32, one element or [Hk]: fp8 per tensor only, which stores x / k_scale. None: 1. A read
    multiplies by k_descale and v_descale, so the same arrays go there.
    error_counter: CUDA, [1] int64, incremented for each slot outside the cache (the token is skipped).
    stream: a cudaStream_t as an int, or a stream of torch.cuda or CuPy. None: PyTorch's current stream of the arrays'
    device, or CUDA's default stream where no array is PyTorch's. The CPU ignores it.

    All arrays are on one device. Without the GIL while it runs. Raises quire.Error, having written nothing:
    InvalidArgumentError for a wrong shape, dtype or argument, OutOfRangeError for a slot outside the cache (CPU);
    TypeError where an argument is no array.
    """

def unified_attention(query: Array, out: Array, cache: KVCacheViews, cu_seqlens_q: Array, seq_lens: Array,
                      block_table: Array, softmax_scale: float, *, mode: str | None = None, causal: bool = True,
                      causal_per_seq: Array | None = None, sliding_window: int = -1, chunk_lookback: int = -1,
                      mm_prefix_range: Array | None = None, mm_prefix_clamp_window: bool = False,
                      rswa_prefix_lens: Array | None = None, rswa_window: int = -1, softcap: float = 0.0,
                      sinks: Array | None = None, alibi_slopes: Array | None = None, use_alibi_sqrt: bool = False,
                      qq_bias: Array | None = None, q_descale: Array | None = None, k_descale: Array | None = None,
                      v_descale: Array | None = None, output_scale: Array | None = None, lse: Array | None = None,
                      max_query_len: int = 0, max_seq_len: int = 0, error_counter: Array | None = None,
                      stream: Stream = None) -> None:
    """Attends over a paged cache and writes ``out``: plans, finds a workspace and runs, in one call.

    query: [N, Hq, d] Float or float8 (then real = code * q_descale); last stride 1.
    out: [N, Hq, dv] Float, or float8_e4m3fn with output_scale; last stride 1.
    cache: a KVCacheViews, not head-major.
    cu_seqlens_q: [B + 1] int32, ascending from 0; rows of out past the last entry are not touched.
    seq_lens: [B] int32, the keys of each sequence, its new tokens included.
    block_table: [B, max_blocks] int32; entries past a sequence, or out of its window, are not read.
    softmax_scale: finite and not 0; usually 1 / sqrt(d).
    mode: a kv_cache_dtype; None: that of the cache.

    Which keys a query sees. Query row i of a sequence is at position p = seq_len - query_len + i, key j at position j.
    causal: keys with j <= p. causal_per_seq: [B] uint8 or bool, instead of it for each sequence.
    sliding_window: W >= 1: keys with p - j < W (not causal: also j - p < W), so W keys with the query's own; -1: off.
    What vLLM's and FlashAttention's kernels call window_size is then (W - 1, 0).
    chunk_lookback: >= 0: chunked local attention, instead of the window; -1: off.
    mm_prefix_range: [B, R, 2] int32: inclusive spans that see themselves both ways; mm_prefix_clamp_window: the window
    limits those too.
    rswa_prefix_lens: [B] int32, with rswa_window >= 1: keys below the prefix stay visible, and keys with p - j <
    rswa_window, instead of sliding_window.

    softcap: > 0: s = softcap * tanh(s / softcap). sinks: [Hq] float32, one extra logit for each head.
    alibi_slopes: [Hq] float32; use_alibi_sqrt. qq_bias: [Lq, Lq] float32, every query_len <= Lq.
    q_descale: float32, one element or [B, Hk]; float8 queries. k_descale, v_descale: float32, one element, [Hk] or [B,
    Hk]: multiplies what is read, in every mode. output_scale: float32, one element, required for a float8_e4m3fn out.
    lse: [N, Hq] float32, any strides, written: natural log of the softmax's denominator; -inf for a row without keys.
    max_query_len, max_seq_len: bounds on the lengths. CUDA needs them, whose lengths the host cannot read.
    error_counter: CUDA, [1] int64, counts block ids outside the cache (their keys are skipped).
    stream: a cudaStream_t as an int, or a stream of torch.cuda or CuPy. None: PyTorch's current stream of the arrays'
    device, or CUDA's default stream where no array is PyTorch's. The CPU ignores it.

    All arrays are on one device. Without the GIL while it runs. Raises quire.Error, having written nothing; TypeError
    where an argument is no array.
    """

def run_unified_attention(plan: AttentionPlan, query: Array, out: Array, cache: KVCacheViews, cu_seqlens_q: Array,
                          seq_lens: Array, block_table: Array, softmax_scale: float, *, mode: str | None = None,
                          causal: bool = True, causal_per_seq: Array | None = None, sliding_window: int = -1,
                          chunk_lookback: int = -1, mm_prefix_range: Array | None = None,
                          mm_prefix_clamp_window: bool = False, rswa_prefix_lens: Array | None = None,
                          rswa_window: int = -1, softcap: float = 0.0, sinks: Array | None = None,
                          alibi_slopes: Array | None = None, use_alibi_sqrt: bool = False,
                          qq_bias: Array | None = None, q_descale: Array | None = None,
                          k_descale: Array | None = None, v_descale: Array | None = None,
                          output_scale: Array | None = None, lse: Array | None = None, max_query_len: int = 0,
                          max_seq_len: int = 0, error_counter: Array | None = None, stream: Stream = None,
                          workspace: Array | None = None) -> None:
    """Runs a plan: unified_attention without planning and without allocating.

    workspace: a contiguous array of at least plan.workspace_bytes bytes, 16-byte aligned, on the plan's device; it
    needs no initialisation, and None does where the plan needs 0 bytes. The call must lie inside the bounds of the
    plan, on its device and in its dtypes. The other arguments are those of unified_attention; the plan's bounds take
    the place of max_query_len and max_seq_len.
    """

def problem_of(query: Array, out: Array, cache: KVCacheViews, cu_seqlens_q: Array, seq_lens: Array,
               block_table: Array, softmax_scale: float, *, mode: str | None = None, causal: bool = True,
               causal_per_seq: Array | None = None, sliding_window: int = -1, chunk_lookback: int = -1,
               mm_prefix_range: Array | None = None, mm_prefix_clamp_window: bool = False,
               rswa_prefix_lens: Array | None = None, rswa_window: int = -1, softcap: float = 0.0,
               sinks: Array | None = None, alibi_slopes: Array | None = None, use_alibi_sqrt: bool = False,
               qq_bias: Array | None = None, q_descale: Array | None = None, k_descale: Array | None = None,
               v_descale: Array | None = None, output_scale: Array | None = None, lse: Array | None = None,
               max_query_len: int = 0, max_seq_len: int = 0, error_counter: Array | None = None,
               stream: Stream = None) -> dict[str, Any]:
    """quire.problem_of, as a dict."""

def merge_attn_states(out: Array, prefix_out: Array, prefix_lse: Array, suffix_out: Array, suffix_lse: Array, *,
                      lse: Array | None = None, stream: Stream = None) -> None:
    """Combines two partial results over disjoint sets of keys, exactly.

    out = sum_i exp(lse_i - lse) out_i and lse = log sum exp lse_i. Outputs are [N, Hq, dv] Float, LSE [N, Hq] float32,
    any strides; a part without keys (LSE -inf) is neutral. If sinks are used, exactly one of the parts was computed
    with them. ``out`` may be one of the parts.
    """

def hadamard(x: Array, out: Array, *, inverse: bool = False, signs: bool = False, stream: Stream = None) -> None:
    """The rotations that int4, int2 and TurboQuant rows are stored in, along the last dimension, in fp32.

    x: [any, d] Float, 1 to 6 dimensions, d from 1 to 512, any strides. out: the shape of x, Float, any strides without
    overlap; it may be x itself.

        out = H x            signs False; H is its own inverse up to b
        out = H (s * x)      signs True: the randomized Hadamard transform (RHT), vLLM's single_rht(x)
        out = s * (H x)      signs True, inverse True: b times the inverse of the RHT, vLLM's single_rht(x, True)

    H is the unnormalized Walsh-Hadamard matrix in Sylvester order (H H = b I), in blocks of b, the largest power of two
    that divides d; s are fixed signs, the same in every block. The bits are the same on every device.
    """

def turboquant_store(key: Array, value: Array, kv_cache: Array, slot_mapping: Array, *, key_bits: int = 4,
                     value_bits: int = 4, norm_correction: bool = True, key_e4b15: bool = False,
                     rotation: Array | None = None, midpoints: Array | None = None, stream: Stream = None) -> None:
    """Stores rows in TurboQuant's slots, with the arguments of vLLM's launcher.

    key, value: [T, Hk, d] Float. kv_cache: [num_blocks, block_size, Hk, slot bytes] uint8, last stride 1; a slot may be
    wider than the format's, and what lies behind the value row is not touched. slot_mapping: [<= T] int64 or int32.
    key_bits: 3 or 4 (Lloyd-Max codes of the rotated key) or 8 (fp8 keys); value_bits: 3 or 4; key_e4b15: fp8 keys as
    e4b15 instead of e4m3fn. norm_correction is the reader's: the same bytes are written either way.
    rotation: [d, d] float32, the Hadamard matrix over sqrt(d); midpoints: [2**key_bits - 1] float32, of the centroids
    for N(0, 1 / d). quire derives both, honours these values and refuses others.
    """

def turboquant_decode_attention(query: Array, out: Array, kv_cache: Array, block_table: Array, seq_lens: Array,
                                softmax_scale: float, *, key_bits: int = 4, value_bits: int = 4,
                                norm_correction: bool = True, key_e4b15: bool = False, rotation: Array | None = None,
                                centroids: Array | None = None, lse: Array | None = None, max_seq_len: int = 0,
                                stream: Stream = None) -> None:
    """Attends over TurboQuant's slots, one token a sequence, with the arguments of vLLM's launcher.

    query, out: [B, Hq, d] Float. kv_cache: as turboquant_store has it. block_table: [B, max_blocks] int32. seq_lens:
    [B] int32. softmax_scale: usually 1 / sqrt(d). rotation as above; centroids: [2**key_bits] float32, of N(0, 1 / d).
    lse: [B, Hq] float32, written. max_seq_len: CUDA, a bound on seq_lens; 0: all that block_table has room for.
    InvalidArgumentError for 3- or 4-bit keys without norm_correction.
    """

def turboquant_mode(key_bits: int = 4, value_bits: int = 4, norm_correction: bool = True,
                    key_e4b15: bool = False) -> str:
    """The mode of a configuration. Refused are other bit widths, and 3- or 4-bit keys without norm correction, because
    a mode is also read."""

def turboquant_views(kv_cache: Array, head_size: int, key_bits: int = 4, value_bits: int = 4,
                     norm_correction: bool = True, key_e4b15: bool = False) -> KVCacheViews:
    """The key and value views of a slot array, for calling the ops with all that they can do. The slot array must be
    writable, as turboquant_store has it; there are no scale caches."""

def turboquant_uses_e4b15(major: int, minor: int) -> bool:
    """Whether vLLM keeps fp8 keys as e4b15 on a GPU of this compute capability: below 8.9."""

def boundary_skip_layers(num_layers: int, n: int = 2) -> list[int]:
    """The layers that a TurboQuant model usually keeps in its own dtype: the first n and the last n, ascending; n is
    capped at num_layers / 2."""
