"""What the tests of compiled kernels compile: some of it in every run, the rest in slow ones."""

from perf.cases import CASES, LOW_PRECISION, Case

_FEW = {
    "adamw": ("bfloat16, master_weights", "bfloat16, stochastic_rounding"),
    "lion": ("bfloat16, stochastic_rounding",),
    "adafactor": ("bfloat16, master_weights, beta1=0.9",),
}


def cases(word: str, *rules: str) -> tuple[str, list[Case]]:
    """The target of a word such as "sm_90", and the cases to compile for it.

    Args:
        word: a target, for all cases; " few" behind it leaves out most of low precision, " others" takes those alone.
        rules: of the cases.
    """
    target, _, share = word.partition(" ")
    own = [case for case in CASES if case.rule in rules]
    rest = [case for case in own if case in LOW_PRECISION and case.name not in _FEW[case.rule]]
    return target, {"": own, "few": [case for case in own if case not in rest], "others": rest}[share]
