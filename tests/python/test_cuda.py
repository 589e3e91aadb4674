"""What only a GPU shows: streams, graphs, devices, memory. The other tests run with CUDA arrays too, where one is
there."""

import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import cuda_is_there
from problems import Problem

import quire

pytestmark = pytest.mark.skipif(not cuda_is_there(), reason="no GPU, or quire was built without CUDA")


@pytest.fixture
def torch():
    found = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not found.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    return found


@pytest.fixture
def on_gpu(torch):
    def make(**options):
        array = lambda values: torch.from_numpy(np.array(values)).cuda()
        return Problem(array=array, device="cuda:0", **options)

    return make


def as_numpy(tensor):
    """A tensor's values, or the bytes of one in fp8, which NumPy does not have."""
    import torch

    tensor = tensor.cpu()
    return tensor.view(torch.uint8).numpy() if tensor.itemsize == 1 else tensor.numpy()


def close(mine, expected):
    # The tensor cores' weights and levels have 16 bits: 2**-8 of a row (tests/golden/README.md).
    error = np.linalg.norm(mine - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return error.max() <= 2**-8


def test_both_devices_agree(on_gpu):
    for mode in ("int4_per_token_head", "fp8_per_token_head", "turboquant_4bit_nc"):
        gpu, cpu = on_gpu(mode=mode, head_size=64), Problem(mode=mode, head_size=64)
        assert close(as_numpy(gpu.run()), cpu.run())
        codes = [as_numpy(torch_of(problem.cache.key_cache)) for problem in (gpu, cpu)]
        np.testing.assert_array_equal(*codes)


def torch_of(tensor):
    import torch

    return torch.from_dlpack(tensor)


def test_views_on_the_gpu(torch):
    for dtype in ("float32", "bfloat16", "float8_e4m3fn"):
        tensor = torch.zeros(4, 6, device="cuda").to(getattr(torch, dtype))[:, ::2]
        view = quire.Tensor(tensor)
        assert (view.device, view.dtype, view.shape, view.strides) == ("cuda:0", dtype, (4, 3), (6, 2))
        assert view.data_ptr == tensor.data_ptr() and view.__dlpack_device__() == (2, 0)
        assert torch.from_dlpack(view).data_ptr() == tensor.data_ptr()
    with pytest.raises(BufferError, match="on cuda has no buffer"):
        memoryview(view)


def test_device_facts():
    arch = quire.device_arch("cuda:0")
    assert arch.major >= 8 and arch.num_multiprocessors > 0 and arch == quire.device_arch("cuda")


def test_mixed_devices_are_refused(on_gpu):
    problem = on_gpu()
    with pytest.raises(quire.InvalidArgumentError, match="all tensors of a call must be on one device"):
        quire.unified_attention(**{**problem.read, "seq_lens": problem.read["seq_lens"].cpu()})


def test_lengths_need_bounds(on_gpu):
    problem = on_gpu()
    with pytest.raises(quire.InvalidArgumentError, match="^max_query_len is 0; on cuda it is required"):
        quire.unified_attention(**{**problem.read, "max_query_len": 0})


def busy(torch, stream):
    """Work on a stream that takes far longer than launching a kernel: what does not wait for it comes first."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second


@pytest.mark.parametrize("said", ["current", "number", "object"])
def test_ops_are_queued_behind_the_work_of_their_stream(torch, on_gpu, said):
    problem = on_gpu()
    expected = as_numpy(problem.run()).copy()
    torch.cuda.synchronize()
    query = problem.read["query"].clone()
    problem.read["query"].zero_()
    problem.read["out"].zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    busy(torch, stream)
    with torch.cuda.stream(stream):
        problem.read["query"].copy_(query)
        if said == "current":
            quire.unified_attention(**problem.read)
    if said != "current":
        quire.unified_attention(**problem.read, stream=stream.cuda_stream if said == "number" else stream)
    assert not stream.query(), "the call waited for the GPU"
    stream.synchronize()
    assert (as_numpy(problem.read["out"]) == expected).all()


def test_cupy_is_told_the_stream(torch, on_gpu):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    problem = on_gpu()
    expected = as_numpy(problem.run()).copy()
    arrays = {
        name: cupy.from_dlpack(value.detach()) if isinstance(value, torch.Tensor) else value
        for name, value in problem.read.items()
    }
    torch.cuda.synchronize()
    query = arrays["query"].copy()
    arrays["query"][...] = 0
    arrays["out"][...] = 0
    cupy.cuda.Device().synchronize()
    own, other = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    with own:
        busy(torch, torch.cuda.ExternalStream(own.ptr))
        arrays["query"][...] = query
        quire.unified_attention(**arrays, stream=other)  # CuPy makes `other` wait for `own`
    other.synchronize()
    assert (cupy.asnumpy(arrays["out"]) == expected).all()


def test_jax_arrays_on_the_gpu(torch):
    """In a process of its own, since JAX would take most of the GPU's memory for itself."""
    if importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed")
    code = """
        import os
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        import jax, quire, torch
        if jax.default_backend() == "gpu":
            for dtype in ("float32", "bfloat16"):
                x = jax.numpy.ones((2, 4), dtype) * 2
                out = torch.empty(2, 4, device="cuda")
                quire.hadamard(x, out)
                assert quire.Tensor(x).device == "cuda:0" and quire.Tensor(x).dtype == dtype
                assert out.tolist() == [[8, 0, 0, 0]] * 2
        print("done")
    """
    path = str(Path(quire.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout == "done\n", done.stderr


def test_a_plan_in_a_graph(torch, on_gpu):
    problem = on_gpu(mode="int4_per_token_head", head_size=128, lengths=(300, 40), query_lens=(1, 1))
    expected = as_numpy(problem.run()).copy()
    plan = quire.plan_unified_attention(quire.problem_of(**problem.read))
    assert plan.describe().startswith("cuda/")
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device="cuda")
    read = {**problem.read, "workspace": workspace}
    quire.run_unified_attention(plan, **read)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quire.reshape_and_cache(**problem.store)
        quire.run_unified_attention(plan, **read)
    query = problem.read["query"].clone()
    problem.read["query"].zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert not (as_numpy(problem.read["out"]) == expected).all()
    problem.read["query"].copy_(query)
    graph.replay()
    torch.cuda.synchronize()
    assert (as_numpy(problem.read["out"]) == expected).all()


def test_calls_allocate_nothing_of_torch(torch, on_gpu):
    problem = on_gpu(lengths=(3000, 200), head_size=128)
    problem.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    problem.run()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before


def test_slots_outside_the_cache_are_counted(torch, on_gpu):
    problem = on_gpu()
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    problem.store["slot_mapping"][3] = 10**6
    quire.reshape_and_cache(**problem.store, error_counter=counter)
    assert counter.item() == 1


def test_threads_with_streams_of_their_own(torch, on_gpu):
    problems = [on_gpu(seed=seed, lengths=(200, 33)) for seed in range(4)]
    expected = [as_numpy(problem.run()).copy() for problem in problems]
    torch.cuda.synchronize()
    failures = []

    def work(index):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                problems[index].read["out"].zero_()
                out = problems[index].run()
                stream.synchronize()
                if not (as_numpy(out) == expected[index]).all():
                    failures.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failures


def test_a_second_gpu(torch, on_gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    expected = as_numpy(on_gpu().run())
    with torch.cuda.device(0):
        array = lambda values: torch.from_numpy(np.array(values)).to("cuda:1")
        out = Problem(array=array, device="cuda:1").run()
        assert torch.cuda.current_device() == 0
    assert (as_numpy(out) == expected).all()
