"""How the next token is chosen: what a request asks for, else the model's generation config.

May be changed here: which settings are honoured. One that is set in the generation config and is not honoured
is refused when the server starts: it would change replies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt_compiler.errors import UnsupportedModelError

# Colder than this is greedy: dividing by it would overflow.
COLD = 1e-5
# Settings of a generation config that change replies and are not understood here, with what asks for nothing.
_NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0.0),
    "sequence_bias": (None,),
    "suppress_tokens": (None, []),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "watermarking_config": (None,),
}


def check_defaults(defaults: Any) -> None:
    """Raise unless every setting of a generation config that changes replies is honoured here.

    Raises:
        UnsupportedModelError: naming those that are not.
    """
    wrong = [name for name, nothing in _NOT_HONOURED.items() if getattr(defaults, name, None) not in nothing]
    if wrong:
        raise UnsupportedModelError(
            f"the model's generation config sets {', '.join(wrong)}, which is not honoured here and would "
            "change replies. Remove it from generation_config.json to serve without"
        )


def chooser(
    defaults: Any,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    device: torch.device | str,
) -> Callable[[Sequence[int], Tensor], int]:
    """A function of the conversation's tokens so far and logits ``[1, V]`` that gives the next token.

    Args:
        defaults: the model's generation config, or None.
        temperature: asked for; None leaves it to the config, which is greedy without ``do_sample``.
        top_p: asked for.
        seed: asked for; None draws one.
        device: of the logits.
    """
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    def setting(name: str, asked: float | None, default: float) -> float:
        own = getattr(defaults, name, None)
        return asked if asked is not None else default if own is None else own

    always, warpers = LogitsProcessorList(), LogitsProcessorList()
    penalty = setting("repetition_penalty", None, 1.0)
    if penalty != 1.0:
        always.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
    # Who asks for a temperature or top_p wants to sample; OpenAI's default is to sample at 1.
    asked = temperature is not None or top_p is not None
    samples = asked or getattr(defaults, "do_sample", None) is not False
    heat = setting("temperature", temperature, 1.0)
    greedy = not samples or heat < COLD
    if not greedy:
        warpers.append(TemperatureLogitsWarper(float(heat)))
        if top_k := setting("top_k", None, 0):
            warpers.append(TopKLogitsWarper(int(top_k)))
        if (share := setting("top_p", top_p, 1.0)) < 1:
            warpers.append(TopPLogitsWarper(float(share)))
        if least := setting("min_p", None, 0.0):
            warpers.append(MinPLogitsWarper(float(least)))
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def choose(tokens: Sequence[int], logits: Tensor) -> int:
        if len(always):
            logits = always(torch.tensor([list(tokens)], device=logits.device), logits)
        if greedy:
            return int(logits.argmax(-1))
        probabilities = warpers(None, logits).softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=generator))

    return choose
