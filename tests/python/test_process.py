"""What a call does to its process: the GIL, threads, fork, memory, imports."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import quire
from problems import Problem


def python(code, timeout=300):
    """Runs code in a process of its own, with quire's tests on its path; gives what it printed."""
    path = os.pathsep.join([str(Path(quire.__file__).parents[1]), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_import_brings_no_other_library():
    assert (
        python(r"""
        import sys, quire
        print([name for name in ("numpy", "torch", "jax", "cupy", "nanobind") if name in sys.modules])
    """)
        == "[]\n"
    )


def test_no_library_is_needed():
    assert (
        python(r"""
        import array, quire
        x, out = array.array("f", [1.0] * 32), array.array("f", [0.0] * 32)
        quire.hadamard(x, out)
        spec = quire.KVCacheSpec("int8_per_token_head", head_size=32, num_kv_heads=1)
        cache = quire.allocate_cache(spec, 1)
        row = memoryview(x).cast("B").cast("f", (1, 1, 32))
        quire.reshape_and_cache(row, row, cache, array.array("q", [0]))
        print(out[:2].tolist(), set(memoryview(cache.key_cache).tolist()[0][0][0]))
    """)
        == "[32.0, 0.0] {127}\n"
    )


def test_other_threads_run_while_an_op_does():
    problem = Problem(lengths=(3000,), query_lens=(3000,), heads=(4, 2))
    quire.reshape_and_cache(**problem.store)
    running, during = threading.Event(), []

    def attend():
        running.set()
        quire.unified_attention(**problem.read)
        running.clear()

    thread = threading.Thread(target=attend)
    thread.start()
    running.wait(timeout=60)
    while running.is_set():
        during.append(None)
    thread.join()
    # With the GIL held there would be a handful, from before the op begins and after it ends.
    assert len(during) > 1000


def test_threads_that_call_at_the_same_time_get_the_same_bits():
    problems = [Problem(seed=seed, lengths=(200, 33)) for seed in range(4)]
    expected = [problem.run().copy() for problem in problems]
    failures = []

    def work(index):
        for _ in range(20):
            problem = problems[index]
            problem.read["out"][...] = np.nan
            if not (problem.run() == expected[index]).all():
                failures.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failures


def test_a_forked_child_computes():
    assert (
        python(r"""
        import os, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of fork() where there are threads
        from problems import Problem
        problem = Problem(lengths=(500, 9))
        expected = problem.run().copy()
        child = os.fork()
        if child == 0:  # threads of the parent's are not there
            problem.read["out"][...] = 0
            os._exit(0 if (problem.run() == expected).all() else 1)
        print(os.waitpid(child, 0)[1], (problem.run() == expected).all())
    """)
        == "0 True\n"
    )


def test_multiprocessing_computes():
    code = """
        import multiprocessing, sys
        import numpy as np
        import problems, quire

        def digest(seed):
            return problems.Problem(seed=seed, lengths=(100, 9)).run().tobytes()

        if __name__ == "__main__":
            context = multiprocessing.get_context("fork")
            own = [digest(seed) for seed in range(3)]
            with context.Pool(2) as pool:
                print(pool.map(digest, range(3)) == own)
    """
    assert python(code) == "True\n"


def test_no_call_copies_its_arrays():
    """The high-water mark of a process's memory stays where it was, over calls whose arrays take 96 MiB."""
    grown_kib, copied_kib = map(
        int,
        python(r"""
        import re
        import numpy as np
        import quire

        def high_water_mark():
            return int(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1])

        spec = quire.KVCacheSpec("int8_per_token_head", head_size=128, num_kv_heads=8)
        cache = quire.allocate_cache(spec, 256)
        key, value = (np.ones((4096, 8, 128), np.float32) for _ in range(2))
        slots = np.arange(4096)
        query = np.ones((4096, 16, 128), np.float32)
        out = np.zeros_like(query)
        for array in (cache.key_cache, cache.value_cache, cache.k_scale_cache, cache.v_scale_cache):
            np.asarray(array)[...] = 1

        def both(tokens):
            quire.reshape_and_cache(key[:tokens], value[:tokens], cache, slots[:tokens])
            quire.unified_attention(query[:tokens], out[:tokens], cache, np.array([0, tokens], np.int32),
                                    np.array([tokens], np.int32), np.arange(256, dtype=np.int32)[None], 0.1,
                                    sliding_window=16)

        both(512)
        before = high_water_mark()
        both(4096)
        grown = high_water_mark() - before
        copies = key.copy(), value.copy(), query.copy(), out.copy()
        print(grown, high_water_mark() - before - grown)
    """).split(),
    )
    assert copied_kib > 80 << 10  # what a copy would show
    assert grown_kib < 4 << 10


def test_the_interpreter_ends_quietly():
    """With views, plans and backends alive, and nothing said on the way out."""
    assert (
        python(r"""
        from problems import Problem
        import quire

        class Backend(quire.QuantKVBackend):
            pass

        quire.register_mode("at_exit")
        quire.register_backend("at_exit", Backend)
        backend = quire.get_backend("at_exit")
        problem = Problem()
        backend.problem, backend.plan = problem, quire.plan_unified_attention(quire.problem_of(**problem.read))
        view = memoryview(problem.cache.key_cache)
        print("done")
    """)
        == "done\n"
    )


def test_cycles_through_views_are_collected():
    import gc
    import weakref

    class Node:
        pass

    def make():
        node = Node()
        array = np.zeros((1, 16, 2, 32), np.float32).view(type("Array", (np.ndarray,), {}))
        node.cache = quire.KVCacheViews(array, array, mode="float32")
        array.node = node
        return weakref.ref(node)

    died = make()
    gc.collect()
    assert died() is None


@pytest.mark.parametrize("order", [["torch", "quire"], ["quire", "torch"]], ids=" first, ".join)
def test_beside_torch_in_either_order(torch, order):
    """Two OpenMP libraries in one process, and both compute."""
    assert (
        python(f"""
        import {order[0]}, {order[1]}
        x = torch.ones(64, 64) @ torch.ones(64, 64)
        out = torch.empty(64, 64)
        quire.hadamard(x, out)
        print(out[0, 0].item(), (x @ x)[0, 0].item())
    """)
        == "4096.0 262144.0\n"
    )
