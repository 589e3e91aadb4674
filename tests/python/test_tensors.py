"""Arrays in and out: what quire sees of them, that nothing is copied, and what it refuses in which sentence."""

import ctypes
import gc
import hashlib
import sys
import weakref

import numpy as np
import pytest
import quire
from conftest import CARRIERS, bfloat16_bits, bfloat16_values

DTYPES = ["float32", "float16", "int8", "uint8", "int32", "int64", *CARRIERS]


def address(array):
    return array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_seen_in_place(cpu_library, dtype):
    values = np.arange(24, dtype=CARRIERS.get(dtype, dtype)).reshape(2, 3, 4)
    array = cpu_library.array(values, dtype)
    view = quire.Tensor(array)
    assert (view.dtype, view.shape, view.strides, view.ndim) == (dtype, (2, 3, 4), (12, 4, 1), 3)
    assert (view.device, view.read_only) == ("cpu", False)
    if not isinstance(array, quire.Tensor):
        assert view.data_ptr == address(array)


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[:, ::2],
        lambda a: a[1:, :, 1:3],
        lambda a: a.swapaxes(0, 2),
        lambda a: a[0],
        lambda a: a[0, 0, 0:1],
        lambda a: a[:0],
    ],
    ids=["step", "slice", "transposed", "row", "one", "empty"],
)
def test_views_keep_their_strides(cpu_library, view):
    array = view(cpu_library.array(np.arange(24, dtype=np.float32).reshape(2, 3, 4)))
    seen = quire.Tensor(array)
    assert seen.shape == tuple(array.shape)
    if 0 not in array.shape:
        strides = array.stride() if hasattr(array, "stride") else [s // array.itemsize for s in array.strides]
        assert seen.strides == tuple(strides)
        assert seen.data_ptr == address(array)


def test_flags_are_bytes(cpu_library):
    assert quire.Tensor(cpu_library.array(np.array([True, False]))).dtype == "uint8"


def test_objects_of_other_kinds(rng):
    for source, dtype in (
        (b"abc", "uint8"),
        (bytearray(3), "uint8"),
        (memoryview(np.ones(3, np.float16)), "float16"),
        ((ctypes.c_float * 3)(), "float32"),
    ):
        assert quire.Tensor(source).dtype == dtype and quire.Tensor(source).shape == (3,)
    assert quire.Tensor(b"abc").read_only and not quire.Tensor(bytearray(3)).read_only


class OnlyDlpack:
    """An array of a library that has no other way out; `legacy`: one from before DLPack 1.0."""

    def __init__(self, array, legacy=False):
        self.array, self.legacy, self.streams = array, legacy, []

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options):
        if self.legacy and "max_version" in options:
            raise TypeError("unexpected keyword argument 'max_version'")
        self.streams.append(options.get("stream"))
        return self.array.__dlpack__(**options)


@pytest.mark.parametrize("legacy", [False, True])
def test_dlpack_capsules(legacy):
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    source = OnlyDlpack(array, legacy)
    seen = quire.Tensor(source)
    assert (seen.shape, seen.dtype, seen.data_ptr) == ((2, 3), "int32", array.ctypes.data)
    assert source.streams == [None]  # the CPU has no stream
    out = np.empty(4, np.float32)
    quire.hadamard(OnlyDlpack(np.ones(4, np.float32), legacy), OnlyDlpack(out, legacy))
    assert out.tolist() == [4, 0, 0, 0]


def test_torch_tensors_without_their_c_functions(torch):
    """As of a PyTorch from before them."""
    for dtype in DTYPES:
        tensor = torch.zeros(4, 6).to(getattr(torch, dtype))[:, ::2]
        seen = quire.Tensor(OnlyDlpack(tensor, legacy=True))
        assert (seen.dtype, seen.shape, seen.strides) == (dtype, (4, 3), (6, 2))
        assert seen.data_ptr == tensor.data_ptr()


def test_a_capsule_tells_what_is_read_only():
    array = np.zeros(4, np.float32)
    array.flags.writeable = False
    assert quire.Tensor(OnlyDlpack(array)).read_only
    with pytest.raises(quire.InvalidArgumentError, match="^out is read-only, and the call writes to it"):
        quire.hadamard(np.ones(4, np.float32), OnlyDlpack(array))


def test_a_gpus_array_is_told_the_stream():
    class OnGpu(OnlyDlpack):  # as far as it says
        def __dlpack_device__(self):
            return (2, 0)

        def __dlpack__(self, stream, **options):
            self.streams.append(stream)
            return self.array.__dlpack__(**options)

    for stream, told in ((None, 1), (0, 1), (4096, 4096)):
        x = OnGpu(np.ones(4, np.float32))
        quire.hadamard(x, np.empty(4, np.float32), stream=stream)
        assert x.streams == [told]  # 1 is DLPack's number of CUDA's default stream


