"""Which parameters are MLP down-projections, by their names: the truth that the detector is compared with.

The detector never sees a name and this file never sees a graph, so the two cannot share a mistake. The rules
were read off the modeling files. May be changed here: patterns, when a family names its MLPs in another way;
never because the detector reports something else.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from torch import nn

Kind = Literal["dense", "shared", "moe"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_DOWN = (
    r"(down_proj|proj_down|dense_4h_to_h|c_proj|fc_out|fc2|lin2|linear_2"
    r"|w2|w_out|[wW]o|output_linear|layer_2)"
)
_MLP = r"(mlp|mlps\.\d+|mlp_block|feed_forward|ffn|ffns\.\d+|ff)"

# In order: the first that fits decides.
_USUAL: tuple[tuple[Kind, str], ...] = (
    ("shared", rf"\.(shared_experts?|shared_mlp)\.{_DOWN}(\.weight)?$"),
    ("moe", rf"\.experts(\.\d+)?(\.mlp)?\.{_DOWN}(\.weight)?$"),
    ("dense", rf"\.{_MLP}\.{_DOWN}\.weight$"),
    # Decoders made after BART, and those made after BERT, keep the MLP's layers in the block itself.
    ("dense", r"\.layers\.\d+\.fc2\.weight$"),
    ("dense", r"\.layer\.\d+\.output\.dense\.weight$"),
)

_OWN: dict[str, tuple[tuple[Kind, str], ...]] = {
    "ctrl": (("dense", r"\.ffn\.2\.weight$"),),
    "jetmoe": (("moe", r"\.mlp\.output_linear\.weight$"),),
    "nemotron_h": (("dense", r"\.mixer\.down_proj\.weight$"),),
    "prophetnet": (("dense", r"\.feed_forward\.output\.weight$"),),
    "reformer": (("dense", r"\.feed_forward\.output\.dense\.weight$"),),
    "rwkv": (("dense", r"\.feed_forward\.value\.weight$"),),
}

# Parts of a model that are no MLP of its text blocks, whatever the names inside of them.
_ELSEWHERE = re.compile(
    r"(^|\.)(vision|visual|image|audio|video|multi_modal|speech)\w*\."
    r"|(^|\.)\w*(attn|attention|att|attentions)\."
    r"|adapter|router|norm\.mlp\.|(^|\.)(lm_head|embed\w*)\."
)


def expected_down_projections(model: nn.Module) -> dict[str, Kind]:
    """The down-projections of a transformers model by name.

    ``"dense"`` is a plain MLP, ``"moe"`` routed experts and ``"shared"`` an expert beside routed ones that
    every token goes through. A parameter with several names is listed once, under its first name.

    Args:
        model: a causal language model with a ``config``.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    rules = [(kind, re.compile(rule)) for kind, rule in (*_OWN.get(model_type, ()), *_USUAL)]
    first_names: dict[int, str] = {}
    found: dict[str, Kind] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if parameter.dim() < 2 or first in found or _ELSEWHERE.search(name):
            continue
        kind = next((kind for kind, rule in rules if rule.search(name)), None)
        if kind is not None:
            found[first] = kind
    return found
