"""`step()` stays out of the graphs of torch.compile, which could only trace the host's half of it."""

import inspect

import torch

_REASON = (
    "a fusedopt step is fused already, by kernels that torch.compile cannot see into: "
    "call it outside of the compiled function, or compile without fullgraph=True"
)


def exclude_step(cls: type[torch.optim.Optimizer]) -> None:
    """Makes torch.compile break its graph around `cls.step`, hooks included, and run it as it is.

    With `fullgraph=True`, torch raises an error with our reason in it. To be called when an instance was made, since
    torch wraps hooks around `cls.step` then. Not a decorator of `step`: torch.compiler imports torch._dynamo,
    which takes as long as torch itself; making any torch optimizer does so too.
    """
    if getattr(cls.step, "excluded_from_graphs", False):
        return
    # torch 2.7 takes no reason.
    reason = {"reason": _REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}
    step = torch.compiler.disable(cls.step, **reason)
    step.excluded_from_graphs = True
    cls.step = step  # type: ignore[method-assign]
