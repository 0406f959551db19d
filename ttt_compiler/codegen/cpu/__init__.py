"""CPU implementations behind the ops of :mod:`ttt_compiler.codegen.ops`."""
