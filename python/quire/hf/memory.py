"""Memory that grows where it is: a reserved range of addresses, of which only what is used is backed by memory.

On the CPU the operating system does it: pages of an anonymous mapping exist from the first write to them. On CUDA it is
the driver's virtual memory management (cuMemAddressReserve, cuMemCreate, cuMemMap), which PyTorch's expandable segments
use as well. Where neither is possible, the memory is an ordinary tensor that is copied when it grows.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import torch

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it since 3.13; the value is Linux's


class GrowingMemory:
    """Bytes on one device. ``tensor`` is [capacity] uint8, of which the first ``committed`` may be used."""

    def __init__(self, device: torch.device, capacity: int):
        self.device, self.committed = device, 0
        self._range = None
        if device.type == "cpu":
            self.tensor = _reserve_host(capacity)
        elif device.type == "cuda":
            self._range = _CudaRange.reserve(device, capacity)
            self.tensor = None
        else:
            self.tensor = None

    def commit(self, num_bytes: int) -> None:
        """Makes the first ``num_bytes`` usable. ``tensor`` is another one afterwards only where memory was copied."""
        if num_bytes <= self.committed:
            return
        if self._range is not None:
            self._range.commit(num_bytes)
            if self.tensor is None:  # without any memory, PyTorch could not tell the range's device
                self.tensor = self._range.as_tensor()
        if self.tensor is None or self.tensor.numel() < num_bytes:
            self._copy_to_larger(num_bytes)
        self.committed = num_bytes

    def _copy_to_larger(self, num_bytes: int) -> None:
        larger = torch.empty(max(num_bytes, 2 * self.committed), dtype=torch.uint8, device=self.device)
        if self.committed:
            larger[: self.committed] = self.tensor[: self.committed]
        self.tensor, self._range = larger, None


def capacity_of(device: torch.device, num_layers: int) -> int:
    """The addresses to reserve for one of ``num_layers`` layers: twice its share of all memory of the device."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2 * total // max(num_layers, 1)


def _reserve_host(capacity: int) -> torch.Tensor | None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    while capacity >= 1 << 20:  # a limit on the address space of a process may leave less
        try:
            return torch.frombuffer(mmap.mmap(-1, capacity, flags=flags), dtype=torch.uint8)
        except OSError:
            capacity //= 2
    return None


# ---- CUDA's virtual memory management, as cuda.h declares it ---------------------------------------------------------


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]  # type 1: a device


class _AllocationFlags(ctypes.Structure):
    _fields_ = [
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _AllocationProp(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", _AllocationFlags),
    ]  # type 1: pinned, which device memory is


class _AccessDesc(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]  # flags 3: read and write


_Pointer, _Handle, _Size = ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t
_SIGNATURES = {
    "cuMemGetAllocationGranularity": (ctypes.POINTER(_Size), ctypes.POINTER(_AllocationProp), ctypes.c_int),
    "cuMemAddressReserve": (ctypes.POINTER(_Pointer), _Size, _Size, _Pointer, ctypes.c_uint64),
    "cuMemAddressFree": (_Pointer, _Size),
    "cuMemCreate": (ctypes.POINTER(_Handle), _Size, ctypes.POINTER(_AllocationProp), ctypes.c_uint64),
    "cuMemRelease": (_Handle,),
    "cuMemMap": (_Pointer, _Size, _Size, _Handle, ctypes.c_uint64),
    "cuMemUnmap": (_Pointer, _Size),
    "cuMemSetAccess": (_Pointer, _Size, ctypes.POINTER(_AccessDesc), _Size),
}
_driver = None


class _CudaError(RuntimeError):
    pass


def _call(name: str, *arguments) -> None:
    global _driver
    if _driver is None:
        library = ctypes.CDLL("libcuda.so.1")
        for function, types in _SIGNATURES.items():
            getattr(library, function).argtypes = types
            getattr(library, function).restype = ctypes.c_int
        _driver = library
    code = getattr(_driver, name)(*arguments)
    if code:
        raise _CudaError(f"{name} answered CUDA error {code}")


class _CudaRange:
    """A reserved range of device addresses. PyTorch reads it as an array, which keeps it alive."""

    @classmethod
    def reserve(cls, device: torch.device, capacity: int) -> _CudaRange | None:
        """None where the driver does not do it."""
        torch.cuda.init()
        try:
            return cls(device, capacity)
        except (OSError, AttributeError, _CudaError):
            return None

    def __init__(self, device: torch.device, capacity: int):
        self.device = device
        location = _Location(1, device.index)
        self._prop = _AllocationProp(type=1, location=location)
        self._access = _AccessDesc(location, 3)
        granularity, base = _Size(), _Pointer()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes the context
            _call("cuMemGetAllocationGranularity", granularity, self._prop, 0)
            self._granularity = granularity.value
            self.capacity = -(-capacity // self._granularity) * self._granularity
            _call("cuMemAddressReserve", base, self.capacity, 0, 0, 0)
        self._base = base.value
        self._pieces: list[tuple[int, int, int]] = []  # address, bytes, handle
        self._end = 0
        weakref.finalize(self, _release, device, self._base, self.capacity, self._pieces).atexit = False
        self.__cuda_array_interface__ = {
            "shape": (self.capacity,),
            "typestr": "|u1",
            "data": (self._base, False),
            "version": 3,
        }

    def as_tensor(self) -> torch.Tensor | None:
        """The range as a tensor [capacity] uint8; None where PyTorch does not take it as it is."""
        try:
            tensor = torch.as_tensor(self, device=self.device)
        except RuntimeError:
            return None
        return tensor if tensor.data_ptr() == self._base else None

    def commit(self, num_bytes: int) -> None:
        """Backs the first ``num_bytes`` with memory: an eighth more at least, so that pieces stay few."""
        if num_bytes <= self._end:
            return
        if num_bytes > self.capacity:
            raise MemoryError(
                f"a layer of QuireCache needs {num_bytes} bytes, and {self.device} has less than half as many for it"
            )
        wanted = min(max(num_bytes, self._end + self._end // 8), self.capacity)
        size = -(-(wanted - self._end) // self._granularity) * self._granularity
        handle = _Handle()
        with torch.cuda.device(self.device):
            try:
                _call("cuMemCreate", handle, size, self._prop, 0)
            except _CudaError:
                torch.cuda.empty_cache()  # what PyTorch keeps for itself
                size = -(-(num_bytes - self._end) // self._granularity) * self._granularity
                try:
                    _call("cuMemCreate", handle, size, self._prop, 0)
                except _CudaError as error:
                    raise torch.cuda.OutOfMemoryError(
                        f"{self.device} has no {size} bytes more for a layer of QuireCache ({error})"
                    ) from None
            address = self._base + self._end
            _call("cuMemMap", address, size, 0, handle, 0)
            self._pieces.append((address, size, handle.value))
            _call("cuMemSetAccess", address, size, self._access, 1)
        self._end += size


def _release(device: torch.device, base: int, capacity: int, pieces: list[tuple[int, int, int]]) -> None:
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # kernels may still be reading
        for address, size, handle in pieces:
            _call("cuMemUnmap", address, size)
            _call("cuMemRelease", handle)
        _call("cuMemAddressFree", base, capacity)
