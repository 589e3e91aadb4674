"""Arrays of each library, made of the same NumPy values, so that one test covers them all.

NumPy is always there. Tests with PyTorch are skipped, and counted, where it is not installed; those with CuPy and with
PyTorch on cuda run where both a GPU and a build of quire for it are there.
"""

import importlib.util

import numpy as np
import pytest
import quire

# The dtypes that NumPy has no name for travel as integers of as many bytes.
CARRIERS = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8}


def bfloat16_bits(values):
    """float32 rounded to bfloat16, to nearest even, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bfloat16_values(bits):
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


class Numpy:
    """How a test makes and reads arrays of one library."""

    device = "cpu"

    def array(self, values, dtype=None):
        """An array of these values; `dtype` says what integers of CARRIERS stand for."""
        values = np.array(values)
        return quire.Tensor(values, dtype) if dtype in CARRIERS else values

    def numpy(self, array):
        """NumPy's array of it, with CARRIERS' integers where NumPy has no such dtype."""
        is_carried = isinstance(array, quire.Tensor) and array.dtype in CARRIERS
        return np.asarray(array.bits if is_carried else array)


class Torch:
    def __init__(self, device="cpu"):
        self.torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        self.device = device

    def array(self, values, dtype=None):
        tensor = self.torch.from_numpy(np.array(values)).to(self.device)
        return tensor.view(getattr(self.torch, dtype)) if dtype in CARRIERS else tensor

    def numpy(self, array):
        array = self.torch.from_dlpack(array) if isinstance(array, quire.Tensor) else array
        name = str(array.dtype).removeprefix("torch.")
        if name in CARRIERS:
            array = array.view(getattr(self.torch, np.dtype(CARRIERS[name]).name))
        return array.cpu().numpy()


class Cupy:
    device = "cuda:0"

    def __init__(self):
        self.cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

    def array(self, values, dtype=None):
        array = self.cupy.asarray(np.array(values))
        return quire.Tensor(array, dtype) if dtype in CARRIERS else array

    def numpy(self, array):
        if isinstance(array, quire.Tensor):
            carrier = np.dtype(CARRIERS.get(array.dtype, array.dtype))
            known = {1: "uint8", 2: "float16"}.get(carrier.itemsize, array.dtype)
            array = self.cupy.from_dlpack(quire.Tensor(array, known)).view(carrier)
        return self.cupy.asnumpy(array)


def cuda_is_there():
    try:
        return quire.device_count("cuda") > 0
    except quire.Error:  # built without CUDA, or no driver here
        return False


LIBRARIES = {"numpy": Numpy, "torch": Torch}
if cuda_is_there():
    LIBRARIES["torch_cuda"] = lambda: Torch("cuda:0")
    if importlib.util.find_spec("cupy"):
        LIBRARIES["cupy"] = Cupy


@pytest.fixture(params=LIBRARIES)
def library(request):
    return LIBRARIES[request.param]()


@pytest.fixture(params=[name for name in LIBRARIES if name in ("numpy", "torch")])
def cpu_library(request):
    return LIBRARIES[request.param]()


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.fixture
def rng():
    return np.random.default_rng(7)
