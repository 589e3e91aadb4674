"""The names that quire's plugin gives to vLLM. `pytest tests/vllm` where vLLM can be imported."""

import pickle
import subprocess
import sys

import quire.vllm
from vllm.v1.attention.backends.registry import AttentionBackendEnum


def test_the_backend_reaches_a_process_that_has_not_loaded_plugins():
    quire.vllm.register()
    program = "import pickle, sys; print(pickle.load(sys.stdin.buffer).get_class().get_name())"
    found = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(AttentionBackendEnum.QUIRE),
                           capture_output=True, check=True)
    assert found.stdout.decode().split()[-1] == "QUIRE"


def test_registering_again_changes_nothing():
    quire.vllm.register()
    before = dict(AttentionBackendEnum.__members__)
    quire.vllm.register()
    assert AttentionBackendEnum.__members__ == before
    assert quire.vllm.own_backend() is AttentionBackendEnum["QUIRE"]
