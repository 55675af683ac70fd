"""Records: one declaration of what is in a table, for the host and the kernels."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fusedopt_kernels.record import ADDRESS, FLOAT, INTEGER, NUMBER, TENSOR, Record, cells, copied

ROOT = Path(__file__).parent.parent

STEPS = """
import hashlib, sys
import fusedopt_kernels.record as record

if sys.argv[1] == "inserted":
    made = record.Record.__init__

    def with_one_more(self, **fields):
        half = len(fields) // 2
        some = list(fields.items())
        made(self, **dict(some[:half]), inserted=record.NUMBER, **dict(some[half:]))

    record.Record.__init__ = with_one_more

import torch
from fusedopt import Adafactor, AdamW, Lion
from fusedopt.accumulate import GradientAccumulator

torch.manual_seed(0)
bits, places = hashlib.sha256(), []
for make, options in (
    (AdamW, {"amsgrad": True, "weight_decay": 0.1, "lr": torch.tensor(0.1), "max_grad_norm": 1.0}),
    (AdamW, {"convention": "keras", "skip_nonfinite": True}),
    (Adafactor, {"beta1": 0.9, "weight_decay": 0.1}),
    (Lion, {"weight_decay": 0.1, "maximize": True}),
    (Adafactor, {"lr": 0.1, "relative_step": False, "scale_parameter": False}),
):
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 40), (7,), (4, 3, 3, 3), (16,))]
    optimizer = make(params, backend="triton", **options)
    accumulator = GradientAccumulator(backend="triton")
    for _ in range(2):
        accumulator([torch.randn_like(p) for p in params], weight=0.5)
        accumulator([torch.randn_like(p) for p in params], weight=2)
        optimizer.apply_gradients(zip(accumulator.gradients, params), scale=accumulator.scale)
        accumulator.reset()
    for p in params:
        for t in (p.detach(), *optimizer.state[p].values()):
            bits.update(t.numpy().tobytes())
    bits.update(repr(optimizer.grad_norm).encode())
    places += [stepper.row.places[-2] for stepper in optimizer._engine.steppers.values() if hasattr(stepper, "row")]
print(bits.hexdigest(), *places)
"""


def steps(which):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-W", "ignore", "-c", STEPS, which]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_a_field_inserted_in_the_middle_of_every_record_changes_no_number():
    (bits, *places), (others, *moved) = steps("as it is"), steps("inserted")
    assert bits == others
    assert [int(place) for place in moved] == [int(place) + 3 for place in places]  # of the last field


def test_the_host_and_a_kernel_see_the_same_cells():
    record = Record(grad=TENSOR, lr=NUMBER, decay=FLOAT, step=ADDRESS, numel=INTEGER)
    rows = record.rows(2)
    rows["lr"] = 0.5, 0, 48
    rows["decay"] = 0.25
    rows["numel"] = 7, 8
    (first, _), at = cells(rows), record.places
    assert first[[at.lr, at.decay]].view(np.float64).tolist() == [0.5, 0.25]
    assert first[[at.grad, at.lr + 1, at.lr + 2, at.step, at.numel]].tolist() == [0, 0, 48, 0, 7]
    assert cells(rows)[1, at.numel] == 8
    assert cells(rows).shape == (2, at.length) and at.length % 16 == 0
    assert record.tensors == ("grad",)
    assert torch.from_numpy(cells(rows)).dtype is torch.int64


def test_a_copy_of_rows_has_all_their_cells():
    """Rows that are the same are so to the last cell, or they would go to the device again."""
    rows = Record(numel=INTEGER).rows(3)
    cells(rows)[...] = 7
    copy = copied(rows)
    rows["numel"] = 0
    assert (cells(copy) == 7).all()
