"""Names the optimizer that made a checkpoint, from the names in it, so that an error can say so."""

from collections.abc import Collection, Set

# Options of param groups that only one kind of optimizer has: before the first step a checkpoint holds nothing else.
_OPTIONS = {
    "ns_steps": "Muon",
    "dampening": "SGD",
    "centered": "RMSprop",
    "lr_decay": "Adagrad",
    "momentum_decay": "NAdam",
    "etas": "Rprop",
    "lambd": "ASGD",
    "line_search_fn": "LBFGS",
    "beta2_decay": "torch.optim.Adafactor",
    "clip_threshold": "Adafactor",
    "amsgrad": "Adam or AdamW",
    "correct_bias": "AdamW",
}

# Names in states, those that tell more first.
_STATES = {
    "acc_delta": "Adadelta",
    "square_avg": "RMSprop",
    "sum": "Adagrad",
    "exp_inf": "Adamax",
    "mu_product": "NAdam",
    "eta": "ASGD",
    "prev": "Rprop",
    "func_evals": "LBFGS",
    "row_var": "torch.optim.Adafactor",
    "variance": "torch.optim.Adafactor",
    "exp_avg_res_row": "CAME",
    "exp_avg_sq_row": "Adafactor",
    "RMS": "Adafactor",
    "exp_avg_var": "AdaBelief",
    "exp_avg_diff": "Adan",
    "hessian": "Sophia",
    "state1": "bitsandbytes",
    "momentum_buffer": "SGD or Muon",
}


def by_options(names: Collection[str], own: Collection[str]) -> tuple[str, str] | None:
    """Returns the optimizer whose param groups have options of these names, and the name that tells; None if unknown.

    Args:
        names: of the options in the checkpoint.
        own: names that tell nothing, since they belong to the optimizer that is asked to load it.
    """
    return next(((whose, name) for name, whose in _OPTIONS.items() if name in names and name not in own), None)


def by_state(names: Set[str]) -> str | None:
    """Returns the optimizer whose states have entries of these names; None if unknown."""
    if names == {"exp_avg"}:
        return "Lion"
    found = next((whose for name, whose in _STATES.items() if name in names), None)
    return found or ("an optimizer with Adam's moments" if {"exp_avg", "exp_avg_sq"} <= names else None)
