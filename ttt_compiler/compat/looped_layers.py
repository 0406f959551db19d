"""Models that run some layers several times, and keep keys and values of every time apart.

They add layers to their cache in their first call, where nobody else sees it: a cache made for them has those
layers from the start, so that one can be stored, restored and joined before it has read. Checked on
transformers 5.24. May be changed here: families; ``tests/runtime/test_layers_everywhere.py`` fails when one
is missing, or adds other layers.
"""

from __future__ import annotations

import copy
from typing import Any


def complete(cache: Any, config: Any) -> Any:
    """Give an empty cache the layers that a model with this (text) configuration would add; returns it."""
    copied = _copied(config)
    # The condition is theirs: a cache of more layers they leave alone.
    if copied and len(cache.layers) == config.num_hidden_layers:
        cache.layers += [copy.deepcopy(cache.layers[i]) for i in copied]
    return cache


def _copied(config: Any) -> list[int]:
    """Indices of the layers that further rounds use, once per round."""
    family = getattr(config, "model_type", None)
    if family == "dory" and config.recurrent_kv_cache_mode == "per_loop":
        first, rounds = config.n_input_layers, config.n_recurrent_loops
        return [*range(first, first + config.n_recurrent_layers)] * (rounds - 1)
    if family == "inkling2_loop_text":
        looped = range(config.loop_layer_index_start, config.loop_layer_index_end)
        return [*looped] * (config.loop_num_passes - 1)
    return []
