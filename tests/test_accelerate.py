"""Accelerate trains a tiny model as a plain loop does, and goes on from its own checkpoint."""

import pytest
import torch
from helpers.comparing import assert_same
from helpers.loops import Net
from helpers.optimizers import VARIANTS
from helpers.trainers import QUIET, batches, loss_of

from fusedopt import (
    Adafactor,
    AdafactorSchedule,
    AdamW,
    LRRecorder,
    get_scheduler,
    plot_schedule,
    plot_verification,
    verify_schedule,
)

pytestmark = QUIET


@pytest.mark.parametrize("name", VARIANTS)
def test_accelerate_does_what_a_plain_loop_does(name):
    """Two micro-batches per step, clipped by their common norm."""
    accelerate = pytest.importorskip("accelerate")
    plain = Net()
    optimizer = VARIANTS[name](plain)
    for pair in batches(6).split(2):
        for x in pair:
            (loss_of(plain, x) / 2).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = Net()
    other = VARIANTS[name](net)
    model, wrapped = accelerator.prepare(net, other)
    for x in batches(6):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, x))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            wrapped.step()
            wrapped.zero_grad()
    assert_same(plain, net)
    assert_same(optimizer.state_dict(), other.state_dict())


def test_accelerate(example):
    main = example("accelerate_loop", "accelerate").main
    model, losses = main([])
    assert losses[-1] < losses[0] / 5
    resumed, _ = main(["--resume", "runs/accelerate/epoch_2"])
    assert_same(model, resumed)


def test_what_accelerate_prepared_is_taken_wherever_the_thing_itself_is():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = Net()
    optimizer = AdamW(net.parameters(), lr=0.01)
    scheduler = get_scheduler("cosine", optimizer, 2, 10)
    model, wrapped, wrapped_scheduler = accelerator.prepare(net, optimizer, scheduler)
    recorder = LRRecorder(wrapped)
    for x in batches(8):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, x))
            wrapped.step()
            wrapped_scheduler.step()
            wrapped.zero_grad()
    assert len(recorder) == 4 and verify_schedule(recorder, wrapped_scheduler).ok
    figures = [plot_schedule(wrapped_scheduler), plot_schedule([wrapped_scheduler, "inverse_sqrt"], num_warmup_steps=2)]
    figures.append(plot_verification(recorder, wrapped_scheduler))
    assert all(figure.axes for figure in figures)
    again = get_scheduler("linear", wrapped, 2, 20)
    again.load_state_dict(get_scheduler("linear", wrapped, 2, 10).state_dict())
    assert again.lr_lambdas[0].num_training_steps == 20
    adafactor = Adafactor(Net().parameters())
    assert AdafactorSchedule(accelerator.prepare(adafactor)).optimizer is adafactor


def test_a_scheduler_prepared_by_accelerate_resumes_with_more_steps(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    for steps in (4, 8):
        accelerator = accelerate.Accelerator(cpu=True)
        net = Net()
        optimizer = AdamW(net.parameters(), lr=0.01)
        scheduler = get_scheduler("linear", optimizer, 0, steps)
        model, wrapped, wrapped_scheduler = accelerator.prepare(net, optimizer, scheduler)
        if steps == 8:
            accelerator.load_state(str(tmp_path / "state"))
        for x in batches(4):
            accelerator.backward(loss_of(model, x))
            wrapped.step()
            wrapped_scheduler.step()
            wrapped.zero_grad()
            if steps == 8 and scheduler.last_epoch == 5:
                assert scheduler.get_last_lr() == [pytest.approx(0.01 * 3 / 8)]
        accelerator.save_state(str(tmp_path / "state"))
    assert scheduler.last_epoch == 8
