#!/usr/bin/env python3
"""What a call from Python costs the host, beside other ways of handing arrays to C++, in one run. Needs quire.

    bench/python_call.py [--calls N] [--device cpu|cuda] [--json FILE]

Reading 12 arrays, in microseconds a call:

    quire                  quire's own reader, through a function that does nothing else
    tvm-ffi                TensorView of apache-tvm-ffi, where it is installed: its function that does nothing
    nanobind               nb::ndarray<> casters, where nanobind and a compiler are there: a module compiled on the spot
    data_ptr, shape ...    four attributes of each array, by Python itself

A whole call of unified_attention with 12 arrays besides the cache, over one sequence of one token: from Python, and the
same call from C++; the difference is what Python costs. The arrays are PyTorch's where it is installed, and NumPy's.

Each figure is the least of 300 short rounds that take turns, so that a busy machine disturbs all alike.
"""

import argparse
import contextlib
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import sysconfig
import tempfile
import timeit

import numpy as np
import quire
from quire import _quire

ROUNDS = 300
NANOBIND = """
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
namespace nb = nanobind;
using A = nb::ndarray<>;
NB_MODULE(quire_bench_nanobind, m) {
  m.def("nop", [](A, A, A, A, A, A, A, A, A, A, A, A) {});
}
"""


def arguments(array):
    """A call of unified_attention with every array that a call can have beside a bias: 12 and the cache."""
    ones = np.ones(1, np.float32)
    spec = quire.KVCacheSpec("int8_per_token_head", head_size=32, num_kv_heads=1)
    return dict(
        query=array(np.ones((1, 1, 32), np.float32)),
        out=array(np.ones((1, 1, 32), np.float32)),
        cache=quire.allocate_cache(spec, 1, device=DEVICE),
        cu_seqlens_q=array(np.array([0, 1], np.int32)),
        seq_lens=array(np.ones(1, np.int32)),
        block_table=array(np.zeros((1, 1), np.int32)),
        softmax_scale=1.0,
        sinks=array(ones),
        alibi_slopes=array(ones),
        k_descale=array(ones),
        v_descale=array(ones),
        lse=array(np.ones((1, 1), np.float32)),
        causal_per_seq=array(np.ones(1, np.uint8)),
        qq_bias=array(np.ones((1, 1), np.float32)),
        max_query_len=1,
        max_seq_len=1,
    )


def nanobind_nop():
    """A nanobind function of 12 ndarrays, compiled on the spot; a sentence where it cannot be."""
    try:
        import nanobind
    except ImportError:
        return "nanobind is not installed"
    root = pathlib.Path(nanobind.include_dir()).parent
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "nop.cc"
        source.write_text(NANOBIND)
        module = pathlib.Path(folder) / f"quire_bench_nanobind{sysconfig.get_config_var('EXT_SUFFIX')}"
        command = [
            "c++",
            "-std=c++17",
            "-O3",
            "-DNDEBUG",
            "-fno-strict-aliasing",
            "-fvisibility=hidden",
            "-fPIC",
            "-shared",
            f"-I{sysconfig.get_path('include')}",
            f"-I{root}/include",
            f"-I{root}/ext/robin_map/include",
            f"{root}/src/nb_combined.cpp",
            str(source),
            "-o",
            str(module),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            return "there is no c++"
        if done.returncode != 0:
            return "it did not compile: " + done.stderr.strip().splitlines()[0]
        sys.path.insert(0, folder)
        try:
            import quire_bench_nanobind
        finally:
            sys.path.remove(folder)
        return quire_bench_nanobind.nop


def tvm_ffi_nop():
    try:
        import tvm_ffi
    except ImportError:
        return "apache-tvm-ffi is not installed"
    return tvm_ffi.get_global_func("testing.nop")


def by_python(*arrays):
    for array in arrays:
        if hasattr(array, "data_ptr"):
            array.data_ptr(), array.shape, array.stride(), array.dtype
        else:
            array.ctypes.data, array.shape, array.strides, array.dtype


def least_us(functions, calls):
    """Microseconds a call of each function, the least over rounds in which they take turns."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(ROUNDS):
        for name, function in functions.items():
            best[name] = min(best[name], function(calls) * 1e6)
    return best


def timed(function, *arrays, **options):
    """calls -> seconds of one: the call itself stands in the loop, without another function around it."""
    names = {
        "function": function,
        **{f"p{i}": a for i, a in enumerate(arrays)},
        **{f"k_{n}": v for n, v in options.items()},
    }
    call = ", ".join([*(f"p{i}" for i in range(len(arrays))), *(f"{n}=k_{n}" for n in options)])
    timer = timeit.Timer(f"function({call})", globals=names)
    return lambda calls: timer.timeit(calls) / calls


def measure(name, array, calls):
    call = arguments(array)
    arrays = [value for value in call.values() if hasattr(value, "shape")]
    assert len(arrays) == 12
    readers = {
        "quire": _quire._read_arrays,
        "tvm-ffi": tvm_ffi_nop(),
        "nanobind": nanobind_nop(),
        "data_ptr, shape, stride, dtype": by_python,
    }
    reading = least_us({key: timed(reader, *arrays) for key, reader in readers.items() if callable(reader)}, calls)
    whole = least_us(
        {
            "python": timed(quire.unified_attention, **call),
            "c++": lambda calls: _quire._time_unified_attention(**call, repeats=calls),
        },
        calls,
    )
    print(f"{name}, reading 12 arrays")
    for key, reader in readers.items():
        print(f"  {key:<32}" + (f"{reading[key]:7.2f} us" if key in reading else f"  {reader}"))
    between = whole["python"] - whole["c++"]
    print(f"{name}, unified_attention with 12 arrays")
    print(f"  {whole['python']:.2f} us from Python, {whole['c++']:.2f} us from C++, {between:.2f} us between them")
    return {"reading_12_arrays_us": reading, "unified_attention_us": whole}


def main():
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200, help="calls of a round")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:0 and so on, where PyTorch's arrays are")
    parser.add_argument("--json", help="write the figures to this file too")
    options = parser.parse_args()
    DEVICE = options.device
    quire.set_num_threads(1)
    versions = {"Python": ".".join(map(str, sys.version_info[:3])), "NumPy": np.__version__}
    libraries = {}
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed")
    else:
        torch.set_num_threads(1)
        versions["PyTorch"] = torch.__version__
        array = lambda values: torch.from_numpy(values.copy()).to(DEVICE)
        libraries["PyTorch"] = measure(f"PyTorch {torch.__version__}", array, options.calls)
    if DEVICE == "cpu":
        libraries["NumPy"] = measure(f"NumPy {np.__version__}", lambda values: values, options.calls)
    for name in ("apache-tvm-ffi", "nanobind"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if options.json:
        record = {"device": DEVICE, "versions": versions, "libraries": libraries}
        pathlib.Path(options.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
