"""Inductor templates: the kernels of :mod:`ttt_compiler.codegen.kernels` inside of generated graphs.

A template is derived from its kernel's source, so there is one source for both. May be changed here: what
Inductor may fuse into a kernel. Importing these needs triton.
"""
