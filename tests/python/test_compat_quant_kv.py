"""quire.compat.vllm_quant_kv: the registry, the backends and the functions around them, as the documents have them."""

import inspect
import subprocess
import sys
import warnings
from enum import IntEnum

import pytest
from compat import BOUND, DEVICES, Batch, assert_near, torch

import quire
from quire.compat import vllm, vllm_quant_kv
from quire.compat.vllm_quant_kv import KVQuantMode, QuantKVBackend, get_backend, has_backend, register

PER_TOKEN_HEAD = [
    KVQuantMode.INT8_PER_TOKEN_HEAD,
    KVQuantMode.FP8_PER_TOKEN_HEAD,
    KVQuantMode.INT4_PER_TOKEN_HEAD,
    KVQuantMode.INT2_PER_TOKEN_HEAD,
]


@pytest.fixture
def registry(monkeypatch):
    """Copies of both tables for one test, with none of quire's backends imported."""
    monkeypatch.setattr(vllm_quant_kv, "_REGISTRY", {})
    monkeypatch.setattr(vllm_quant_kv, "_MODULES", dict(vllm_quant_kv._MODULES))
    names = set(vllm_quant_kv._MODULES.values())
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield vllm_quant_kv
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


class Mine(IntEnum):
    MINE = 100


class MyBackend(QuantKVBackend):
    mode = Mine.MINE

    def reshape_and_cache(
        self, key, value, key_cache, value_cache, slot_mapping, *, k_scale_cache=None, v_scale_cache=None
    ):
        self.called = (key, k_scale_cache)


# ---- KVQuantMode ----------------------------------------------------------------------------------------------------


def test_the_enum():
    assert [(mode.name, int(mode)) for mode in KVQuantMode] == [
        ("NONE", 0),
        ("FP8_PER_TENSOR", 1),
        ("INT8_PER_TOKEN_HEAD", 2),
        ("FP8_PER_TOKEN_HEAD", 3),
        ("INT4_PER_TOKEN_HEAD", 4),
        ("INT2_PER_TOKEN_HEAD", 5),
        ("NVFP4", 6),
    ]
    assert [mode for mode in KVQuantMode if mode.is_per_token_head] == PER_TOKEN_HEAD
    assert [mode for mode in KVQuantMode if mode.is_nvfp4] == [KVQuantMode.NVFP4]
    assert {mode.name: mode.packing_factor for mode in KVQuantMode if mode.packing_factor != 1} == {
        "INT4_PER_TOKEN_HEAD": 2,
        "INT2_PER_TOKEN_HEAD": 4,
    }
    assert KVQuantMode.INT2_PER_TOKEN_HEAD.packed_head_size(128) == 32
    with pytest.raises(AssertionError, match="127.*INT4_PER_TOKEN_HEAD"):
        KVQuantMode.INT4_PER_TOKEN_HEAD.packed_head_size(127)


def test_functions_of_strings():
    modes = {
        "fp8": "FP8_PER_TENSOR",
        "fp8_e4m3": "FP8_PER_TENSOR",
        "fp8_e5m2": "FP8_PER_TENSOR",
        "nvfp4": "NVFP4",
        "fp8_inc": "FP8_PER_TENSOR",
        "auto": "NONE",
        "bfloat16": "NONE",
        "turboquant_k8v4": "NONE",
        "unknown": "NONE",
    }
    modes |= {f"{name}_per_token_head": f"{name.upper()}_PER_TOKEN_HEAD" for name in ("int2", "int4", "int8", "fp8")}
    for name, mode in modes.items():
        assert vllm_quant_kv.get_kv_quant_mode(name) is KVQuantMode[mode]
        assert vllm_quant_kv.is_quantized_kv_cache(name) == (mode != "NONE")
        assert vllm_quant_kv.kv_cache_uses_per_token_head_scales(name) == name.endswith("per_token_head")


# ---- the base class -------------------------------------------------------------------------------------------------


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError):
        QuantKVBackend()

    class Nothing(QuantKVBackend):
        mode = KVQuantMode.INT8_PER_TOKEN_HEAD

    with pytest.raises(TypeError, match="reshape_and_cache"):
        Nothing()
    assert QuantKVBackend.packing_factor == 1 and QuantKVBackend.needs_scale_caches is False
    assert not hasattr(QuantKVBackend, "mode")


