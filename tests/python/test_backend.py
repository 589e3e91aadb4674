"""Modes written in Python, found through the registry."""

import gc
import threading

import numpy as np
import pytest
import quire


@pytest.fixture
def name(request):
    """A mode's name that no other test has: modes stay for the life of the process."""
    name.count = getattr(name, "count", 0) + 1
    made = f"py_{name.count}_{request.node.originalname}"[:64]
    quire.register_mode(made)
    return made


class Doubles(quire.QuantKVBackend):
    """Keeps rows as float32, doubled; reads them row by row."""

    def row_bytes(self, head_size, is_value):
        return 4 * head_size

    def reshape_and_cache(self, key, value, cache, slot_mapping, **options):
        assert not options
        for slot, k, v in zip(np.asarray(slot_mapping), np.asarray(key), np.asarray(value)):
            if slot >= 0:
                block, offset = divmod(int(slot), np.asarray(cache.key_cache).shape[1])
                np.asarray(cache.key_cache).view(np.float32)[block, offset] = 2 * k
                np.asarray(cache.value_cache).view(np.float32)[block, offset] = 2 * v

    def decode_row(self, data, scale, head_size, is_value):
        assert scale is None
        return np.frombuffer(data, np.float32) / np.float32(2)


def store_and_read(mode, rng, out_like=np.empty_like, **options):
    spec = quire.KVCacheSpec(mode, head_size=32, num_kv_heads=2, block_size=16)
    cache = quire.allocate_cache(spec, num_blocks=3)
    key, value = (rng.standard_normal((20, 2, 32), dtype=np.float32) for _ in range(2))
    quire.reshape_and_cache(key, value, cache, np.arange(20), **options)
    query = rng.standard_normal((1, 4, 32), dtype=np.float32)
    out = out_like(query)
    quire.unified_attention(
        query, out, cache, np.array([0, 1], np.int32), np.array([20], np.int32), np.array([[0, 1]], np.int32), 0.17
    )
    return key, value, query, out


def test_new_bytes_are_read_row_by_row(name, rng):
    quire.register_backend(name, Doubles)
    assert quire.has_backend(name)
    backend = quire.get_backend(name)
    assert type(backend) is Doubles and backend is quire.get_backend(name) and backend.mode == name
    state = rng.bit_generator.state
    *_, out = store_and_read(name, rng)
    rng.bit_generator.state = state
    *_, expected = store_and_read("float32", rng)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)  # the orders of two sums of 20 keys, in fp32


def test_both_ops_receive_the_callers_objects(name, rng):
    calls = []

    class Records(quire.QuantKVBackend):
        def row_bytes(self, head_size, is_value):
            return head_size

        def reshape_and_cache(self, key, value, cache, slot_mapping, **options):
            calls.append((key, value, cache, slot_mapping, options))

        def unified_attention(self, query, out, cache, cu_seqlens_q, seq_lens, block_table, softmax_scale, **options):
            out[...] = 7
            calls.append((query, out, cache, softmax_scale, options))

    quire.register_backend(name, Records)
    key, value, query, out = store_and_read(name, rng, k_scale=None)
    assert calls[0][0] is key and calls[0][1] is value and calls[0][4] == {}
    assert calls[1][0] is query and calls[1][1] is out and calls[1][3] == 0.17
    assert (out == 7).all()


def test_read_format_writes_and_reads_the_table_bytes(name, rng):
    class Negates(quire.QuantKVBackend):
        def needs_scale_caches(self):
            return True

        def read_format(self):
            return "int8_per_token_head"

        def reshape_and_cache(self, key, value, cache, slot_mapping, **options):
            super().reshape_and_cache(-key, -value, cache, slot_mapping, **options)

    quire.register_backend(name, Negates)
    spec = quire.KVCacheSpec(name, head_size=32, num_kv_heads=2)
    assert quire.make_layout(spec).bytes_per_token_head == 2 * (32 + 4)
    other = quire.allocate_cache(quire.KVCacheSpec("int8_per_token_head", head_size=32, num_kv_heads=2), 3)
    own = quire.KVCacheViews(other.key_cache, other.value_cache, other.k_scale_cache, other.v_scale_cache, mode=name)
    key = rng.standard_normal((5, 2, 32), dtype=np.float32)
    quire.reshape_and_cache(key, key, own, np.arange(5))
    quire.reshape_and_cache(-key, -key, other, np.arange(16, 21))
    codes = np.asarray(other.key_cache)
    assert codes.any() and (codes[0, :5] == codes[1, :5]).all()


