"""Warps, branches, barriers and memory; planted faults, which the machine finds."""

from typing import Any

import numpy as np
import pytest

from ptx.machine import Schedule, StuckError
from ptx.snippets import THREADS, execute


def test_warps_exchange() -> None:
    values, out = np.arange(THREADS, dtype=np.uint32) ** 2, np.zeros((3, THREADS), np.uint32)
    execute(
        f"""mad.wide.u32 %rd10, %r1, 4, %rd1;
        mad.wide.u32 %rd11, %r1, 4, %rd2;
        ld.global.b32 %r10, [%rd10];
        shfl.sync.bfly.b32 %r11, %r10, 4, 31, -1;
        st.global.b32 [%rd11], %r11;
        mov.b32 %r12, -1;
        redux.sync.add.s32 %r13, %r10, %r12;
        st.global.b32 [%rd11+{4 * THREADS}], %r13;
        shfl.sync.idx.b32 %r14, %r10, 3, 31, -1;
        st.global.b32 [%rd11+{8 * THREADS}], %r14;""",
        *(values, out),
    )
    assert (out[0] == values[np.arange(THREADS) ^ 4]).all()
    assert (out[1] == values.reshape(-1, 32).sum(1).repeat(32)).all()
    assert (out[2] == values[np.arange(THREADS) // 32 * 32 + 3]).all()


def test_branches_guards_and_loops() -> None:
    """Each thread counts to its number; odd ones then store, others not."""
    out = np.full(THREADS, 7, np.uint32)
    execute(
        """mov.b32 %r2, 0;
        $L__loop:
        setp.ge.u32 %p1, %r2, %r1;
        @%p1 bra $L__done;
        add.s32 %r2, %r2, 1;
        bra.uni $L__loop;
        $L__done:
        and.b32 %r3, %r1, 1;
        setp.eq.b32 %p2, %r3, 1;
        mad.wide.u32 %rd10, %r1, 4, %rd1;
        @%p2 st.global.b32 [%rd10], %r2;""",
        out,
        schedule=Schedule(seed=1),
    )
    assert out.tolist() == [k if k % 2 else 7 for k in range(THREADS)]


MIRROR = """shl.b32 %r2, %r1, 2;
mov.b32 %r3, global_smem;
add.s32 %r4, %r3, %r2;
st.shared.b32 [%r4], %r1;
{barrier}
xor.b32 %r5, %r2, 252;
add.s32 %r6, %r3, %r5;
ld.shared.b32 %r7, [%r6];
mad.wide.u32 %rd10, %r1, 4, %rd1;
st.global.b32 [%rd10], %r7;"""
"""Threads exchange their numbers through shared memory, the first with the last."""


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_barriers_order_shared_memory(seed: int | None) -> None:
    out = np.zeros(THREADS, np.uint32)
    run = execute(MIRROR.format(barrier="bar.sync 0;"), out, shared=4 * THREADS, schedule=Schedule(seed))
    assert not run.findings.counts
    assert out.tolist() == list(range(THREADS))[::-1]


def test_a_missing_barrier_is_a_race() -> None:
    run = execute(MIRROR.format(barrier=""), np.zeros(THREADS, np.uint32), shared=4 * THREADS)
    assert run.findings.kinds == {"race in a block on shared memory"}


def test_matrices_come_back_as_they_were() -> None:
    """Rows of 16 bytes, an element of which each thread of a warp has as two halves."""
    out = np.zeros((THREADS, 4), np.uint32)
    execute(
        """mov.b32 %r2, global_smem;
        shl.b32 %r3, %r1, 4;
        add.s32 %r4, %r2, %r3;
        add.s32 %r10, %r1, 100;
        add.s32 %r11, %r1, 200;
        add.s32 %r12, %r1, 300;
        add.s32 %r13, %r1, 400;
        stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4], {%r10, %r11, %r12, %r13};
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r4];
        mad.wide.u32 %rd10, %r1, 16, %rd1;
        st.global.v4.b32 [%rd10], {%r20, %r21, %r22, %r23};""",
        out,
        shared=16 * THREADS,
        schedule=Schedule(watched=False),
    )
    assert (out == np.arange(THREADS)[:, None] + [100, 200, 300, 400]).all()


AT_MY_PLACE = "mad.wide.u32 %rd10, %r1, 4, %rd1;\n"


def kinds(body: str, *arrays: np.ndarray, **options: Any) -> set[str]:
    return execute(body, *arrays, **options).findings.kinds


def test_an_access_out_of_bounds() -> None:
    room = np.zeros(THREADS + 8, np.uint32)
    short = room[: THREADS - 1]
    assert kinds(AT_MY_PLACE + "st.global.b32 [%rd10], %r1;", short) == {"out of bounds"}
    assert room[THREADS - 1] == 0, "it must not be carried out"
    assert kinds(AT_MY_PLACE + "ld.global.b32 %r2, [%rd10+4];", room[:THREADS].copy()) == {"out of bounds"}


def test_a_misaligned_vector() -> None:
    room = np.zeros(2 * THREADS + 8, np.uint32)
    aligned = room[(-room.ctypes.data % 16) // 4 :]
    body = "mad.wide.u32 %rd10, %r1, 8, %rd1;\nst.global.v2.b32 [%rd10], {%r1, %r1};"
    assert kinds(body, aligned) == set()
    assert kinds(body, aligned[1:]) == {"misaligned"}


def test_races_on_global_memory() -> None:
    out = np.zeros(THREADS, np.uint32)
    mine = AT_MY_PLACE + "mov.u32 %r2, %ctaid.x;\n"
    assert kinds(mine + "st.global.b32 [%rd10], %r2;", out, blocks=2) == {"race between blocks on global memory"}
    assert kinds(mine + "st.global.b32 [%rd10], %r1;", out, blocks=2) == set()  # the same number
    assert kinds("st.global.b32 [%rd1], %r1;", out) == {"race in a block on global memory"}
    neighbour = AT_MY_PLACE + "ld.global.b32 %r2, [%rd10+4];\n{barrier}\nst.global.b32 [%rd10], %r2;"
    wide = np.zeros(THREADS + 1, np.uint32)
    assert kinds(neighbour.format(barrier=""), wide) == {"race in a block on global memory"}
    assert kinds(neighbour.format(barrier="bar.sync 0;"), wide) == set()


def test_shared_memory_that_nobody_wrote() -> None:
    body = "mov.b32 %r2, global_smem;\nld.shared.b32 %r3, [%r2];"
    assert kinds(body, np.zeros(1, np.uint32), shared=16) == {"shared memory read before it is written"}


def test_a_division_by_zero() -> None:
    assert kinds("div.u32 %r2, %r1, %r1;", np.zeros(1, np.uint32)) == {"division by zero"}


ALONE = "setp.lt.u32 %p1, %r1, {number};\n@%p1 bra $L__end;\n{waits}\n$L__end:\n"
STUCK = {
    "a barrier that a part of a warp reaches": ALONE.format(number=3, waits="bar.sync 0;"),
    "a barrier that one warp reaches": ALONE.format(number=32, waits="bar.sync 0;"),
    "a shuffle in a part of a warp": ALONE.format(number=3, waits="shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;"),
    "a loop without end": "$L__again:\nbra.uni $L__again;\n",
    "shared memory that is not there": "mov.b32 %r2, global_smem;\nst.shared.b32 [%r2+16], %r1;",
    "a sum of half a warp": "mov.b32 %r2, 65535;\nredux.sync.add.s32 %r3, %r1, %r2;",
}


@pytest.mark.parametrize("body", STUCK.values(), ids=STUCK)
def test_what_a_gpu_would_hang_on(body: str) -> None:
    with pytest.raises(StuckError):
        execute(body, np.zeros(1, np.uint32), shared=16)
