"""How the threads of a command share the cores with other programs; imports nothing, for it comes before torch."""

from collections.abc import MutableMapping

WAITING = {"GOMP_SPINCOUNT": "300"}
"""How often a thread of torch looks whether the others have arrived before it sleeps.

OpenMP's own 300,000 looks last longer than most operations of the demo. Beside another busy program a thread that looks
keeps the core from the one that it waits for: on two cores 12 steps took 6.0 s alone, over 95 s beside a busy loop;
with 300 looks 6.1 s and 8.3 s, with 1,000 6.5 s and 8.8 s, without any 6.2 s and 7.9 s.
"""

_SAID_BY_THE_USER = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")


def share_the_cores(environment: MutableMapping[str, str]) -> None:
    """Puts `WAITING` into the environment, unless that says already how threads wait. Torch reads it at its import.

    Example:
        >>> environment = {"OMP_WAIT_POLICY": "active"}
        >>> share_the_cores(environment)
        >>> environment
        {'OMP_WAIT_POLICY': 'active'}
    """
    if not any(name in environment for name in _SAID_BY_THE_USER):
        environment.update(WAITING)