def test_a_capsule_is_dropped_after_the_call():
    array = np.zeros(4, np.float32)
    count = sys.getrefcount(array)
    source = OnlyDlpack(array)
    for _ in range(3):
        quire.hadamard(np.ones(4, np.float32), source)
    del source
    gc.collect()
    assert sys.getrefcount(array) == count


def test_nothing_is_held_after_a_call(cpu_library):
    x, out = (cpu_library.array(np.ones((2, 4), np.float32)) for _ in range(2))
    counts = [sys.getrefcount(array) for array in (x, out)]
    quire.hadamard(x, out)
    with pytest.raises(quire.Error):
        quire.hadamard(x, out[:, :3])
    with pytest.raises(TypeError):
        quire.hadamard(x, "out")
    assert [sys.getrefcount(array) for array in (x, out)] == counts
    if isinstance(x, np.ndarray):
        x.resize((8, 1), refcheck=False)  # refused while a buffer is exported


def test_a_view_keeps_its_memory(cpu_library):
    if isinstance(cpu_library.array(np.ones(3)), np.ndarray):
        array = cpu_library.array(np.ones(3, np.float32))
        died = weakref.ref(array)
        view = quire.Tensor(array)
        del array
        gc.collect()
        assert died() is not None and np.asarray(view).tolist() == [1, 1, 1]
        del view
        gc.collect()
        assert died() is None


def hash_of_bytes(view):
    """What wants plain bytes: PyBUF_SIMPLE."""
    return hashlib.sha256(view).hexdigest()


def test_out_through_the_buffer_protocol_and_dlpack(cpu_library):
    array = cpu_library.array(np.arange(6, dtype=np.float32).reshape(2, 3))
    view = quire.Tensor(array.T)
    assert np.asarray(view).ctypes.data == np.from_dlpack(view).ctypes.data == address(array)
    assert (np.asarray(view) == np.arange(6).reshape(2, 3).T).all()
    assert view.__dlpack_device__() == (1, 0)
    with pytest.raises(BufferError, match="copy"):
        view.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="another device"):
        view.__dlpack__(dl_device=(2, 0))
    memory = memoryview(view)
    assert memory.shape == (3, 2) and not memory.c_contiguous
    with pytest.raises(BufferError, match="not contiguous"):
        hash_of_bytes(view)


def test_read_only_memory_stays_so_on_its_way_out():
    view = quire.Tensor(b"abcd")
    assert not np.asarray(view).flags.writeable
    assert not np.from_dlpack(view).flags.writeable
    with pytest.raises(BufferError, match="max_version"):
        view.__dlpack__()


def test_out_to_torch_in_every_dtype(torch):
    for dtype in DTYPES:
        view = quire.Tensor(np.arange(8, dtype=CARRIERS.get(dtype, dtype)), dtype)
        tensor = torch.from_dlpack(view)
        assert tensor.dtype == getattr(torch, dtype) and tensor.data_ptr() == view.data_ptr


def test_bits():
    bits = bfloat16_bits([1.0, -2.5])
    view = quire.Tensor(bits, "bfloat16")
    with pytest.raises(BufferError, match="no format for this dtype"):
        memoryview(view)
    seen = np.asarray(view.bits)
    assert seen.ctypes.data == bits.ctypes.data and bfloat16_values(seen).tolist() == [1.0, -2.5]
    assert np.asarray(quire.Tensor(np.zeros(2, np.int8), "float8_e5m2").bits).dtype == np.uint8


def test_dtypes_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    for name in CARRIERS:
        array = np.zeros((4, 6), getattr(ml_dtypes, name))[:, ::2]
        seen = quire.Tensor(array)
        assert (seen.dtype, seen.shape, seen.strides) == (name, (4, 3), (6, 2))
        assert seen.data_ptr == array.ctypes.data and not seen.read_only
    x = np.ones(4, ml_dtypes.bfloat16)
    quire.hadamard(x, x)
    assert x.tolist() == [4, 0, 0, 0]
    x.flags.writeable = False
    with pytest.raises(quire.InvalidArgumentError, match="read-only"):
        quire.hadamard(x, x)


