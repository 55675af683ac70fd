"""Lightning trains a tiny model as a plain loop does, and goes on from its own checkpoint."""

import copy
import itertools
import math

import pytest
import torch
from helpers.comparing import assert_near, assert_same, same
from helpers.loops import Net
from helpers.optimizers import VARIANTS
from helpers.trainers import QUIET, batches, loss_of

from fusedopt import AdamW, LRRecorder, get_scheduler

pytestmark = QUIET


@pytest.mark.parametrize("manual", [[], ["--manual"]], ids=["automatic", "manual"])
def test_lightning(example, manual):
    main = example("lightning_module", "pytorch_lightning").main
    model, losses = main(manual)
    assert losses[-1] < losses[0] / 2
    checkpoint = "runs/lightning/epoch=1.ckpt"
    assert torch.load(checkpoint, weights_only=True)["optimizer_states"]
    resumed, _ = main([*manual, "--resume", checkpoint])
    assert_same(model, resumed)


@pytest.mark.parametrize("name", VARIANTS)
def test_lightning_does_what_a_plain_loop_does(name, tmp_path):
    """Clipped by value; its closure computes the gradients inside of step()."""
    pl = pytest.importorskip("pytorch_lightning")
    plain = Net()
    optimizer = VARIANTS[name](plain)
    for x in batches(4):
        loss_of(plain, x).backward()
        torch.nn.utils.clip_grad_value_(plain.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, x, index):
            return loss_of(self.net, x)

        def configure_optimizers(self):
            return VARIANTS[name](self.net)

    module = Module()
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=0.01,
        gradient_clip_algorithm="value",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches(4), batch_size=None))
    assert_same(plain, module.net)
    assert_same(optimizer.state_dict(), trainer.optimizers[0].state_dict())


# AdamWeightDecay without Keras' clippings, which `max_grad_norm` excludes.
CLIPPING_BY_ITSELF = ["AdamW", "AdamW-torch-amsgrad", "AdamWeightDecay-function", "Adafactor", "Adafactor-lr-beta1"]
BOUND = 0.01


def loss_of_batch(index, model, x):
    """Infinite in the second batch; others differ in size, as Adam forgives a constant factor, one is not clipped."""
    return loss_of(model, x).float() * [1.0, math.inf, 10.0, 1e-3, 3.0][index]


def scaler_of_the_cpu():
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


def lightning_in_16_bits(folder, name, **options):
    """A Trainer of Lightning and a module. `precision="16-mixed"` makes this plugin on a GPU; a CPU has to be asked."""
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.seen = []  # after each batch: weights, state, scale and norm

        def training_step(self, x, index):
            return loss_of_batch(index, self.net, x)

        def configure_optimizers(self):
            return VARIANTS[name](self.net, max_grad_norm=BOUND)

        def on_train_batch_end(self, *_):
            optimizer, scaler = self.optimizers().optimizer, self.trainer.precision_plugin.scaler
            now = self.net.state_dict(), optimizer.state_dict()["state"], scaler.get_scale(), optimizer.grad_norm
            self.seen.append(copy.deepcopy(now))

    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        plugins=[pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler_of_the_cpu())],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    return trainer, Module()


@pytest.mark.parametrize("name", CLIPPING_BY_ITSELF)
def test_lightning_in_16_bits_does_what_a_plain_loop_does(name, tmp_path):
    """Unscaled and clipped inside the step; an overflow in the second of five batches changes nothing but the scale."""
    trainer, module = lightning_in_16_bits(tmp_path, name)
    trainer.fit(module, torch.utils.data.DataLoader(batches(5), batch_size=None))

    plain, outside = Net(), Net()
    optimizer = VARIANTS[name](plain, max_grad_norm=BOUND)
    unclipped = VARIANTS[name](outside)
    expected_norms = []
    for model, stepping in ((plain, optimizer), (outside, unclipped)):
        scaler = scaler_of_the_cpu()
        for index, x in enumerate(batches(5)):
            with torch.autocast("cpu", torch.half):
                loss = loss_of_batch(index, model, x)
            scaler.scale(loss).backward()
            if stepping is unclipped:
                scaler.unscale_(stepping)
                expected_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), BOUND))
            scaler.step(stepping)
            scaler.update()
            stepping.zero_grad()

    weights, states, scales, norms = zip(*module.seen)
    assert_same(plain, module.net)
    assert_same(optimizer.state_dict(), trainer.optimizers[0].state_dict())
    assert_near(module.net, outside, rtol=1e-4, atol=1e-5)  # 5e-8 apart; without clipping more than 5e-4
    assert [same(*pair) for pair in itertools.pairwise(weights)] == [True, False, False, False]
    assert [same(*pair) for pair in itertools.pairwise(states)] == [True, False, False, False]
    assert scales == (1024.0, 512.0, 512.0, 1024.0, 1024.0)
    assert [bool(norm > BOUND) for norm in norms] == [True, False, True, False, True]
    assert_near(torch.stack(norms).float(), torch.stack(expected_norms), rtol=1.3e-6, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("name", CLIPPING_BY_ITSELF)
def test_lightning_in_16_bits_refuses_to_clip_for_optimizers_that_unscale_by_themselves(name, algorithm, tmp_path):
    trainer, module = lightning_in_16_bits(tmp_path, name, gradient_clip_val=BOUND, gradient_clip_algorithm=algorithm)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trainer.fit(module, torch.utils.data.DataLoader(batches(1), batch_size=None))
    assert_same(module.net, Net())


@pytest.mark.parametrize("in_epochs", [False, True], ids=["per step", "per epoch"])
def test_greedy_in_lightning_is_stepped_with_the_metric_it_monitors(in_epochs, tmp_path):
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, x, index):
            loss = loss_of(self.net, x)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = AdamW(self.net.parameters(), lr=0.01)
            self.recorder = LRRecorder(optimizer)
            self.scheduler = get_scheduler(
                "greedy", optimizer, scheduler_specific_kwargs={"patience": 0, "factor": 0.5}
            )
            interval = "epoch" if in_epochs else "step"
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": self.scheduler, "monitor": "train_loss", "interval": interval},
            }

        def on_train_start(self):
            self.prepared = self.optimizers()
            self.outer = LRRecorder(self.prepared)
            assert self.lr_schedulers() is self.scheduler

    module = Module()
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches(4), batch_size=None))
    assert module.scheduler.last_epoch == (2 if in_epochs else 8)
    assert {*module.scheduler.get_last_lr(), *module.outer.rates[:, 0].tolist()} != {0.01}
    assert module.outer.rates.tolist() == module.recorder.rates.tolist() and len(module.outer) == 8
