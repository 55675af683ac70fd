"""`step()` stays out of the graphs of torch.compile, which could only trace the host's half of it."""

import functools
import inspect

import torch

_REASON = (
    "a fusedopt step is fused already, by kernels that torch.compile cannot see into: "
    "call it outside of the compiled function, or compile without fullgraph=True"
)


@functools.cache
def keep(cls: type[torch.optim.Optimizer]) -> None:
    """Makes torch.compile break its graph around `cls.step` and run it as it is; once, before the first instance.

    With `fullgraph=True`, torch raises an error with our reason in it. This is no decorator of `step`, since
    torch.compiler imports torch._dynamo, which takes as long as torch itself; making any torch optimizer does so too.
    """
    # torch 2.7 takes no reason.
    reason = {"reason": _REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}
    cls.step = torch.compiler.disable(cls.step, **reason)  # type: ignore[method-assign]
