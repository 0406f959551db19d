"""How tokens are chosen: by the processors of ``generate``, for a loop of our own.

May be changed here: which settings of a generation config are honoured, and what a request may ask instead.
What is set and would be ignored is refused when the server starts.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ttt_compiler.errors import UnsupportedModelError

# Below it, logits divided by the temperature could overflow; it is greedy anyway.
COLD = 1e-4

# Settings that change what ``generate`` gives and are not known here, with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "constraints": (None,),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1.0),
    "max_time": (None,),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0),
    "remove_invalid_values": (None, False),
    "stop_strings": (None, []),
    "token_healing": (None, False),
}

Choose = Callable[[Tensor, Tensor], int]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when the reply ends. None: as the model's generation config says.

    Attributes:
        max_tokens: None for ``MAX_TOKENS``, or what the context has room for.
        temperature: 0 takes the most probable token; more samples, whatever ``do_sample`` says.
        top_p: of the probability, what may be chosen from; samples too, unless the temperature is 0.
        seed: the same seed gives the same tokens on the same session; None is random.
        stop: strings that end the reply.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Chooser:
    """Chooses tokens as ``generate`` does with the model's generation config.

    Args:
        model: of transformers.
        ends: the tokens that end a reply.

    Raises:
        UnsupportedModelError: the config sets what is not honoured here, or sets it wrongly.
    """

    def __init__(self, model: nn.Module, ends: Collection[int]) -> None:
        from transformers import GenerationConfig

        self._model: Any = model
        self._device = torch.device(getattr(model, "device", None) or "cpu")
        self._ends = torch.tensor(sorted(ends), dtype=torch.long, device=self._device) if ends else None
        # What is set here later has no effect: the server says at its start what it honours.
        own = getattr(model, "generation_config", None)
        self._config: Any = GenerationConfig() if own is None else copy.deepcopy(own)
        wrong = [
            f"{name}={value!r}"
            for name, nothing in REFUSED.items()
            if (value := getattr(self._config, name, None)) not in nothing
        ]
        if wrong:
            raise UnsupportedModelError(
                f"the model's generation config sets {', '.join(wrong)}, which is not honoured here. Take it "
                "out of generation_config.json"
            )
        for temperature in (0.0, None):
            try:
                self.start(Sampling(temperature=temperature), 1, 1)
            except (TypeError, ValueError) as e:
                raise UnsupportedModelError(f"the model's generation config cannot be used: {e}") from e

    def start(self, sampling: Sampling, prompt: int, max_tokens: int) -> Choose:
        """What chooses a reply's tokens, from logits ``[1, vocabulary]`` and all tokens before, ``[1, n]``.

        Args:
            sampling: what the request asks.
            prompt: tokens of the conversation before the reply.
            max_tokens: of the reply.
        """
        config = copy.copy(self._config)
        for name in ("temperature", "top_p"):
            if (asked := getattr(sampling, name)) is not None:
                setattr(config, name, float(asked))
        # Unset, it is OpenAI's default, which samples; so does who asks for a temperature or top_p.
        greedy = config.do_sample is False and sampling.temperature is None and sampling.top_p is None
        cold = config.temperature is not None and config.temperature < COLD
        config.do_sample = not (greedy or cold)
        config.max_length = prompt + max_tokens
        config._eos_token_tensor = self._ends
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            processors = self._model._get_logits_processor(
                generation_config=config,
                input_ids_seq_length=prompt,
                device=self._device,
                model_kwargs={},
            )
        generator = torch.Generator(device=self._device)
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)

        def choose(logits: Tensor, before: Tensor) -> int:
            logits = processors(before, logits)
            if not config.do_sample:
                return int(logits.argmax(-1))
            return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))

        return choose
