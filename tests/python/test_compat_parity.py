"""quire.compat beside vLLM's own functions, where vLLM 0.33.0 can be imported (its *.py files do; see
scripts/vllm-tests)."""

import inspect
import math
from types import SimpleNamespace

import pytest
from compat import Batch, assert_near, torch

from quire.compat import _turboquant_config
from quire.compat import vllm as ours

try:
    import vllm.v1.kv_cache_interface as interface
    from vllm.model_executor.layers.quantization.turboquant.centroids import solve_lloyd_max
    from vllm.model_executor.layers.quantization.turboquant.config import TQ_PRESETS, TurboQuantConfig
    from vllm.model_executor.layers.quantization.turboquant.config import _get_full_attention_layer_indices as attending
    from vllm.v1.attention.ops import (
        int4_per_token_head,
        triton_reshape_and_cache_flash,
        triton_turboquant_decode,
        triton_turboquant_store,
        triton_unified_attention,
        triton_unified_attention_diffkv,
    )
except ImportError as error:
    pytest.skip(f"vLLM cannot be imported: {error}", allow_module_level=True)

FUNCTIONS = [
    (triton_unified_attention, "unified_attention"),
    (triton_unified_attention_diffkv, "unified_attention_diffkv"),
    (triton_reshape_and_cache_flash, "triton_reshape_and_cache_flash"),
    (triton_reshape_and_cache_flash, "triton_reshape_and_cache_flash_diffkv"),
    (triton_reshape_and_cache_flash, "triton_reshape_and_cache_flash_per_token_head_quant"),
    (triton_turboquant_store, "triton_turboquant_store"),
    (triton_turboquant_decode, "triton_turboquant_decode_attention"),
    (int4_per_token_head, "single_rht"),
    (int4_per_token_head, "fast_hadamard_transform"),
    (int4_per_token_head, "reshape_and_cache_int4"),
    (int4_per_token_head, "unified_attention_int4"),
]


@pytest.mark.parametrize("module, name", FUNCTIONS, ids=[name for _, name in FUNCTIONS])
def test_signatures_are_vllms(module, name):
    def facts(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert facts(getattr(ours, name)) == facts(getattr(module, name))


def test_the_enum_is_vllms():
    for enum in (ours.KVQuantMode, interface.KVQuantMode):
        assert enum.__members__.keys() == interface.KVQuantMode.__members__.keys()
    for name, theirs in interface.KVQuantMode.__members__.items():
        mine = ours.KVQuantMode[name]
        properties = [key for key, value in vars(interface.KVQuantMode).items() if isinstance(value, property)]
        assert int(mine) == int(theirs) and len(properties) >= 6
        for key in properties:
            assert getattr(mine, key) == getattr(theirs, key), (name, key)


@pytest.mark.parametrize(
    "dtype",
    [
        "auto",
        "bfloat16",
        "float16",
        "fp8",
        "fp8_e4m3",
        "fp8_e5m2",
        "fp8_inc",
        "fp8_ds_mla",
        "int8_per_token_head",
        "int4_per_token_head",
        "fp8_per_token_head",
        "nvfp4",
        "nvfp4_4over6",
        "nvfp4_ds_mla",
        "turboquant_k8v4",
        "turboquant_3bit_nc",
        "octave_k3v4",
        "octave_k3v3_compact",
        "ultraquant_4bit",
        "int4",
        "",
        "int2_per_token_head",
    ],
)
def test_modes_of_strings_are_vllms(dtype):
    assert ours.get_kv_quant_mode(dtype).name == interface.get_kv_quant_mode(dtype).name
    for name in ("is_quantized_kv_cache", "kv_cache_uses_per_token_head_scales"):
        assert getattr(ours, name)(dtype) == getattr(interface, name)(dtype)


@pytest.mark.parametrize("d", [16, 64, 80, 96, 112, 128, 192, 256, 512])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotations_are_vllms(d, inverse):
    x = torch.randn(7, 2, d)
    assert_near(ours.single_rht(x, inverse), int4_per_token_head.single_rht(x, inverse).double(), 1e-6)
    if d & (d - 1) == 0:
        assert_near(ours.fast_hadamard_transform(x), int4_per_token_head.fast_hadamard_transform(x).double(), 1e-6)


@pytest.mark.parametrize("preset", TQ_PRESETS)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_turboquant_with_vllms_tables_and_sizes(preset, d):
    config = TurboQuantConfig.from_cache_dtype(preset, head_dim=d)
    batch = Batch(lens=((1, 20), (1, 33)), head_size=d, dtype=torch.float16)
    h = torch.ones(1, 1)
    while h.shape[0] < d:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    rotation = h / math.sqrt(d)
    centroids, midpoints = solve_lloyd_max(d, config.centroid_bits)
    cache = torch.zeros(batch.num_blocks, 16, 2, config.slot_size_aligned, dtype=torch.uint8)
    shared = {
        "mse_bits": config.key_mse_bits,
        "key_packed_size": config.key_packed_size,
        "value_quant_bits": config.effective_value_quant_bits,
        "key_fp8": config.key_fp8,
    }
    ours.triton_turboquant_store(batch.key, batch.value, cache, batch.slots.int(), rotation, midpoints, **shared)
    out = ours.triton_turboquant_decode_attention(
        batch.query,
        cache,
        batch.block_table,
        batch.seq_lens,
        rotation,
        centroids,
        batch.scale,
        **shared,
        norm_correction=config.norm_correction,
    )
    assert_near(out, batch.expected(), 0.5)


@pytest.mark.parametrize("preset", TQ_PRESETS)
@pytest.mark.parametrize("d", [64, 80, 128, 256])
def test_turboquant_configurations_are_vllms(preset, d):
    theirs = TurboQuantConfig.from_cache_dtype(preset, head_dim=d)
    mine = ours.TurboQuantConfig.from_cache_dtype(preset, head_dim=d)
    properties = [key for key, value in vars(TurboQuantConfig).items() if isinstance(value, property)]
    assert ours.TQ_PRESETS == TQ_PRESETS and len(properties) >= 10
    for key in [*properties, *vars(theirs)]:
        assert getattr(mine, key) == getattr(theirs, key), key
    assert vars(ours.TurboQuantConfig()) == vars(TurboQuantConfig())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("d", [64, 96, 128])
def test_codebooks_are_vllms(bits, d):
    for mine, theirs in zip(ours.solve_lloyd_max(d, bits), solve_lloyd_max(d, bits), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "config",
    [
        {"is_hybrid": False, "num_hidden_layers": 32},
        {"is_hybrid": False, "num_hidden_layers": 3},
        {"is_hybrid": False, "num_hidden_layers": 0},
        {"is_hybrid": True, "layer_types": ["linear_attention", "full_attention"]},
        {"is_hybrid": True, "layers_block_type": ["mamba", "attention", "hybrid"]},
        {"is_hybrid": True, "attn_type_list": [0, 1]},
        {"is_hybrid": True},
    ],
)
def test_boundary_layers_are_vllms(config):
    model = SimpleNamespace(is_hybrid=config["is_hybrid"], hf_text_config=SimpleNamespace(**config))
    model.hf_config = model.hf_text_config
    assert _turboquant_config._get_full_attention_layer_indices(model) == attending(model)
    for n in (0, 2, 10):
        try:
            expected = TurboQuantConfig.get_boundary_skip_layers(model, n)
        except NotImplementedError:
            with pytest.raises(NotImplementedError):
                ours.TurboQuantConfig.get_boundary_skip_layers(model, n)
        else:
            assert ours.TurboQuantConfig.get_boundary_skip_layers(model, n) == expected
