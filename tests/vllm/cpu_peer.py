#!/usr/bin/env python3
"""Builds vLLM's own CPU attention, which no wheel for a GPU has, so that its engine can run without quire's plugin.

    cpu_peer.py SDIST LIBRARY      SDIST: vllm-0.33.0.tar.gz, LIBRARY: the shared library that is written

Of the sdist's csrc/cpu the attention alone is compiled, for head size 128, with the flags of vLLM's own build for this
machine; tests/vllm/cpu_platform.py loads it where VLLM_CPU_KERNELS names it. Takes a minute or two.
"""
import importlib.util
import os
import subprocess
import sys
import tarfile

import torch
from torch.utils import cpp_extension

HEAD_SIZES = [128]
BINDING = """
#include <torch/all.h>
#include <torch/library.h>

torch::Tensor get_scheduler_metadata(int64_t, int64_t, int64_t, int64_t, const torch::Tensor&, at::ScalarType,
                                     const torch::Tensor&, bool, int64_t, const std::string&, bool,
                                     const std::optional<torch::Tensor>&, const std::string&);
void cpu_attn_reshape_and_cache(const torch::Tensor&, const torch::Tensor&, torch::Tensor&, torch::Tensor&,
                                const torch::Tensor&, const std::string&, double, double, const std::string&);
void cpu_attention_with_kv_cache(const torch::Tensor&, const torch::Tensor&, const torch::Tensor&, torch::Tensor&,
                                 const torch::Tensor&, const torch::Tensor&, double, bool,
                                 const std::optional<torch::Tensor>&, int64_t, const torch::Tensor&, double,
                                 const torch::Tensor&, const std::optional<torch::Tensor>&,
                                 const std::optional<torch::Tensor>&, double, double, const std::string&);

TORCH_LIBRARY_FRAGMENT(_C, ops) {
  ops.def("get_scheduler_metadata", &get_scheduler_metadata);
  ops.def(
      "cpu_attn_reshape_and_cache(Tensor key, Tensor value, Tensor(a2!) key_cache, Tensor(a3!) value_cache, "
      "Tensor slot_mapping, str isa, float k_scale, float v_scale, str kv_cache_dtype) -> ()",
      &cpu_attn_reshape_and_cache);
  ops.def(
      "cpu_attention_with_kv_cache(Tensor query, Tensor key_cache, Tensor value_cache, Tensor(a3!) output, "
      "Tensor query_start_loc, Tensor seq_lens, float scale, bool causal, Tensor? alibi_slopes, "
      "int sliding_window, Tensor block_table, float softcap, Tensor scheduler_metadata, Tensor? s_aux, "
      "Tensor? dynamic_causal, float k_scale, float v_scale, str kv_cache_dtype) -> ()",
      &cpu_attention_with_kv_cache);
}

bool runtime_has_amx_fp8() { return false; }
"""


def sources(sdist, folder):
    """Unpacks csrc/cpu, writes what is generated, and gives the files to compile."""
    with tarfile.open(sdist) as archive:
        members = [member for member in archive if "/csrc/cpu/" in member.name]
        archive.extractall(folder, members, filter="data")
        root = os.path.join(folder, members[0].name.partition("/")[0], "csrc")
    generator = os.path.join(root, "cpu", "generate_cpu_attn_dispatch.py")
    spec = importlib.util.spec_from_file_location("generator", generator)
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    generate.HEAD_DIMS_32, generate.HEAD_DIMS_16 = HEAD_SIZES, []
    with open(os.path.join(root, "cpu", "cpu_attn_dispatch_generated.h"), "w") as file:
        file.write(generate.generate_header_file())
    with open(os.path.join(root, "binding.cpp"), "w") as file:
        file.write(BINDING)
    return root, [os.path.join(root, name) for name in ("cpu/cpu_attn.cpp", "cpu/utils.cpp", "binding.cpp")]


def flags():
    """Those of vLLM's cmake/cpu_extension.cmake for an x86 machine like this one."""
    result = ["-O2", "-DNDEBUG", "-std=c++20", "-fopenmp", "-DVLLM_CPU_EXTENSION", "-DVLLM_NUMA_DISABLED", "-mf16c"]
    if not torch.cpu._is_avx512_supported():
        return [*result, "-mavx2"]
    result += ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"]
    if torch.cpu._is_avx512_bf16_supported():
        result += ["-mavx512bf16", "-mavx512vnni"]
    if torch.cpu._is_amx_tile_supported():
        result += ["-mamx-bf16", "-mamx-tile", "-DCPU_CAPABILITY_AMXBF16"]
    return result


def main():
    library = os.path.abspath(sys.argv[2])
    root, files = sources(sys.argv[1], os.path.dirname(library))
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", *flags(), f"-I{root}",
               *(f"-I{path}" for path in cpp_extension.include_paths()),
               f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", *files,
               *(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch", "-ltorch_cpu", "-lc10",
               "-o", library]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