def test_arguments_of_the_base_class():
    def kinds(function):
        parameters = inspect.signature(function).parameters.values()
        return (
            [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD],
            {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY},
        )

    required = inspect.Parameter.empty
    assert kinds(QuantKVBackend.reshape_and_cache) == (
        ["self", "key", "value", "key_cache", "value_cache", "slot_mapping"],
        {"k_scale_cache": None, "v_scale_cache": None},
    )
    names = (
        "cu_seqlens_q max_seqlen_q seqused_k max_seqlen_k softmax_scale window_size block_table softcap sinks "
        "alibi_slopes use_alibi_sqrt qq_bias output_scale mm_prefix_range"
    ).split()
    optional = (
        "k_scale_cache v_scale_cache seq_threshold_3D num_par_softmax_segments softmax_segm_output softmax_segm_max "
        "softmax_segm_expsum"
    ).split()
    positional, keywords = kinds(QuantKVBackend.unified_attention)
    assert positional == ["self", "q", "k_cache", "v_cache", "out"]
    assert list(keywords.items()) == [(name, required) for name in names] + [(name, None) for name in optional]
    assert kinds(QuantKVBackend.allocate_scale_caches)[0] == [
        "self",
        "num_blocks",
        "block_size",
        "num_kv_heads",
        "device",
    ]


def test_defaults_of_the_base_class():
    class Packed(MyBackend):
        packing_factor = 2
        needs_scale_caches = True

    backend = Packed()
    assert backend.packed_head_size(128) == 64
    with pytest.raises(AssertionError, match="127.*MINE.*2"):
        backend.packed_head_size(127)
    assert MyBackend().allocate_scale_caches(2, 16, 4, torch.device("cpu")) == (None, None)
    for scales in backend.allocate_scale_caches(2, 16, 4, torch.device("cpu")):
        assert scales.shape == (2, 16, 4) and scales.dtype == torch.float32 and not scales.any()
    names = list(inspect.signature(QuantKVBackend.unified_attention).parameters)[1:19]
    with pytest.raises(NotImplementedError, match="Packed"):
        backend.unified_attention(*[None] * 4, **dict.fromkeys(names[4:]))


# ---- the registry ---------------------------------------------------------------------------------------------------


