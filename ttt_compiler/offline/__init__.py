"""Proofs of GPU code on a machine without a GPU: run it on CPU tensors, compile it for every architecture.

- :mod:`.interpreter`: Triton kernels, and whole graphs through Inductor, on CPU tensors.
- :mod:`.targets`: the architectures, and their limits.
- :mod:`.cross_compile`: a kernel to PTX and cubin; registers, spills, shared memory, tensor cores.
- :mod:`.whole_graphs`: a model by Inductor for a CUDA device that is not there, and its kernels compiled.

Nothing in the product imports this. May be changed here: what is proved. The private APIs that it leans on
are in :mod:`ttt_compiler.compat`.
"""
