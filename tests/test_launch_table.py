"""Launch tables: every element once, no stale address, nothing copied that did not change."""

import weakref

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers.comparing import assert_same
from hypothesis import given, settings

from fusedopt.backends.triton.rows import Rows
from fusedopt.precision import COUNTS
from fusedopt_kernels import table as tables
from fusedopt_kernels.table import LaunchClass, LaunchTable, address_column, addresses, launch_class

CPU = torch.device("cpu")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3))), st.integers(1, 7))
def test_every_element_of_every_tensor_is_covered_exactly_once(tensors, block):
    sizes = np.array([size for size, _ in tensors], np.int64)
    keys = np.array([key for _, key in tensors], np.int64)
    launches = LaunchTable(CPU).chunks("update", keys, -(-sizes // block))
    visits = [np.zeros(size, int) for size in sizes]
    for key, chunks in launches.items():
        assert chunks.dtype is torch.int32 and chunks.is_contiguous() and chunks.data_ptr() % 16 == 0
        assert len(chunks) > 0
        for row, piece in chunks.tolist():
            assert keys[row] == key
            covered = visits[row][piece * block : (piece + 1) * block]
            assert len(covered) > 0
            covered += 1
    assert all((visit == 1).all() for visit in visits)


def test_a_tensor_of_more_than_2_31_elements():
    """Its pieces fit int32, and an offset is piece * block in int64: see `my_piece`."""
    pieces = np.array([3 * 2**31 // 2**20, 1])
    (chunks,) = LaunchTable(CPU).chunks("update", np.zeros(2, np.int64), pieces).values()
    assert chunks[-2].tolist() == [0, 6143] and chunks[-1].tolist() == [1, 0]


def counted():
    """An upload that counts, and its counts: elements of each copy."""
    sizes: list[int] = []

    def upload(host, device):
        sizes.append(host.size)
        return tables.upload(host, device)

    return upload, sizes


def test_only_what_changed_is_copied():
    upload, sizes = counted()
    table = LaunchTable(CPU, upload)
    rows, hyper = np.arange(24).reshape(3, 8), np.arange(4).reshape(1, 4)
    keys, pieces = np.array([1, 0, 1]), np.array([2, 1, 0])
    for _ in range(3):
        table.update(rows, hyper)
        launches = table.chunks("update", keys, pieces)
        scratch = table.scratch("scalars", 5, dtype=torch.float64)
    assert sizes == [4 + 128 * 8, 3, 3]
    table.update(rows, hyper + 1)
    assert table.chunks("update", keys, pieces) is launches
    assert table.scratch("scalars", 5, dtype=torch.float64) is scratch
    assert len(sizes) == 4


def test_tables_on_the_device_hold_what_was_given():
    table = LaunchTable(CPU)
    rows, numbers = np.arange(130 * 3).reshape(130, 3), [[0.1, float("-inf")], [2.0**-1000, 3.0]]
    table.update(rows, np.array(numbers))
    assert table.rows.shape == (256, 3)
    assert_same(table.rows[:130], torch.from_numpy(rows))
    assert not table.rows[130:].any()
    assert table.hyper.view(torch.float64).tolist() == numbers
    assert table.rows.data_ptr() % 16 == 0


def test_what_was_queued_is_not_written_again():
    table = LaunchTable(CPU)
    rows, hyper = np.ones((1, 8), np.int64), np.ones((1, 2), np.int64)
    table.update(rows, hyper)
    queued_rows, queued_hyper = table.rows, table.hyper
    (queued_chunks,) = table.chunks("update", np.zeros(1, np.int64), np.array([2])).values()
    table.update(2 * rows, 2 * hyper)
    table.chunks("update", np.zeros(1, np.int64), np.array([3]))
    assert queued_rows[0].eq(1).all() and queued_hyper.eq(1).all()
    assert queued_chunks.tolist() == [[0, 0], [0, 1]]


@given(st.lists(st.tuples(*[st.sampled_from((None, *FLOATS))] * 5, st.booleans()), min_size=1))
def test_a_launch_key_is_a_launch_class(rows):
    codes = [tables.dtype_codes(column) for column in list(zip(*rows))[:5]]
    keys = tables.launch_keys(codes, np.array([row[5] for row in rows]))
    assert [launch_class(key, 5) for key in keys.tolist()] == [LaunchClass(row[:5], row[5]) for row in rows]


def test_unknown_dtype():
    with pytest.raises(RuntimeError, match=r"torch\.int8 is no dtype that the kernels read"):
        tables.dtype_codes([torch.float32, torch.int8])


# One tensor per place of a row, anywhere in a pool of bytes: at any offset, of any dtype, freed and made again.

POOL = torch.zeros(1 << 12, dtype=torch.uint8)
WHERE = st.tuples(st.integers(0, 31), st.sampled_from(FLOATS), st.sampled_from((0, 1, 16, 17, 32)))


def placed(row, where, numel=None):
    """A tensor in the pool, the same memory for the same `where`, in a stretch of its own for each row."""
    place, dtype, own_numel = where
    size = own_numel if numel is None else numel
    start = row * 512 + 8 * place
    return POOL[start : start + size * dtype.itemsize].view(dtype)


CHANGES = st.tuples(st.integers(0, 3), st.sampled_from(("param", "grad", "no grad", "state", "state's data")), WHERE)


@settings(max_examples=50)
@given(st.lists(CHANGES, max_size=8))
def test_rows_never_remember_what_is_no_longer_so(changes):
    """After any change, rows that have seen the past are what the tensors say that are there now."""
    home = (0, torch.float32, 16)
    params = [torch.nn.Parameter(placed(row, home)) for row in range(4)]
    grads = [placed(row, home) for row in range(4)]
    states = [placed(row, home) for row in range(4)]
    rows = Rows()
    for row, what, where in changes:
        if what == "param":  # As model.half() and p.data = ... do: the Parameter stays, its memory does not.
            params[row].data = placed(row, where)
            grads[row], states[row] = placed(row, where), placed(row, where)
        elif what == "grad":
            grads[row] = placed(row, where, params[row].numel())
        elif what == "no grad":
            grads[row] = None
        elif what == "state":
            states[row] = placed(row, where, params[row].numel())
        else:
            states[row].data = placed(row, where, params[row].numel())
        rows.refresh(params, grads, states)
        assert rows.addresses.T.tolist() == [addresses(column) for column in (params, grads, states)]
        assert rows.numel.tolist() == [p.numel() for p in params]
        for key, p, g, s in zip(rows.keys.tolist(), params, grads, states):
            dtypes, even, *_ = launch_class(key, 3)
            assert (dtypes[0], dtypes[2]) == (p.dtype, s.dtype)
            assert dtypes[1] == g.dtype if g is not None else dtypes[1] is not None
            present = [t for t in (p, g, s) if t is not None]
            assert even == (p.numel() % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in present))


def test_a_state_that_did_not_follow_its_parameter_is_refused():
    """Its kernel would read and write beyond it."""
    p, state = torch.nn.Parameter(torch.zeros(16)), torch.zeros(16)
    rows = Rows()
    rows.refresh([p], [torch.zeros(16)], [state])
    p.data = torch.zeros(8, 4)
    with pytest.raises(RuntimeError, match=r"a state of shape \(16,\) on cpu belongs to a parameter of shape \(8, 4\)"):
        rows.refresh([p], [torch.zeros(8, 4)], [state])


@pytest.mark.parametrize("state", [torch.zeros(16, device="meta"), torch.zeros(17)], ids=["device", "size"])
def test_a_state_elsewhere_is_refused_whenever_it_is_put_there(state):
    p, g = torch.nn.Parameter(torch.zeros(16)), torch.zeros(16)
    rows = Rows()
    rows.refresh([p], [g], [torch.zeros(16)])
    with pytest.raises(RuntimeError, match="let it follow its parameter"):
        rows.refresh([p], [g], [state])


@pytest.mark.parametrize("step", [torch.tensor(1), torch.tensor(1.0), torch.tensor(1.0, device="meta")], ids=str)
def test_a_step_count_that_kernels_cannot_read_is_refused(step):
    p = torch.nn.Parameter(torch.zeros(16))
    rows = Rows()
    rows.refresh([p], [torch.zeros(16)])
    good = torch.tensor(1.0, dtype=COUNTS)
    assert rows.counts([good]) == rows.counts([good]) == [good.data_ptr()]
    with pytest.raises(RuntimeError, match=f"a step count is {step.dtype} on {step.device}"):
        rows.counts([step])


def test_a_gradient_is_not_kept_alive():
    p, g = torch.nn.Parameter(torch.zeros(16)), torch.zeros(16)
    here = weakref.ref(g)
    rows = Rows()
    rows.refresh([p], [g], [torch.zeros(16)])
    del g
    assert here() is None


def test_a_missing_gradient_leaves_the_launch_class_as_it_was():
    p = torch.nn.Parameter(torch.zeros(16))
    rows = Rows()
    rows.refresh([p], [torch.zeros(16, dtype=torch.bfloat16)])
    before = rows.keys.copy()
    rows.refresh([p], [None])
    assert rows.keys == before and rows.addresses.tolist() == [[p.data_ptr(), 0]]


def test_a_gradient_at_an_odd_address_is_not_aligned_any_more():
    p = torch.nn.Parameter(torch.zeros(16))
    bucket = torch.zeros(64)
    rows = Rows()
    for start, aligned in [(0, True), (1, False), (4, True), (2, False)]:
        rows.refresh([p], [bucket[start : start + 16]])
        assert launch_class(int(rows.keys[0]), 2).aligned == aligned


def test_tensors_without_elements_have_an_address_all_the_same():
    p = torch.nn.Parameter(torch.zeros(0))
    rows = Rows()
    rows.refresh([p], [torch.zeros(0)])
    assert (rows.addresses != 0).all()


@pytest.mark.parametrize("start", [0, 1, 20])
def test_a_view_into_memory_that_was_freed_has_no_address(start):
    whole = torch.ones(24)
    view, empty = whole[start : start + 4], whole[start:start]
    assert addresses([view, empty]) == address_column([view, empty]).tolist() == [whole.data_ptr() + 4 * start, 16]
    whole.untyped_storage().resize_(0)
    for found in addresses, address_column:
        assert list(found([empty])) == [16]
        with pytest.raises(RuntimeError, match=r"shape \(4,\) has no memory that a kernel could reach"):
            found([torch.ones(1), view])


def test_memory_may_lie_at_any_address(monkeypatch):
    """Even where all of it lies so low that it has to be told from views into what was freed."""
    monkeypatch.setattr(tables, "_LOW", 1 << 62)
    tensors = [torch.ones(3), torch.ones(5)[2:], torch.ones(4, dtype=torch.float64)[1:2]]
    for found in addresses, address_column:
        assert list(found(tensors)) == [t.data_ptr() for t in tensors]


def test_parameters_side_by_side_do_not_share_memory():
    whole = torch.zeros(30)
    parts = [whole[20:], whole[:0], whole[:10], whole[10:20]]
    Rows().refresh(parts, [torch.zeros_like(part) for part in parts])
    with pytest.raises(RuntimeError, match=r"\(10,\) and \(11,\)"):
        Rows().refresh([*parts[:3], whole[9:20]], [torch.zeros_like(part) for part in [*parts[:3], whole[9:20]]])
    Rows().refresh([*parts[:3], whole[9:20]], [*(torch.zeros_like(part) for part in parts[:3]), None])
