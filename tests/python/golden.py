"""Golden files: caches and outputs of vLLM's kernels (tests/golden/README.md), read with NumPy alone."""

import functools
import gzip
import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent.parent / "golden"
DTYPES = {
    "F32": (np.float32, "float32"),
    "F16": (np.float16, "float16"),
    "BF16": (np.uint16, "bfloat16"),
    "F8_E4M3": (np.uint8, "float8_e4m3fn"),
    "F8_E5M2": (np.uint8, "float8_e5m2"),
    "I8": (np.int8, "int8"),
    "U8": (np.uint8, "uint8"),
    "I32": (np.int32, "int32"),
    "I64": (np.int64, "int64"),
}


@functools.lru_cache(maxsize=2)
def _file(name):
    data = gzip.decompress((FOLDER / f"{name}.safetensors.gz").read_bytes())
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    return header.pop("__metadata__"), header, memoryview(data)[8 + header_bytes :]


def cases(*names):
    """(file, case) of every case of these files that has parameters."""
    return [(name, case) for name in names for case in sorted(_file(name)[0])]


class Case:
    """One case: `params`, and its tensors by name as (NumPy array, quire's name of the dtype)."""

    def __init__(self, file, name):
        params, header, data = _file(file)
        self.params = json.loads(params[name])
        self.tensors = {}
        for key, entry in header.items():
            if key.rpartition("/")[0] == name:
                dtype, quire_name = DTYPES[entry["dtype"]]
                begin, end = entry["data_offsets"]
                values = np.frombuffer(data[begin:end], dtype).reshape(entry["shape"])
                self.tensors[key.rpartition("/")[2]] = (values, quire_name)

    def array(self, library, name):
        """A new array of a tensor in a library; None where the case has none."""
        return library.array(*self.tensors[name]) if name in self.tensors else None
