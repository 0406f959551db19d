"""Every architecture that transformers knows, small enough to try: tiny models and the names of their MLPs.

Used by the tests and by the coverage sweep; nothing of the compiler imports it. May be changed here: what
is exported.
"""

from ttt_compiler.architectures.expected import Kind, expected_down_projections
from ttt_compiler.architectures.tiny import (
    UnbuildableError,
    build,
    causal_lm_types,
    tiny_config,
    token_inputs,
    unbuildable_types,
)

__all__ = [
    "Kind",
    "UnbuildableError",
    "build",
    "causal_lm_types",
    "expected_down_projections",
    "tiny_config",
    "token_inputs",
    "unbuildable_types",
]
