"""Arrays of each library, made of the same NumPy values, so that one test covers them all."""

import numpy as np
import pytest

import quire


def torch_or_skip():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


class Numpy:
    """How a test makes and reads arrays: an array of the library from NumPy's, and back."""

    name = "numpy"

    def array(self, values):
        return np.array(values)

    def numpy(self, array):
        return array


class Torch:
    name = "torch"

    def __init__(self, device="cpu"):
        self.torch = torch_or_skip()
        self.device = device

    def array(self, values):
        return self.torch.from_numpy(np.array(values)).to(self.device)

    def numpy(self, array):
        return array.cpu().numpy()


LIBRARIES = {"numpy": Numpy, "torch": Torch}


@pytest.fixture(params=LIBRARIES)
def library(request):
    return LIBRARIES[request.param]()


@pytest.fixture
def rng():
    return np.random.default_rng(7)
