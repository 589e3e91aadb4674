"""How the ops take their arguments, and the sentences of bad calls: the library's, unchanged."""

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest
import quire
from problems import Problem
from quire import _quire

OPS = (
    "reshape_and_cache",
    "unified_attention",
    "run_unified_attention",
    "problem_of",
    "merge_attn_states",
    "hadamard",
    "turboquant_store",
    "turboquant_decode_attention",
)


@pytest.fixture
def problem():
    made = Problem()
    quire.reshape_and_cache(**made.store)
    return made


def test_by_position_and_by_name(problem):
    read = dict(problem.read)
    quire.unified_attention(**read)
    expected = read.pop("out").copy()
    for count in range(8):
        out = np.empty_like(expected)
        names = list(problem.read)
        given = {**read, "out": out}
        positional = [given.pop(name) for name in names[:count]]
        shuffled = dict(sorted(given.items(), key=lambda item: hash(item[0])))
        assert quire.unified_attention(*positional, **shuffled) is None
        assert (out == expected).all()
    quire.unified_attention(
        **{"".join(list(name)): value for name, value in {**read, "out": out}.items()}
    )  # not interned


def test_defaults_said_aloud_change_nothing(problem):
    expected = problem.run().copy()
    stub = {
        node.name: node
        for node in ast.parse((Path(quire.__file__).parent / "_quire.pyi").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    arguments = stub["unified_attention"].args
    defaults = {a.arg: ast.literal_eval(d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)}
    quire.unified_attention(**{**defaults, **problem.read})
    assert (problem.read["out"] == expected).all()


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"out": ...}, "unified_attention() needs the argument 'out'"),
        ({"window": 3}, "unified_attention() has no argument 'window'"),
        ({"causal": "yes"}, "causal must be a bool"),
        ({"causal": np.zeros(2, bool)}, "causal must be a bool"),
        ({"sliding_window": 1.5}, "sliding_window must be a whole number"),
        ({"softcap": "no"}, "softcap must be a number"),
        ({"mode": 4}, "mode must be a str, the name of a kv_cache_dtype such as 'int4_per_token_head'"),
        (
            {"cache": np.zeros(3)},
            "cache must be a quire.KVCacheViews, made by allocate_cache, make_views or from arrays",
        ),
        (
            {"sinks": [0.0]},
            "sinks is of type list; it must be an array (PyTorch, NumPy, CuPy, JAX, or whatever has __dlpack__ "
            "or the buffer protocol)",
        ),
        (
            {"stream": "0"},
            "stream is of type str; it must be a cudaStream_t as a number, a stream of torch.cuda or CuPy, or None",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_python_gets_wrong_is_a_type_error(problem, change, sentence):
    arguments = {name: value for name, value in {**problem.read, **change}.items() if value is not ...}
    with pytest.raises(TypeError) as caught:
        quire.unified_attention(**arguments)
    assert str(caught.value) == sentence
    assert np.isnan(problem.read["out"]).all()


def test_too_many_by_position_and_twice(problem):
    values = list(problem.read.values())
    with pytest.raises(TypeError, match="takes 7 arguments by position, and got 8; the others are given by name"):
        quire.unified_attention(*values[:7], "int8_per_token_head")
    with pytest.raises(TypeError, match="got twice the argument 'query'"):
        quire.unified_attention(values[0], **problem.read)


def test_numbers_that_do_not_fit(problem):
    with pytest.raises(quire.InvalidArgumentError, match="^sliding_window does not fit in 32 bits$"):
        quire.unified_attention(**problem.read, sliding_window=2**40)
    quire.unified_attention(
        **{**problem.read, "softmax_scale": np.float32(0.5)}, sliding_window=np.int64(3), causal=np.True_
    )


# The library's sentences: the table of docs/api.md, as far as one call from Python can make the mistake.
@pytest.mark.parametrize(
    "op, change, error, sentence",
    [
        (
            "read",
            {"mode": "k=int5,v=int4_per_token_head"},
            quire.NotFoundError,
            "kv_cache_dtype 'k=int5,v=int4_per_token_head' is not k=<format>,v=<format>",
        ),
        (
            "store",
            {
                "cache": quire.KVCacheViews(np.zeros((5, 16, 2, 32), np.int8), np.zeros((5, 16, 2, 32), np.int8)),
                "mode": "int8_per_token_head",
            },
            quire.InvalidArgumentError,
            "k_scale_cache is not given; it must be [num_blocks, block_size, num_kv_heads]",
        ),
        (
            "store",
            {"k_scale": np.ones(1, np.float32)},
            quire.InvalidArgumentError,
            "k_scale is given, but format int8_per_token_head does not divide by a per-tensor scale when it "
            "stores; leave it out",
        ),
        (
            "store",
            {"slot_mapping": np.full(27, 99999)},
            quire.OutOfRangeError,
            "slot_mapping[0] is 99999; the cache has 4 blocks of 16, slots 0 to 63 (negative: skip)",
        ),
        (
            "read",
            {"softmax_scale": 0.0},
            quire.InvalidArgumentError,
            "softmax_scale is 0.000000; it is required, finite and not 0, usually 1 / sqrt(head_size)",
        ),
        (
            "read",
            {"sliding_window": 0},
            quire.InvalidArgumentError,
            "sliding_window is 0; supported: 1 and more, or -1 for none",
        ),
        ("read", {"query": None}, quire.InvalidArgumentError, "query is not given"),
        ("read", {"seq_lens": np.array([20, 99], np.int32)}, quire.OutOfRangeError, "seq_lens[1] is 99"),
        (
            "read",
            {"query": np.zeros((4, 3, 32), np.float32), "out": np.zeros((4, 3, 32), np.float32)},
            quire.InvalidArgumentError,
            "query has 3 heads and key_cache 2; query heads must be a multiple of KV heads",
        ),
        (
            "read",
            {"mode": "fp8_per_token_head"},
            quire.InvalidArgumentError,
            "mode is fp8_per_token_head, but cache is of mode int8_per_token_head",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_calls_get_the_librarys_sentence(problem, op, change, error, sentence):
    before = [np.asarray(array).tobytes() for array in (problem.cache.key_cache, problem.cache.k_scale_cache)]
    with pytest.raises(error) as caught:
        if op == "store":
            quire.reshape_and_cache(**{**problem.store, **change})
        else:
            quire.unified_attention(**{**problem.read, **change})
    assert str(caught.value).startswith(sentence)
    assert np.isnan(problem.read["out"]).all()
    assert [np.asarray(array).tobytes() for array in (problem.cache.key_cache, problem.cache.k_scale_cache)] == before


def test_errors_are_what_they_say():
    for error, base in (
        (quire.InvalidArgumentError, ValueError),
        (quire.OutOfRangeError, IndexError),
        (quire.NotFoundError, LookupError),
        (quire.UnsupportedError, NotImplementedError),
        (quire.AlreadyExistsError, ValueError),
        (quire.InternalError, RuntimeError),
    ):
        assert issubclass(error, quire.Error) and issubclass(error, base) and error.__module__ == "quire"


def test_a_cache_without_a_mode(problem):
    cache = problem.cache
    bare = quire.KVCacheViews(cache.key_cache, cache.value_cache, cache.k_scale_cache, cache.v_scale_cache)
    assert bare.mode is None and bare.with_mode("int8_per_token_head").mode == cache.mode == "int8_per_token_head"
    with pytest.raises(quire.InvalidArgumentError, match="^mode is not given, and cache was made without one"):
        quire.unified_attention(**{**problem.read, "cache": bare})
    quire.unified_attention(**{**problem.read, "cache": bare}, mode="int8_per_token_head")
    assert (problem.read["out"] == problem.run()).all()


def test_caches_of_ones_own_arrays(cpu_library):
    """Inline scales, K and V in one block of bytes: views of memory that another allocator laid out."""
    array = cpu_library.array
    problem = Problem(array=array)
    expected = cpu_library.numpy(problem.run()).copy()
    raw = array(np.zeros((4, 2, 16, 2, 36), np.int8))  # [block, K or V, slot, head, 32 codes and a float32]
    scales = quire.Tensor(raw[..., 32:], None)
    floats = raw.view(np.float32) if isinstance(raw, np.ndarray) else raw.view(cpu_library.torch.float32)
    assert scales.data_ptr == quire.Tensor(floats[..., 8:]).data_ptr
    cache = quire.KVCacheViews(
        raw[:, 0, :, :, :32],
        raw[:, 1, :, :, :32],
        floats[:, 0, :, :, 8],
        floats[:, 1, :, :, 8],
        mode="int8_per_token_head",
    )
    quire.reshape_and_cache(**{**problem.store, "cache": cache})
    quire.unified_attention(**{**problem.read, "cache": cache})
    assert (cpu_library.numpy(problem.read["out"]) == expected).all()


def test_read_only_caches_can_be_read(problem):
    expected = problem.run().copy()
    arrays = [
        np.asarray(getattr(problem.cache, name))
        for name in ("key_cache", "value_cache", "k_scale_cache", "v_scale_cache")
    ]
    for array in arrays:
        array.flags.writeable = False
    cache = quire.KVCacheViews(*arrays, mode=problem.cache.mode)
    assert cache.key_cache is arrays[0]
    quire.unified_attention(**{**problem.read, "cache": cache})
    assert (problem.read["out"] == expected).all()
    with pytest.raises(quire.InvalidArgumentError, match="^key_cache is read-only"):
        quire.reshape_and_cache(**{**problem.store, "cache": cache})


def test_streams_are_taken_in_every_form(problem):
    class OfTorch:
        cuda_stream = 0

    class OfCupy:
        ptr = 0

    class OfCuda:
        def __cuda_stream__(self):
            return (0, 0)

    for stream in (0, OfTorch(), OfCupy(), OfCuda(), None):
        quire.unified_attention(**problem.read, stream=stream)


def test_mixed_libraries_in_one_call(problem, torch):
    expected = problem.run().copy()
    read = dict(problem.read, query=torch.from_numpy(problem.read["query"]), out=torch.empty(expected.shape))
    quire.unified_attention(**read)
    assert (read["out"].numpy() == expected).all()


def test_merge(cpu_library, rng):
    parts = [rng.standard_normal((3, 2, 8), dtype=np.float32) for _ in range(2)]
    lses = [rng.standard_normal((3, 2), dtype=np.float32) for _ in range(2)]
    lses[1][0] = -np.inf
    out, lse = (cpu_library.array(np.empty_like(like)) for like in (parts[0], lses[0]))
    array = cpu_library.array
    quire.merge_attn_states(out, array(parts[0]), array(lses[0]), array(parts[1]), array(lses[1]), lse=lse)
    total = np.logaddexp(*(value.astype(float) for value in lses))
    expected = sum(np.exp(value - total)[..., None] * part for value, part in zip(lses, parts))
    np.testing.assert_allclose(cpu_library.numpy(lse), total, rtol=0, atol=1e-6)  # one rounding of fp32, near 1
    np.testing.assert_allclose(cpu_library.numpy(out), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [4, 96, 512])
def test_hadamard(cpu_library, rng, size):
    x = rng.standard_normal((5, size), dtype=np.float32)
    block = size & -size
    matrix = np.array([[1.0]])
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    out = cpu_library.array(np.empty_like(x))
    quire.hadamard(cpu_library.array(x), out)
    expected = (x.reshape(5, -1, block) @ matrix).reshape(5, size)
    np.testing.assert_allclose(cpu_library.numpy(out), expected, rtol=0, atol=block * 2e-6)  # log2(b) sums of b terms
    quire.hadamard(cpu_library.array(x), out, signs=True)
    quire.hadamard(out, out, signs=True, inverse=True)
    np.testing.assert_allclose(cpu_library.numpy(out) / block, x, rtol=0, atol=4e-6)


@pytest.mark.parametrize("name", OPS)
def test_signatures_are_those_of_the_stub(name):
    stub = {
        node.name: node
        for node in ast.parse((Path(quire.__file__).parent / "_quire.pyi").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }[name]
    signature = inspect.signature(getattr(_quire, name))
    assert list(signature.parameters) == [a.arg for a in [*stub.args.args, *stub.args.kwonlyargs]]
    for argument, default in zip(stub.args.kwonlyargs, stub.args.kw_defaults):
        parameter = signature.parameters[argument.arg]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.default == ast.literal_eval(default)
    assert inspect.getdoc(getattr(_quire, name)) == ast.get_docstring(stub)


def test_everything_public_is_documented_and_in_the_stub():
    stub = ast.parse((Path(quire.__file__).parent / "_quire.pyi").read_text())
    stubbed = {node.name: node for node in stub.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert set(stubbed) == {name for name in dir(_quire) if not name.startswith("_")}
    for name, node in stubbed.items():
        assert ast.get_docstring(node) and getattr(_quire, name).__doc__, name
        if isinstance(node, ast.ClassDef):
            members = {member.name for member in node.body if isinstance(member, ast.FunctionDef)}
            assert {m for m in vars(getattr(_quire, name)) if not m.startswith("_")} == {
                m for m in members if m[0] != "_"
            }
    for name in quire.__all__:
        assert inspect.getdoc(getattr(quire, name)), name
