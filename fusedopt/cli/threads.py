"""Lets the threads of a command share the cores with other programs. Runs before torch is imported."""

from collections.abc import MutableMapping

WAITING = {"GOMP_SPINCOUNT": "300"}
"""How often a thread of torch polls for the others before it sleeps.

OpenMP's default of 300,000 takes longer than most operations of the demo, and a polling thread keeps its core from the
thread that it waits for. On two cores, 12 steps took 6.0 s, and over 95 s next to a busy loop; with 300 polls 6.1 s and
8.3 s, with 1,000 6.5 s and 8.8 s, with none 6.2 s and 7.9 s.
"""

_SET_BY_THE_USER = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")


def share_the_cores(environment: MutableMapping[str, str]) -> None:
    """Puts `WAITING` into the environment that torch reads at its import, unless it says how threads wait.

    Example:
        >>> environment = {"OMP_WAIT_POLICY": "active"}
        >>> share_the_cores(environment)
        >>> environment
        {'OMP_WAIT_POLICY': 'active'}
    """
    if not any(name in environment for name in _SET_BY_THE_USER):
        environment.update(WAITING)
