"""The names of other libraries, for code that was written against them. They need PyTorch, which quire itself does not.

``quire.compat.vllm`` has the names of vLLM 0.33.0's Triton kernels, ``quire.compat.vllm_quant_kv`` those of pull
request 39074 and its time. docs/python_vllm.md says which name is in which, and what differs.
"""
