"""What describes a cache and a call: modes, layouts, plans; they are values, which compare, hash and pickle."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import quire
from problems import Problem


def values():
    spec = quire.KVCacheSpec("int4_per_token_head", head_size=64, num_kv_heads=2)
    problem = quire.problem_of(**Problem().read)
    return [
        quire.mode_info("int4_per_token_head"),
        quire.KVQuantMode.INT4_PER_TOKEN_HEAD,
        spec,
        quire.make_layout(spec),
        quire.cache_bytes(spec, 3),
        problem,
        quire.Arch(9, 0, 132, 228 << 10),
        quire.supports(problem),
    ]


@pytest.mark.parametrize("value", values(), ids=lambda value: type(value).__name__)
def test_values_pickle_copy_and_hash(value):
    for again in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert again == value and hash(again) == hash(value)


def test_exceptions_pickle():
    with pytest.raises(quire.NotFoundError) as caught:
        quire.mode_info("int5")
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is quire.NotFoundError and str(again) == str(caught.value)


def test_what_points_to_memory_does_not_pickle():
    problem = Problem()
    plan = quire.plan_unified_attention(quire.problem_of(**problem.read))
    for thing in (problem.cache, problem.cache.key_cache, plan):
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(thing)


# ---- modes -----------------------------------------------------------------------------------------------------------


def test_modes():
    modes = {mode.name: mode for mode in quire.modes() if not mode.registered}
    assert list(modes)[0] == "auto" and len(modes) >= 14
    int4 = modes["int4_per_token_head"]
    assert (int4.kv_quant_mode, int4.key_format, int4.shared_slot) == (
        quire.KVQuantMode.INT4_PER_TOKEN_HEAD,
        "int4_per_token_head",
        False,
    )
    assert modes["turboquant_4bit_nc"].kv_quant_mode is None and modes["turboquant_4bit_nc"].shared_slot
    assert quire.mode_info("fp8_e4m3") == modes["fp8"] and "fp8_e4m3" in modes["fp8"].aliases
    composed = quire.mode_info("k=int8_per_token_head,v=turboquant_v3")
    assert composed.composed and composed.value_format == "turboquant_v3"
    with pytest.raises(quire.NotFoundError, match="int8_per_token_head"):
        quire.mode_info("int5")


def test_kv_quant_mode():
    mode = quire.KVQuantMode
    assert quire.get_kv_quant_mode("int2_per_token_head") is mode.INT2_PER_TOKEN_HEAD
    assert quire.get_kv_quant_mode("turboquant_4bit_nc") is mode.NONE
    assert quire.mode_from_kv_quant_mode(mode.FP8_PER_TOKEN_HEAD) == "fp8_per_token_head"
    with pytest.raises(quire.InvalidArgumentError):
        quire.mode_from_kv_quant_mode(mode.NONE)
    assert [value.packing_factor for value in mode] == [1, 1, 1, 1, 2, 4]
    assert [value.is_per_token_head for value in mode] == [False, False, True, True, True, True]
    assert mode.INT2_PER_TOKEN_HEAD.packed_head_size(128) == 32
    with pytest.raises(quire.InvalidArgumentError):
        mode.INT2_PER_TOKEN_HEAD.packed_head_size(126)


# ---- layouts ---------------------------------------------------------------------------------------------------------

BYTES = {
    "auto": 512,
    "fp8": 256,
    "int8_per_token_head": 264,
    "fp8_per_token_head": 264,
    "int4_per_token_head": 136,
    "int2_per_token_head": 72,
    "turboquant_k8v4": 196,
    "turboquant_4bit_nc": 134,
    "turboquant_k3v4_nc": 118,
    "turboquant_3bit_nc": 102,
}


@pytest.mark.parametrize("mode", BYTES)
def test_layouts_cost_what_the_readme_says(mode):
    layout = quire.make_layout(quire.KVCacheSpec(mode))
    assert layout.bytes_per_token_head == BYTES[mode]
    assert layout.bytes_per_token == 8 * BYTES[mode]
    assert layout.spec.mode == mode and layout.spec.head_size_v == 128
    assert layout.spec.packing == ("kv_in_row" if mode.startswith("turboquant") else "separate")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"order": "HDN"}, "order is 'HDN'; supported: NHD, HND"),
        ({"packing": "both"}, "packing is 'both'; supported: separate, kv_in_block, kv_in_row"),
        ({"scales": "none"}, "scales is 'none'; supported: separate, inline"),
        (
            {"head_size": 127},
            "mode int4_per_token_head packs 2 elements together, so head_size must be a multiple of 2, got 127",
        ),
        ({"head_size": 1.5}, "head_size is 1.5; it must be a whole number"),
        ({"head_size": 2**40}, "head_size is 1099511627776; it must be a whole number"),
        ({"block_size": 0}, "block_size is 0"),
        ({"model_dtype": "int4"}, "model_dtype is 'int4'; it must be the name of a dtype, such as 'bfloat16'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_specs(change, sentence):
    with pytest.raises(quire.InvalidArgumentError) as caught:
        quire.make_layout(dataclasses.replace(quire.KVCacheSpec("int4_per_token_head"), **change))
    assert sentence in str(caught.value)


def test_dtypes_of_other_libraries_name_a_spec(torch):
    spec = quire.KVCacheSpec("auto", model_dtype=torch.float16)
    assert (
        spec
        == quire.KVCacheSpec("auto", model_dtype=np.float16)
        == quire.KVCacheSpec("auto", model_dtype=np.dtype("f2"))
    )
    assert quire.make_layout(spec).key_cache_dtype == "float16"


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("packing", ["separate", "kv_in_block", "kv_in_row"])
@pytest.mark.parametrize("scales", ["separate", "inline"])
def test_every_layout_works(order, packing, scales):
    expected = Problem(head_size=32).run()
    problem = Problem(head_size=32)
    spec = quire.KVCacheSpec(
        "int8_per_token_head",
        head_size=32,
        num_kv_heads=2,
        order=order,
        packing=packing,
        scales=scales,
        page_alignment=256,
    )
    cache = quire.allocate_cache(spec, 4)
    quire.reshape_and_cache(**{**problem.store, "cache": cache})
    quire.unified_attention(**{**problem.read, "cache": cache})
    assert (problem.read["out"] == expected).all()
    assert cache.key_cache.shape == (4, 16, 2, 32) and cache.key_cache.dtype == "int8"


def test_make_views_lie_in_the_memory_they_are_given(cpu_library):
    spec = quire.KVCacheSpec("int4_per_token_head", head_size=64, num_kv_heads=2, packing="kv_in_block")
    sizes = quire.cache_bytes(spec, 3)
    assert sizes.v_base == 0 and sizes.k_scales == 3 * 16 * 2 * 4
    base, k_scales, v_scales = (
        cpu_library.array(np.zeros(size, np.uint8)) for size in (sizes.base, sizes.k_scales, sizes.v_scales)
    )
    cache = quire.make_views(spec, 3, base, None, k_scales, v_scales)
    assert cache.key_cache.data_ptr == quire.Tensor(base).data_ptr
    assert cache.value_cache.data_ptr == quire.Tensor(base).data_ptr + quire.make_layout(spec).v_offset
    with pytest.raises(
        quire.InvalidArgumentError, match=f"^base has {sizes.base - 1} bytes; 3 blocks need {sizes.base}$"
    ):
        quire.make_views(spec, 3, base[:-1], None, k_scales, v_scales)
    with pytest.raises(quire.InvalidArgumentError, match="^k_scale_base is not given; it must have 384 bytes$"):
        quire.make_views(spec, 3, base)
    with pytest.raises(quire.InvalidArgumentError, match="^base is not contiguous"):
        quire.make_views(spec, 1, base[::2], None, k_scales, v_scales)
    with pytest.raises(quire.InvalidArgumentError, match="num_blocks"):
        quire.cache_bytes(spec, -1)


def test_allocate_with_an_allocator_of_ones_own():
    asked = []

    def empty(num_bytes):
        asked.append(num_bytes)
        return np.zeros(num_bytes, np.uint8)

    spec = quire.KVCacheSpec("int8_per_token_head", head_size=32, num_kv_heads=2)
    cache = quire.allocate_cache(spec, 4, empty=empty)
    assert asked == [4096, 4096, 512, 512]
    problem = Problem()
    quire.reshape_and_cache(**{**problem.store, "cache": cache})
    assert quire.allocate_cache(spec, 0).key_cache.shape == (0, 16, 2, 32)


def test_allocated_memory_is_aligned_and_zero():
    cache = quire.allocate_cache(quire.KVCacheSpec("float32"), 2)
    assert cache.key_cache.data_ptr % 64 == 0 and not np.asarray(cache.key_cache).any()


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_runs_calls_inside_its_bounds(cpu_library):
    problem = Problem(array=cpu_library.array, lengths=(300, 7), query_lens=(1, 3))
    expected = cpu_library.numpy(problem.run()).copy()
    plan = quire.plan_unified_attention(quire.problem_of(**problem.read))
    assert plan.problem.max_seq_len == 300 and plan.problem.num_q_heads == 4 and plan.problem.arch == quire.Arch()
    assert plan.describe().startswith("cpu") and plan.describe() in repr(plan) and plan.tensor_cores is False
    workspace = cpu_library.array(np.empty(plan.workspace_bytes + 16, np.uint8))
    start = -quire.Tensor(workspace).data_ptr % 16
    workspace = workspace[start : start + plan.workspace_bytes]
    quire.run_unified_attention(plan, **problem.read, workspace=workspace)
    assert (cpu_library.numpy(problem.read["out"]) == expected).all()
    if plan.workspace_bytes:
        with pytest.raises(
            quire.InvalidArgumentError, match=f"^workspace has 0 bytes; the plan needs {plan.workspace_bytes}$"
        ):
            quire.run_unified_attention(plan, **problem.read)
    longer = Problem(array=cpu_library.array, lengths=(301, 7), query_lens=(1, 3))
    with pytest.raises(quire.InvalidArgumentError, match="but the plan was made for at most"):
        quire.run_unified_attention(plan, **longer.read, workspace=workspace)


def test_plans_are_pure():
    problem = quire.AttentionProblem(
        mode="int4_per_token_head",
        num_q_heads=32,
        num_kv_heads=8,
        head_size=128,
        block_size=16,
        max_num_tokens=64,
        max_batch=64,
        max_query_len=1,
        max_seq_len=8192,
    )
    assert problem.head_size_v == 128
    plan = quire.plan_unified_attention(problem)
    support = quire.supports(problem)
    assert support.workspace_bytes == plan.workspace_bytes and support.tensor_cores == plan.tensor_cores
    assert dataclasses.replace(plan.problem, arch=None) == problem
    with pytest.raises(
        quire.InvalidArgumentError, match="^num_q_heads is 31; it must be a multiple of num_kv_heads, 8$"
    ):
        quire.supports(dataclasses.replace(problem, num_q_heads=31))
    with pytest.raises(quire.InvalidArgumentError, match="^device is 'tpu'; supported: cpu, cuda and cuda:<index>$"):
        quire.supports(dataclasses.replace(problem, device="tpu"))
    with pytest.raises(quire.InvalidArgumentError, match="^max_seq_len is 'long', which is no number of its kind$"):
        quire.supports(dataclasses.replace(problem, max_seq_len="long"))
    with pytest.raises(TypeError, match="AttentionPlan"):
        quire.run_unified_attention("plan", **Problem().read)


def test_devices():
    assert quire.device_count("cpu") == 1 and quire.device_arch("cpu") == quire.Arch()
    with pytest.raises(quire.Error):
        quire.device_arch("cuda:99")


def test_number_of_threads():
    before = quire.num_threads()
    try:
        quire.set_num_threads(3)
        assert quire.num_threads() == 3
        with pytest.raises(quire.InvalidArgumentError, match="num_threads"):
            quire.set_num_threads(5000)
    finally:
        quire.set_num_threads(0)
    assert quire.num_threads() == before
