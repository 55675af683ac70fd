"""Models by the shapes of their parameters: presets, `config.json`, or a module whose parameters need no data."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fusedopt import checks
from fusedopt.plan.families import FAMILIES, Config, Weight
from fusedopt.sharding import any_sharded
from fusedopt.without_data import is_lazy


class Model(NamedTuple):
    """The parameters of a model.

    Attributes:
        name: of the preset, the file or the class.
        weights: those that are trained.
        frozen: those that are not.
        heads: what tensor parallelism must divide; None for a module, where it is not known how that splits it.
    """

    name: str
    weights: list[Weight]
    frozen: list[Weight]
    heads: int | None

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(prod(weight.shape) for weight in (*self.weights, *self.frozen))


def _llama(layers: int, width: int, hidden: int, heads: int, tied: bool = False) -> dict[str, Any]:
    return {
        **{"model_type": "llama", "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": hidden},
        **{"num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": tied},
    }


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT-2 124M",
        {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    ),
    "llama-1b": ("Llama 3.2 1B", _llama(16, 2048, 8192, 32, tied=True)),
    "llama-8b": ("Llama 3.1 8B", _llama(32, 4096, 14336, 32)),
    "llama-70b": ("Llama 3.1 70B", _llama(80, 8192, 28672, 64)),
    "llama-405b": ("Llama 3.1 405B", _llama(126, 16384, 53248, 128)),
}
"""Title and config of models that are planned without a file."""


def model_of(what: str | Path | Mapping[str, Any] | nn.Module) -> Model:
    """Returns the model that is meant.

    Args:
        what: a preset's name, the path of a `config.json`, the fields of one, or a module.

    Raises:
        ValueError: there is no such preset or file, or the file is not the config of a supported model.
    """
    if isinstance(what, nn.Module):
        return _of_module(what)
    if isinstance(what, Mapping):
        return _of_config("config", what)
    if str(what) in PRESETS:
        return _of_config(*PRESETS[str(what)])
    path = Path(what)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no preset and no file is called {str(what)!r}; give {', '.join(PRESETS)}, or a config.json")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot read {path} as JSON: {error}") from error
    return _of_config(str(path), fields)


def _of_config(name: str, fields: Any) -> Model:
    kind = fields.get("model_type") if isinstance(fields, Mapping) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{name} has model_type {kind!r}; planned are {', '.join(FAMILIES)}, and any module: fusedopt.plan.plan_run"
        )
    config, family = Config(fields), FAMILIES[kind]
    heads = config.get(family.heads, lambda: config[family.otherwise])
    return Model(name, list(family.weights(config)), [], heads)


def _of_module(module: nn.Module) -> Model:
    trained: list[Weight] = []
    frozen: list[Weight] = []
    name = type(module).__name__
    if any_sharded(module.parameters()):
        raise ValueError(f"parameters of {name} are DTensors; give the module as it is before it is sharded")
    for key, p in module.named_parameters():
        if is_lazy(p):
            raise ValueError(f"{key} of {name} is lazy and has no shape yet; run a forward pass first")
        if p.requires_grad:
            checks.parameter(p)
            trained.append(Weight(key, tuple(p.shape)))
        else:
            frozen.append(Weight(key, tuple(p.shape), dtype=p.dtype))
    if not trained:
        raise ValueError(f"{name} has no parameter that requires a gradient, so that an optimizer has nothing to do")
    return Model(name, trained, frozen, None)
