"""One architecture under every law: detection against names, conversion against the base and the oracle.

The rewritten graphs run op by op (``backend="inplace_ttt_eager"``): what Inductor makes of the ops is tested
on a few models elsewhere, and would take a day here. May be changed here: what is checked. The table that
this fills is ``docs/architectures.md`` (see ``table.py``).
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ttt_compiler.architectures.expected import KINDS, expected_down_projections
from ttt_compiler.architectures.oracle import oracle_call
from ttt_compiler.architectures.tiny import UnbuildableError, build, token_inputs
from ttt_compiler.compat.cache_names import own_name, returned_cache
from ttt_compiler.config import TTTConfig
from ttt_compiler.conversion import convert, disabled, revert
from ttt_compiler.discover import discover
from ttt_compiler.discovery.found import Discovery
from ttt_compiler.eligibility import why_not
from ttt_compiler.runtime.root import require_root

BATCH, TOKENS, CHUNK = 2, 14, 4
# Prefill across three chunk borders into a fourth chunk, then one token. No second prefill: many
# state-space models do not support it themselves. More steps would test what no architecture changes.
SEGMENTS = (13, 1)
# fp32 models of a few layers, compared with another order of the same sums: errors against the largest
# value. An adapter that moves too little would make a match meaningless: up to EFFECT it is scaled up, and an
# error must be far below what it moves.
CLOSE, EFFECT = 1e-4, 1e-2
_SCALES, _LR = (0.1, 1.0, 10.0), 0.5

OK, NONE = "yes", "-"
NOT_BUILT, NOT_CAPTURED = "not built: ", "not captured: "
OWN_DECODE = "the base model's own does not: "


@dataclass(frozen=True)
class Audit:
    """What was found about one architecture; strings are ``"yes"``, ``"-"`` (nothing to check) or a reason.

    Attributes:
        model_type: as transformers calls it.
        traced: whether the base model can be captured at all, and was searched.
        graphs: how many graphs it took.
        found: how many of the expected MLPs were found, as ``"2 dense, 1 moe"``.
        expected: how many there are by their names, in the same words.
        wrong_kind: names that were found as another kind, with both kinds.
        missing: expected down-projections that were not found, each with the reason.
        false_positives: names that were found and are none.
        refused: why found MLPs cannot be converted.
        converted: how many were converted.
        base: with an untrained adapter the logits equal the base model's bit for bit.
        oracle: with a random adapter they equal the reference run eagerly.
        decode: prefill and decode through the model's own cache equal one forward.
    """

    model_type: str
    traced: str
    graphs: int = 0
    found: str = NONE
    expected: str = NONE
    wrong_kind: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    false_positives: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    converted: int = 0
    base: str = NONE
    oracle: str = NONE
    decode: str = NONE

    @property
    def right(self) -> bool:
        """Whether everything that was expected was found, nothing else, and every law held."""
        laws = all(x in (OK, NONE) for x in (self.base, self.oracle))
        laws = laws and (self.decode in (OK, NONE) or self.decode.startswith(OWN_DECODE))
        wrong = self.missing or self.false_positives or self.wrong_kind
        return self.traced == OK and not wrong and laws


def audit(model_type: str) -> Audit:
    """Build, search, convert and run one architecture. Never raises for what the architecture does."""
    torch._dynamo.reset()
    try:
        model = build(model_type)
    except UnbuildableError as e:
        return Audit(model_type, traced=f"{NOT_BUILT}{e}")
    inputs = token_inputs(model, BATCH, TOKENS)
    try:
        found = discover(model, ((), token_inputs(model, BATCH, 9)))
    except Exception as e:
        return Audit(model_type, traced=_whose_fault(model, inputs, e))
    result = _detection(model_type, model, found)
    config = TTTConfig(layers="all", chunk_size=CHUNK, lr=_LR)
    refusals = {m.weight: why_not(model, config, m, found) for m in found.mlps}
    good = tuple(glob.escape(name) for name, reason in refusals.items() if reason is None)
    reasons = tuple(sorted({r for r in refusals.values() if r is not None and "routed" not in r}))
    result = dataclasses.replace(result, refused=reasons, converted=len(good))
    if not good:
        return result
    with torch.no_grad():
        base = _logits(model(**inputs))
        own_decode = _attempt(lambda: _decode_error(model, inputs["input_ids"]))
        try:
            convert(model, dataclasses.replace(config, layers=good), found=found)
        except Exception as e:
            return dataclasses.replace(result, base=f"not converted: {_short(e)}")
        model.compile(backend="inplace_ttt_eager")
        result = dataclasses.replace(result, base=_attempt(lambda: _equals_base(model, inputs, base)))
        result = dataclasses.replace(result, oracle=_attempt(lambda: _equals_oracle(model, inputs, base)))
        if own_decode == OK:
            decode = _attempt(lambda: _decode_error(model, inputs["input_ids"]))
        else:
            decode = f"{OWN_DECODE}{_without_numbers(own_decode)}"
        revert(model)
    return dataclasses.replace(result, decode=decode)


def _detection(model_type: str, model: nn.Module, found: Discovery) -> Audit:
    expected = expected_down_projections(model)
    kinds = {m.weight: m.kind for m in found.mlps}
    both = [n for n in expected if n in kinds]
    refusals = dict(found.rejections)
    unseen = f"in none of the {found.graphs} graphs that graph breaks make of the model"
    return Audit(
        model_type,
        traced=OK,
        graphs=found.graphs,
        # What is no row per token ("other") counts as found: it is refused, with the reason.
        found=_counts([expected[n] if kinds[n] == "other" else kinds[n] for n in both]),
        expected=_counts(list(expected.values())),
        wrong_kind=tuple(
            f"{n}: {kinds[n]}, not {expected[n]}" for n in both if kinds[n] not in (expected[n], "other")
        ),
        missing=tuple(f"{n}: {refusals.get(n, unseen)}" for n in expected if n not in kinds),
        false_positives=tuple(sorted(kinds.keys() - expected.keys())),
    )


def _counts(kinds: Sequence[str]) -> str:
    return ", ".join(f"{kinds.count(k)} {k}" for k in KINDS if k in kinds) or "none"


def _whose_fault(model: nn.Module, inputs: dict[str, Any], error: Exception) -> str:
    """A mistake of ours must not pass for a model that torch.compile cannot capture."""
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(model, backend="eager")(**inputs)
    except Exception as e:
        return f"{NOT_CAPTURED}{_short(e)}"
    return f"not searched: {_short(error)}"


def _equals_base(model: nn.Module, inputs: dict[str, Any], base: Tensor) -> str:
    out = _logits(model(**inputs))
    if not torch.equal(out, base):
        # Some models compute in another way when they are compiled.
        with disabled(model):
            base = _logits(model(**inputs))
    return OK if torch.equal(out, base) else f"differs by {float((out - base).abs().max()):.1e}"


def _equals_oracle(model: nn.Module, inputs: dict[str, Any], base: Tensor) -> str:
    effect = 0.0
    for scale in _SCALES:
        _randomise(model, scale)
        truth = _logits(oracle_call(model, kwargs=inputs))
        largest = float(truth.abs().max())
        effect = float((truth - base).abs().max()) / largest
        if effect >= EFFECT:
            break
    if effect < EFFECT / 10:
        return f"the adapter moves the logits by {effect:.1e} only"
    error = float((_logits(model(**inputs)) - truth).abs().max()) / largest
    return OK if error <= min(CLOSE, effect / 30) else f"differs by {error:.1e} of the largest logit"


def _decode_error(model: nn.Module, ids: Tensor) -> str:
    """One forward against segments through the cache that the model itself makes."""
    whole = _logits(model(input_ids=ids, use_cache=False))
    cache, parts = None, []
    for part in ids.split(SEGMENTS, dim=1):
        given: dict[str, Any] = {} if cache is None else {own_name(model.forward): cache}
        out = model(input_ids=part, use_cache=True, **given)
        cache = returned_cache(out)
        if cache is None:
            return "it returns no cache"
        parts.append(_logits(out))
    error = float((torch.cat(parts, 1) - whole).abs().max() / whole.abs().max())
    return OK if error <= CLOSE else f"differs by {error:.1e} of the largest logit"


def _without_numbers(reason: str) -> str:
    """What is not about this package must not change the table from one machine to the next."""
    return "it differs from its forward" if reason.startswith("differs by") else reason


def _attempt(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as e:
        return _short(e)


def _randomise(model: nn.Module, scale: float) -> None:
    root = require_root(model)[1]
    generator = torch.Generator().manual_seed(2)
    for spec in root.specs:
        for parameter in root.parameters(spec):
            if parameter is not None:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def _logits(out: Any) -> Tensor:
    logits: Tensor = out.logits
    return logits


def _short(e: Exception) -> str:
    lines = str(e).strip().splitlines() or [""]
    return f"{type(e).__name__}: {lines[0][:160]}"
