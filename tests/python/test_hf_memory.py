"""The order of calls to CUDA's driver, without one: what is reserved, mapped and given back."""

import contextlib
import gc

import pytest

hf = pytest.importorskip("hf_models", reason="PyTorch and transformers are not installed")
from hf_models import torch  # noqa: E402
from quire.hf import memory  # noqa: E402

MIB = 1 << 20


@pytest.fixture
def driver(monkeypatch):
    """A driver that writes down what it is asked and has memory for `driver.pieces` allocations."""
    calls = []

    def call(name, *arguments):
        if name == "cuMemGetAllocationGranularity":
            arguments[0].value = 2 * MIB
        elif name == "cuMemAddressReserve":
            arguments[0].value = 1 << 40
        elif name == "cuMemCreate":
            if call.pieces == 0:
                raise memory._CudaError("cuMemCreate answered CUDA error 2")
            call.pieces -= 1
            arguments[0].value = 7 + sum(what[0] == "cuMemCreate" for what in calls)
        calls.append((name, *(getattr(a, "value", a) for a in arguments if not isinstance(a, memory.ctypes.Structure))))

    call.pieces, call.calls = 100, calls
    monkeypatch.setattr(memory, "_call", call)
    monkeypatch.setattr(
        memory._CudaRange, "as_tensor", lambda self: torch.empty(self.capacity, dtype=torch.uint8, device="meta")
    )
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(("empty_cache",)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append(("synchronize",)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: torch.Stream())
    monkeypatch.setattr(torch, "Stream", type("Stream", (), {"synchronize": lambda self: None}))
    return call


def test_pieces_are_mapped_one_after_another(driver):
    growing = memory.GrowingMemory(torch.device("cuda:0"), 1 << 30)
    growing.commit(1000)
    tensor = growing.tensor
    growing.commit(1 << 20)
    growing.commit(100 * MIB)
    assert growing.tensor is tensor and tensor.numel() == 1 << 30
    base = 1 << 40
    assert [what[1:4] for what in driver.calls if what[0] == "cuMemMap"] == [
        (base, 2 * MIB, 0),
        (base + 2 * MIB, 98 * MIB, 0),
    ]
    access = [what[1:3] for what in driver.calls if what[0] == "cuMemSetAccess"]
    assert access == [(base, 2 * MIB), (base + 2 * MIB, 98 * MIB)]
    gc.collect()  # what other tests left to be freed
    driver.calls.clear()
    growing._range.__dict__.pop("__cuda_array_interface__")
    del growing, tensor
    gc.collect()
    assert [what[0] for what in driver.calls] == [
        "synchronize",
        *["cuMemUnmap", "cuMemRelease"] * 2,
        "cuMemAddressFree",
    ]


def test_out_of_memory_frees_what_pytorch_keeps_and_says_so(driver):
    growing = memory.GrowingMemory(torch.device("cuda:0"), 1 << 30)
    growing.commit(1000)
    driver.pieces = 0
    with pytest.raises(torch.cuda.OutOfMemoryError, match="cuda:0 has no 6291456 bytes more for a layer of QuireCache"):
        growing.commit(8 * MIB)
    assert driver.calls[-1] == ("empty_cache",)
    driver.pieces = 1
    growing.commit(8 * MIB)
    with pytest.raises(MemoryError, match="needs 2147483648 bytes"):
        growing.commit(1 << 31)
