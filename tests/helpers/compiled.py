"""Which configurations of `perf.cases` are compiled, and counted, in every run; the rest is in slow ones."""

from perf.cases import CASES, STATISTICS, Case

_FEW = {
    "adamw": ("float32", "bfloat16", "bfloat16, master_weights", "bfloat16, stochastic_rounding"),
    "adafactor": ("float32", "bfloat16, master_weights, beta1=0.9"),
}


def in_every_run(case: Case) -> bool:
    """True for one of the few."""
    return case.name in _FEW.get(case.rule, ())


def cases(word: str, *rules: str) -> tuple[str, list[Case]]:
    """The target of a word such as "sm_90", and the cases to compile for it, but for those that track statistics.

    Args:
        word: a target, for all cases; " few" behind it leaves out most of them, " others" takes what that leaves out.
        rules: of the cases.
    """
    target, _, share = word.partition(" ")
    own = [case for case in CASES if case.rule in rules and case not in STATISTICS]
    few = [case for case in own if in_every_run(case)]
    return target, {"": own, "few": few, "others": [case for case in own if case not in few]}[share]