def test_exceptions_come_back_with_their_cause(name, rng):
    class Fails(quire.QuantKVBackend):
        def row_bytes(self, head_size, is_value):
            return head_size

        def reshape_and_cache(self, *args, **options):
            raise KeyError("lost")

        def unified_attention(self, *args, **options):
            raise quire.UnsupportedError("no reading today")

    quire.register_backend(name, Fails)
    with pytest.raises(
        quire.InternalError, match=f"reshape_and_cache of mode {name} raised KeyError: 'lost'"
    ) as caught:
        store_and_read(name, rng)
    assert isinstance(caught.value.__cause__, KeyError)
    spec = quire.KVCacheSpec(name, head_size=32, num_kv_heads=2)
    cache = quire.allocate_cache(spec, 1)
    one = np.ones((1, 2, 32), np.float32)
    with pytest.raises(quire.UnsupportedError, match="^no reading today$") as caught:
        quire.unified_attention(
            one, one, cache, np.array([0, 1], np.int32), np.array([1], np.int32), np.array([[0]], np.int32), 1.0
        )
    assert caught.value.__cause__ is None


def test_a_row_that_fails_is_named_with_its_cause(name, rng):
    class Fails(Doubles):
        def decode_row(self, data, scale, head_size, is_value):
            raise ZeroDivisionError("row")

    quire.register_backend(name, Fails)
    with pytest.raises(quire.Error, match=name) as caught:
        store_and_read(name, rng)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_registry(name):
    with pytest.raises(quire.NotFoundError, match=f"mode {name} has no backend"):
        quire.get_backend(name)
    assert not quire.has_backend(name)
    quire.register_backend(name, Doubles)
    quire.register_backend(name, Doubles)
    with pytest.raises(quire.AlreadyExistsError, match="another class"):
        quire.register_backend(name, type("Other", (Doubles,), {}))
    with pytest.raises(quire.AlreadyExistsError, match="quire's own"):
        quire.register_backend("int8_per_token_head", Doubles)
    with pytest.raises(quire.InvalidArgumentError, match="NONE"):
        quire.register_backend("auto", Doubles)
    with pytest.raises(quire.AlreadyExistsError):
        quire.register_mode(name)
    with pytest.raises(TypeError, match="QuantKVBackend"):
        quire.register_backend(name, dict)
    assert any(mode.name == name and mode.registered for mode in quire.modes())


def test_constructor_runs_once_from_many_threads(name):
    made = []

    class Counts(Doubles):
        def __init__(self):
            made.append(self)

    quire.register_backend(name, Counts)
    found = []
    threads = [threading.Thread(target=lambda: found.append(quire.get_backend(name))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(made) == 1 and len(found) == 8 and all(backend is made[0] for backend in found)


def test_a_constructor_that_fails_is_told(name):
    class Fails(Doubles):
        def __init__(self):
            raise OSError("no disk")

    quire.register_backend(name, Fails)
    with pytest.raises(quire.InternalError, match="no disk") as caught:
        quire.get_backend(name)
    assert isinstance(caught.value.__cause__, OSError)


def test_backends_of_the_table():
    backend = quire.get_backend("int4_per_token_head")
    assert backend is quire.get_backend(quire.KVQuantMode.INT4_PER_TOKEN_HEAD)
    assert isinstance(backend, quire.QuantKVBackend)
    assert backend.needs_scale_caches() and backend.packing_factor() == 2
    assert backend.packed_head_size(128) == 64 and backend.row_bytes(128, True) == 64
    k_scales, v_scales = backend.allocate_scale_caches(3, 16, 2)
    assert k_scales.shape == v_scales.shape == (3, 16, 2) and not np.asarray(k_scales).any()
    del k_scales
    gc.collect()
    assert not np.asarray(v_scales).any()
    with pytest.raises(quire.InvalidArgumentError, match="NONE"):
        quire.get_backend("auto")
    with pytest.raises(quire.InvalidArgumentError, match="multiples of 2"):
        backend.row_bytes(127, False)
    assert not quire.has_backend("fp8") and not quire.has_backend(quire.KVQuantMode.NONE)


def test_backends_of_the_table_serve_both_ops(rng):
    backend = quire.get_backend("int8_per_token_head")
    cache = quire.allocate_cache(quire.KVCacheSpec("int8_per_token_head", head_size=32, num_kv_heads=2), 1)
    key = rng.standard_normal((1, 2, 32), dtype=np.float32)
    backend.reshape_and_cache(key, key, cache, np.zeros(1, np.int32))
    out = np.empty_like(key)
    backend.unified_attention(
        key,
        out,
        cache,
        np.array([0, 1], np.int32),
        np.array([1], np.int32),
        np.array([[0]], np.int32),
        softmax_scale=1.0,
    )
    # One key has all the weight, so the output is the stored row: within half a step, 1 / 127 of the largest element.
    assert (abs(out - key) <= abs(key).max(axis=2, keepdims=True) / 127 * 0.501).all()
