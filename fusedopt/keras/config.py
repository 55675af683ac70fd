"""Configs: reads those of AdamWeightDecay and of Keras' own Adam and AdamW, and writes numbers into them."""

from typing import Any

import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.keras.schedules import revive
from fusedopt.precision import named_dtype

_OPTIMIZERS = ("AdamWeightDecay", "Adam", "AdamW")

_WITHOUT_EFFECT = ("jit_compile", "is_legacy_optimizer", "ema_momentum", "ema_overwrite_frequency")
"""Options that change no number; those of the moving average do not if it is switched off (`use_ema`)."""

_INSTEAD = {
    "use_ema": "keep the average with torch.optim.swa_utils.AveragedModel",
    "loss_scale_factor": "scale the loss with torch.amp.GradScaler",
    "gradient_accumulation_steps": "add gradients up with fusedopt.GradientAccumulator",
}
"""Options that do not exist here, and what does the same."""


def from_keras(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of AdamWeightDecay for a config of it, or of Keras' Adam or AdamW.

    Args:
        config: what `get_config` or `keras.optimizers.serialize` returned.

    Raises:
        ValueError: the config belongs to another optimizer, has an unknown schedule, or switches on an option that does
            not exist here.

    Example:
        >>> from_keras({"learning_rate": 0.1, "weight_decay": None, "use_ema": False, "jit_compile": True})
        {'learning_rate': 0.1}
        >>> from_keras({"class_name": "AdamW", "config": {"weight_decay": 0.004}})
        {'weight_decay_rate': 0.004}
    """
    if isinstance(config.get("config"), dict):
        name = config.get("class_name", "")
        if str(name).split(">")[-1] not in _OPTIMIZERS:  # "Custom>Adam" and "package>Adam" are registered classes
            raise ValueError(f"the config is of {name!r}: those of {', '.join(_OPTIMIZERS)} can be read")
        config = config["config"]
    arguments = {option: value for option, value in config.items() if option not in _WITHOUT_EFFECT}
    for option, instead in _INSTEAD.items():
        value = arguments.pop(option, None)
        if value not in (None, False):
            raise ValueError(f"the config has {option}={value!r}, which does not exist here: {instead}")
    decay = arguments.pop("weight_decay", None)
    if decay is not None:
        given = arguments.setdefault("weight_decay_rate", decay)
        if given != decay:
            raise ValueError(f"the config has weight_decay={decay!r} and weight_decay_rate={given!r}: leave out one")
    if "state_dtype" in arguments:
        arguments["state_dtype"] = named_dtype(arguments["state_dtype"])
    if "lr" in arguments:
        arguments["learning_rate"] = arguments.pop("lr")
    if "learning_rate" in arguments:
        arguments["learning_rate"] = revive(arguments["learning_rate"])
    return arguments


def to_keras(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config whose numbers are Python's, of a tensor with as few digits as give it back in its dtype.

    Example:
        >>> to_keras({"beta_1": torch.tensor(0.9), "beta_2": 0.999})
        {'beta_1': 0.9, 'beta_2': 0.999}
    """
    written = {name: _decimal(value) if isinstance(value, Tensor) else value for name, value in config.items()}
    return dict(checks.plain(written))


def _decimal(t: Tensor) -> float:
    value = t.item()
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 17))
    return next((x for x in candidates if torch.tensor(x, dtype=t.dtype, device="cpu").item() == value), value)