def test_nothing_is_imported_before_it_is_asked_for():
    program = """
import sys
from quire.compat import vllm_quant_kv as quant_kv
own = "quire.compat.vllm_quant_kv.int8_fp8_per_token_head"
assert quant_kv.has_backend(quant_kv.KVQuantMode.INT8_PER_TOKEN_HEAD) and own not in sys.modules
backend = quant_kv.get_backend(quant_kv.KVQuantMode.INT8_PER_TOKEN_HEAD)
assert own in sys.modules and backend is quant_kv.get_backend(quant_kv.KVQuantMode.INT8_PER_TOKEN_HEAD)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("mode", PER_TOKEN_HEAD)
def test_own_backends(registry, mode):
    assert has_backend(mode) and not registry._REGISTRY
    backend = get_backend(mode)
    assert backend.mode is mode and backend.needs_scale_caches and backend.packing_factor == mode.packing_factor
    assert get_backend(mode) is backend and get_backend(int(mode)) is backend
    module = __import__(registry._MODULES[mode], fromlist=["x"])  # the documents' paths can be imported
    assert type(backend).__module__ == module.__name__


def test_modes_without_a_backend(registry):
    with pytest.raises(ValueError, match="NONE"):
        get_backend(KVQuantMode.NONE)
    for mode in (KVQuantMode.FP8_PER_TENSOR, KVQuantMode.NVFP4, Mine.MINE):
        with pytest.raises(ValueError, match=f"{mode.name}.*_MODULES"):
            get_backend(mode)
        assert not has_backend(mode)
    assert not has_backend(KVQuantMode.NONE)


def test_a_module_of_the_users(registry, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "forgets_to_register.py").write_text("")
    (tmp_path / "my_quant_kv.py").write_text(
        "from quire.compat import vllm_quant_kv\nfrom test_compat_quant_kv import MyBackend\n"
        "vllm_quant_kv.register(MyBackend())\n"
    )
    registry._MODULES[Mine.MINE] = "forgets_to_register"
    assert has_backend(Mine.MINE)
    with pytest.raises(RuntimeError, match="forgets_to_register.*MINE"):
        get_backend(Mine.MINE)
    registry._MODULES[Mine.MINE] = "no_such_module_at_all"
    with pytest.raises(ModuleNotFoundError):
        get_backend(Mine.MINE)
    registry._MODULES[Mine.MINE] = "my_quant_kv"
    assert type(get_backend(Mine.MINE)).__name__ == "MyBackend"


def test_registering_twice(registry):
    first = MyBackend()
    assert register(first) is None
    assert has_backend(Mine.MINE) and get_backend(Mine.MINE) is first
    register(MyBackend())  # a class of that name again: the first stays
    assert get_backend(Mine.MINE) is first

    class Other(MyBackend):
        pass

    with pytest.raises(RuntimeError, match="MINE.*MyBackend.*Other"):
        register(Other())
    assert get_backend(Mine.MINE) is first


def test_a_users_backend_of_one_of_quires_modes(registry):
    class Eight(MyBackend):
        mode = KVQuantMode.INT8_PER_TOKEN_HEAD

    mine = Eight()
    register(mine)
    get_backend(KVQuantMode.FP8_PER_TOKEN_HEAD)  # whose module has a backend of int8, too
    assert get_backend(KVQuantMode.INT8_PER_TOKEN_HEAD) is mine
    key = torch.zeros(1, 1, 64)
    vllm_quant_kv.triton_reshape_and_cache_flash_per_token_head_quant(
        key, key, key, key, "scales", None, None, KVQuantMode.INT8_PER_TOKEN_HEAD
    )
    assert mine.called[0] is key and mine.called[1] == "scales"


def test_modes_of_other_enums(registry):
    assert get_backend(vllm.KVQuantMode.INT4_PER_TOKEN_HEAD).mode is KVQuantMode.INT4_PER_TOKEN_HEAD
    assert get_backend(quire.KVQuantMode.INT2_PER_TOKEN_HEAD).mode is KVQuantMode.INT2_PER_TOKEN_HEAD
    with pytest.raises(ValueError):  # 5 there, and INT2_PER_TOKEN_HEAD is 5 here
        get_backend(vllm.KVQuantMode.NVFP4)

    class Clash(IntEnum):
        CLASH = 5

    with pytest.raises(ValueError, match="CLASH.*INT2_PER_TOKEN_HEAD"):
        get_backend(Clash.CLASH)


# ---- storing and reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", PER_TOKEN_HEAD)
def test_backends_store_and_read(device, mode):
    batch = Batch(device)
    backend = get_backend(mode)
    dtype = {"INT8": torch.int8, "FP8_": torch.float8_e4m3fn}.get(mode.name[:4], torch.uint8)
    key_cache, value_cache, _, _ = batch.caches(dtype, backend.packed_head_size(64))
    scales = backend.allocate_scale_caches(batch.num_blocks, 16, 2, torch.device(device))
    with pytest.raises(AssertionError, match=f"{mode.name}.*k_scale_cache"):
        backend.reshape_and_cache(batch.key, batch.value, key_cache, value_cache, batch.slots)
    backend.reshape_and_cache(
        batch.key, batch.value, key_cache, value_cache, batch.slots, k_scale_cache=scales[0], v_scale_cache=scales[1]
    )
    options = {"k_scale_cache": scales[0], "v_scale_cache": scales[1]}
    backend.unified_attention(
        batch.query,
        key_cache,
        value_cache,
        batch.out,
        cu_seqlens_q=batch.cu_seqlens_q,
        max_seqlen_q=7,
        seqused_k=batch.seq_lens,
        max_seqlen_k=40,
        softmax_scale=batch.scale,
        window_size=(-1, -1),
        block_table=batch.block_table,
        softcap=0.0,
        sinks=None,
        alibi_slopes=None,
        use_alibi_sqrt=False,
        qq_bias=None,
        output_scale=None,
        mm_prefix_range=None,
        seq_threshold_3D=0,
        **options,
    )
    assert_near(batch.out, batch.expected(), {8: 0.06, 4: 0.25, 2: 0.75}[8 // mode.packing_factor])
    first = batch.out.clone()
    vllm_quant_kv.unified_attention(*batch.args(key_cache, value_cache), kv_quant_mode=mode, **options)
    assert torch.equal(batch.out, first)
    vllm_quant_kv.unified_attention(*batch.args(key_cache, value_cache, causal=False), kv_quant_mode=mode, **options)
    assert not torch.equal(batch.out, first)
    vllm_quant_kv.unified_attention(*batch.args(*batch.plain_caches()))
    assert_near(batch.out, batch.expected(), BOUND[device])


def test_attention_asks_a_registered_backend(registry):
    class Reads(MyBackend):
        mode = KVQuantMode.INT2_PER_TOKEN_HEAD

        def unified_attention(self, q, k_cache, v_cache, out, **options):
            self.options = options

    register(Reads())
    batch = Batch()
    caches = batch.caches(torch.uint8, 16)
    vllm_quant_kv.unified_attention(
        *batch.args(*caches[:2]),
        kv_quant_mode=KVQuantMode.INT2_PER_TOKEN_HEAD,
        k_scale_cache=caches[2],
        v_scale_cache=caches[3],
    )
    accepted = set(inspect.signature(QuantKVBackend.unified_attention).parameters)
    options = get_backend(KVQuantMode.INT2_PER_TOKEN_HEAD).options
    assert set(options) <= accepted and options["sinks"] is None and options["k_scale_cache"] is caches[2]


@pytest.mark.parametrize("dtype, mode", [(torch.float8_e4m3fn, "fp8"), (torch.int8, "int8"), (torch.uint8, "int8")])
def test_a_call_without_a_mode(dtype, mode):
    batch = Batch()
    store = vllm_quant_kv.triton_reshape_and_cache_flash_per_token_head_quant
    caches, same = batch.caches(dtype), batch.caches(dtype)
    same[0].copy_(caches[0])
    same[1].copy_(caches[1])
    with pytest.warns(DeprecationWarning, match="kv_quant_mode") as caught:
        store(batch.key, batch.value, *caches, batch.slots)
    assert caught[0].filename == __file__  # stacklevel 2: the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store(batch.key, batch.value, *same, batch.slots, vllm_quant_kv.get_kv_quant_mode(f"{mode}_per_token_head"))
    for left, right in zip(caches, same):
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("row", [32, 16])
def test_packed_rows_without_a_mode(row):
    batch = Batch()
    caches = batch.caches(torch.uint8, row)
    before = caches[0].clone()
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match=f"{row} elements.*64.*kv_quant_mode"):
        vllm_quant_kv.triton_reshape_and_cache_flash_per_token_head_quant(batch.key, batch.value, *caches, batch.slots)
    assert torch.equal(caches[0], before)


def test_names_of_the_documents():
    store = inspect.signature(vllm_quant_kv.triton_reshape_and_cache_flash_per_token_head_quant)
    assert list(store.parameters) == [
        "key",
        "value",
        "key_cache",
        "value_cache",
        "k_scale_cache",
        "v_scale_cache",
        "slot_mapping",
        "kv_quant_mode",
    ]
    assert store.parameters["kv_quant_mode"].default is None
    assert vllm_quant_kv._single_rht is vllm_quant_kv.single_rht is vllm.single_rht
    assert vllm_quant_kv.fast_hadamard_transform is vllm.fast_hadamard_transform
    assert list(inspect.signature(vllm_quant_kv.triton_turboquant_store).parameters) == [
        "key",
        "value",
        "kv_cache",
        "slot_mapping",
        "PiT",
        "midpoints",
        "mse_bits",
        "key_packed_size",
        "value_quant_bits",
        "key_fp8",
    ]
    assert all(hasattr(vllm_quant_kv, name) for name in vllm_quant_kv.__all__)
