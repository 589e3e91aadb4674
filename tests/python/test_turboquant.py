"""TurboQuant by vLLM's entry points, on vLLM's own bytes and outputs; the gates are those of tests/golden/README.md."""

import golden
import numpy as np
import pytest
from test_golden import as_float, worst_row_error

import quire

CASES = golden.cases("turboquant")


def config_of(params):
    return dict(
        key_bits=params["key_quant_bits"],
        value_bits=params["value_quant_bits"],
        norm_correction=params["norm_correction"],
    )


@pytest.fixture(params=CASES, ids=[name for _, name in CASES])
def case(request):
    return golden.Case(*request.param)


def test_stores_as_vllm_does(library, case):
    config = config_of(case.params)
    theirs, _ = case.tensors["kv_cache"]
    slots = library.array(np.full_like(theirs, 0xFF))
    tables = {"midpoints": case.array(library, "midpoints")} if config["key_bits"] < 8 else {}
    quire.turboquant_store(
        case.array(library, "key"),
        case.array(library, "value"),
        slots,
        case.array(library, "slot_mapping"),
        **config,
        **tables,
    )
    mine = library.numpy(slots)
    used = np.zeros(theirs.shape[:2], bool)
    mapping = case.tensors["slot_mapping"][0]
    used.reshape(-1)[mapping[mapping >= 0]] = True
    key_bytes = case.params["key_packed_size"]
    assert (mine[~used] == 0xFF).all()
    assert (mine[used][..., :key_bytes] == theirs[used][..., :key_bytes]).all()
    # 99.8 % of the values' codes are equal, some three to a byte.
    assert (mine[used] == theirs[used]).mean() >= 0.99


def test_decodes_as_vllm_does(library, case):
    config = config_of(case.params)
    theirs, out_dtype = case.tensors["out"]
    out = library.array(np.full(theirs.shape, np.nan, np.float32))
    lse = library.array(np.full(theirs.shape[:2], np.nan, np.float32))
    tables = {"centroids": case.array(library, "centroids")} if config["key_bits"] < 8 else {}
    arguments = (
        case.array(library, "query"),
        out,
        case.array(library, "kv_cache"),
        case.array(library, "block_table"),
        case.array(library, "seq_lens"),
    )
    quire.turboquant_decode_attention(*arguments, case.params["softmax_scale"], lse=lse, **config, **tables)
    mine = library.numpy(out).copy()
    assert worst_row_error(mine, as_float(theirs, out_dtype)) <= 3.5e-3
    assert np.isfinite(library.numpy(lse)).all()

    # The same bytes as views, for the op with everything that it can do.
    views = quire.turboquant_views(arguments[2], case.params["head_size"], **config)
    assert views.mode == quire.turboquant_mode(**config) == case.params["preset"]
    assert views.key_cache.data_ptr == quire.Tensor(arguments[2]).data_ptr
    batch = theirs.shape[0]
    quire.unified_attention(
        arguments[0],
        out,
        views,
        library.array(np.arange(batch + 1, dtype=np.int32)),
        arguments[4],
        arguments[3],
        case.params["softmax_scale"],
        max_query_len=1,
        max_seq_len=int(case.tensors["seq_lens"][0].max()),
    )
    assert worst_row_error(library.numpy(out), mine) <= 2**-8


def test_configurations():
    assert quire.turboquant_mode(8, 4) == "turboquant_k8v4" and quire.turboquant_mode() == "turboquant_4bit_nc"
    assert quire.mode_info(quire.turboquant_mode(4, 3)).composed
    with pytest.raises(quire.Error, match="norm_correction"):
        quire.turboquant_mode(3, 3, norm_correction=False)
    with pytest.raises(quire.UnsupportedError, match="^key_bits is 5; supported: 3, 4 and 8"):
        quire.turboquant_mode(5, 4)
    assert quire.turboquant_uses_e4b15(8, 6) and not quire.turboquant_uses_e4b15(8, 9)
    assert quire.boundary_skip_layers(8) == [0, 1, 6, 7] and quire.boundary_skip_layers(3, n=5) == [0, 2]


def test_refusals():
    slots = np.zeros((2, 16, 2, 102), np.uint8)
    slots.flags.writeable = False
    with pytest.raises(quire.InvalidArgumentError, match="^kv_cache is read-only"):
        quire.turboquant_views(slots, 128, 3, 3)
    key = np.ones((1, 2, 128), np.float32)
    with pytest.raises(quire.InvalidArgumentError, match="^kv_cache is read-only"):
        quire.turboquant_store(key, key, slots, np.zeros(1, np.int32), key_bits=3, value_bits=3)
    with pytest.raises(quire.InvalidArgumentError, match="kv_cache"):
        quire.turboquant_store(key, key, np.zeros((2, 16, 2, 50), np.uint8), np.zeros(1, np.int32))
