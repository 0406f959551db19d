"""Triton kernels of the fast-weight ops, one per file: the kernel, its launcher, its naive reference.

Each is used twice: launched as it is, and as the source of an Inductor template
(:mod:`ttt_compiler.codegen.templates`). May be changed here: kernels; what they must compute is
:mod:`ttt_compiler.codegen.reference`. Importing these needs triton.
"""
