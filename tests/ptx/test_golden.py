"""The recorded runs of the original optimizers, on compiled kernels."""

from functools import partial

import pytest
from helpers.adafactor import GOLDEN as ADAFACTOR
from helpers.adafactor import uses_rms
from helpers.adamw import GOLDEN as ADAMW
from helpers.adamw import SIXTEEN_BITS, STATES, RoundedOnce, rounding_spoils_nothing
from helpers.comparing import Tolerance, assert_near
from helpers.golden import ROUNDED_TWICE_PER_STEP, Case, assert_close, replay

from fusedopt import Adafactor, AdamW
from ptx.gpu import standing_in


@pytest.mark.parametrize("case", [case for case in ADAMW if case.dtype not in SIXTEEN_BITS], ids=str)
def test_adamw(case: Case) -> None:
    with standing_in():
        records = replay(case, partial(AdamW, backend="triton"))
    assert_close(case, records)


@pytest.mark.parametrize("case", [case for case in ADAMW if case.dtype in SIXTEEN_BITS], ids=str)
def test_adamw_in_16_bits(case: Case) -> None:
    """Exact arithmetic, rounded once; what the original's own rounding does not spoil is near its recording too."""
    with standing_in():
        records = replay(case, partial(AdamW, backend="triton"))
    allowed = Tolerance("a tie may fall to the other side, and move the moments for some steps", ulps=2)
    assert_near(records.parameters, replay(case, RoundedOnce).parameters, allowed)
    if rounding_spoils_nothing(case):
        assert_close(case, records, parameters=ROUNDED_TWICE_PER_STEP[case.dtype], skip_state=STATES)


@pytest.mark.parametrize("case", ADAFACTOR, ids=str)
def test_adafactor(case: Case) -> None:
    with standing_in():
        records = replay(case, partial(Adafactor, backend="triton"))
    assert_close(case, records, skip_state=() if uses_rms(case) else ("RMS",))