def test_jax_arrays_are_read_and_not_written(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # tests/python/test_cuda.py has those of a GPU
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    for dtype in ("float32", "bfloat16"):
        x = jax.numpy.ones((2, 4), dtype)
        assert quire.Tensor(x).dtype == dtype and quire.Tensor(x).data_ptr == x.unsafe_buffer_pointer()
        out = np.empty((2, 4), np.float32)
        quire.hadamard(x, out)
        assert out[0].tolist() == [4, 0, 0, 0]
        if quire.Tensor(x).read_only:  # JAX before 0.12 does not say that its arrays are
            with pytest.raises(quire.InvalidArgumentError, match="^out is read-only"):
                quire.hadamard(out, x)


# ---- refusals --------------------------------------------------------------------------------------------------------


def hadamard_of(x):
    quire.hadamard(x, np.empty(4, np.float32))


@pytest.mark.parametrize(
    "array, sentence",
    [
        (np.ones(4), "x is float64; quire knows float32, float16"),
        (np.ones(4, ">f4"), "x is >f4; quire knows"),
        (np.ones(4, "c8"), "x is complex64; quire knows"),
        (np.ones((1,) * 7, np.float32), "x has 7 dimensions; supported: 0 to 6"),
        (np.ones(4, [("a", "f4"), ("b", "i1")])["a"], "x has a stride of 5 bytes, which is no multiple"),
    ],
    ids=["float64", "swapped", "complex", "dimensions", "odd stride"],
)
def test_arrays_that_quire_cannot_read(array, sentence):
    with pytest.raises(quire.InvalidArgumentError) as caught:
        hadamard_of(array)
    assert str(caught.value).startswith(sentence)
    if array.ndim < 7 and array.dtype.isnative and array.strides == (array.itemsize,):
        with pytest.raises(quire.InvalidArgumentError, match="^x is of DLPack type code"):
            hadamard_of(OnlyDlpack(array))


@pytest.mark.parametrize("thing", [[1.0, 2.0], 1.0, "x", object()], ids=["list", "float", "str", "object"])
def test_what_is_no_array(thing):
    with pytest.raises(TypeError, match=f"^x is of type {type(thing).__name__}; it must be an array"):
        hadamard_of(thing)


def test_read_only_outputs_are_refused():
    out = np.zeros(4, np.float32)
    out.flags.writeable = False
    for array in (out, quire.Tensor(out), memoryview(out)):
        with pytest.raises(
            quire.InvalidArgumentError, match="^out is read-only, and the call writes to it; give a writable"
        ):
            quire.hadamard(np.ones(4, np.float32), array)
    assert not out.any()
    hadamard_of(out)  # to read


def test_what_requires_grad_is_refused(torch):
    x = torch.ones(4, requires_grad=True)
    with pytest.raises(
        quire.InvalidArgumentError, match=r"^x requires grad, and quire has no backward pass; give it as x.detach\(\)$"
    ):
        hadamard_of(x)
    with pytest.raises(quire.InvalidArgumentError, match="^x requires grad"):
        hadamard_of(torch.nn.Parameter(torch.ones(4)))
    hadamard_of(x.detach())
    with torch.no_grad():
        hadamard_of(x * 2)


def test_torch_tensors_of_other_devices_are_refused(torch):
    with pytest.raises(Exception, match="meta|DLPack|data"):
        hadamard_of(torch.ones(4, device="meta"))


def test_subclasses_of_torch_tensors_are_tensors(torch):
    class Sub(torch.Tensor):
        pass

    out = torch.empty(4)
    quire.hadamard(torch.ones(4).as_subclass(Sub), out)
    assert out.tolist() == [4, 0, 0, 0]


def test_exceptions_of_the_array_pass_through():
    class Broken:
        def __dlpack_device__(self):
            raise RuntimeError("lost")

        def __dlpack__(self, **_):
            raise AssertionError

    with pytest.raises(RuntimeError, match="lost"):
        hadamard_of(Broken())
    with pytest.raises(quire.InvalidArgumentError, match="on a device of DLPack type 8"):

        class Elsewhere(OnlyDlpack):
            def __dlpack__(self, **options):
                capsule = self.array.__dlpack__(**options)
                get = ctypes.pythonapi.PyCapsule_GetPointer
                get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
                # major, minor, manager, deleter, flags, data: then the device's type.
                device = ctypes.c_int32.from_address(get(capsule, b"dltensor_versioned") + 8 + 8 + 8 + 8 + 8)
                device.value = 8
                return capsule

        hadamard_of(Elsewhere(np.ones(4, np.float32)))


def test_dtypes_of_a_tensor_are_checked():
    with pytest.raises(quire.InvalidArgumentError, match="^dtype is 'int4'; it must be the name of a dtype"):
        quire.Tensor(np.ones(4, np.float32), "int4")
    with pytest.raises(quire.InvalidArgumentError, match="^array is"):
        quire.Tensor(np.ones(4, np.float32), "bfloat16")
