"""Real trainers train a tiny model on the CPU and go on, bit for bit, from their own checkpoint."""

import copy
import importlib
import importlib.metadata
import itertools
import math
from pathlib import Path

import pytest
import torch
from helpers.comparing import assert_near, assert_same, same
from helpers.loops import Net
from helpers.optimizers import VARIANTS

from fusedopt import (
    Adafactor,
    AdafactorSchedule,
    AdamW,
    AdamWeightDecay,
    LinearSchedule,
    LRRecorder,
    create_optimizer,
    get_scheduler,
    plot_schedule,
    plot_verification,
    register_step_in_backward,
    verify_schedule,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
]

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Imports an example script by name; files that it writes by default stay in the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)

    def load(name, package):
        pytest.importorskip(package, reason=f"{package} is not installed")
        return importlib.import_module(name)

    return load


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        *("plain_pytorch", "transformers_trainer", "accelerate_loop", "lightning_module", "sick_layer")
    }


def test_plain_pytorch(example, capsys):
    main = example("plain_pytorch", "torch").main
    model, losses = main(["--save-every", "15"])
    assert losses[-1] < losses[0] / 5
    resumed, same_losses = main(["--resume", "runs/plain/step_15.pt"])
    assert_same(model, resumed)
    assert losses == same_losses
    assert capsys.readouterr().out.count("in 40 steps") == 2


@pytest.mark.parametrize(
    ("sick", "times"),
    [
        (None, None),
        ("blocks.layers.1.linear2.weight", 0.02),
        ("blocks.layers.0.self_attn.out_proj.weight", 50),
        ("blocks.layers.2.norm1.weight", 50),
    ],
)
def test_sick_layer(example, capsys, sick, times):
    main = example("sick_layer", "torch").main
    planted = ["--sick", sick, "--times", str(times)] if sick else []
    recorder = main(["--steps", "12", "--picture", "runs/statistics.png", *planted])
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.startswith("parameter") and first.startswith(sick or "blocks.layers.2.linear1.weight ")
    assert "× " in first
    assert len(recorder.steps) == 12 and Path("runs/statistics.png").stat().st_size > 0


def trainer_run(example, *arguments):
    main = example("transformers_trainer", "transformers").main
    return main(["--steps", "30", "--save-every", "15", *arguments])


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_transformers_trainer(example, optimizer):
    model, history = trainer_run(example, "--optimizer", optimizer)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
    resumed, _ = trainer_run(example, "--optimizer", optimizer, "--resume", "runs/trainer/checkpoint-15")
    assert_same(model, resumed)


def counting_trainer(example, folder, model=None, **options):
    """A Trainer on the example's data, with an optimizer of its own."""
    module = example("transformers_trainer", "transformers")
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    settings = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "learning_rate": 0.01, "weight_decay": 0.1}
    module.set_seed(0)
    model = model or module.GPT2LMHeadModel(module.GPT2Config(vocab_size=32, bos_token_id=0, eos_token_id=0, **size))
    arguments = module.TrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, **settings, **options.pop("settings", {})
    )
    return module.Trainer(model, arguments, train_dataset=module.counting(24), **options)


def test_adafactor_schedule_in_the_transformers_trainer_with_lr_none(example, tmp_path):
    """As the documentation of the original shows it: the rates that are logged are those that Adafactor makes."""
    trainer = counting_trainer(example, tmp_path)
    optimizer = Adafactor(
        trainer.model.parameters(), scale_parameter=True, relative_step=True, warmup_init=True, lr=None
    )
    trainer = counting_trainer(example, tmp_path, trainer.model, optimizers=(optimizer, AdafactorSchedule(optimizer)))
    trainer.train()
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    first = next(iter(optimizer.param_groups[0]["params"]))
    # The Trainer notes the rate ahead of the scheduler's step, so what the optimizer made comes one entry later.
    assert len(logged) == 6 and logged[0] == 0.0 and logged[1:] == sorted(logged[1:]) and logged[1] > 0.0
    assert trainer.lr_scheduler.get_last_lr() == [pytest.approx(optimizer.effective_lr(first), rel=1e-6)]
    assert trainer.lr_scheduler.get_last_lr()[0] > logged[-1]
    assert optimizer.state[first]["step"] == 6


@pytest.mark.parametrize(
    "cls, options",
    [
        (AdamW, {"lr": 0.01, "convention": "torch", "eps": 1e-8}),
        (AdamWeightDecay, {"learning_rate": 0.01}),
        (Adafactor, {"lr": 0.01, "relative_step": False, "scale_parameter": False}),
    ],
    ids=["AdamW", "AdamWeightDecay", "Adafactor"],
)
def test_optimizer_cls_and_kwargs(example, tmp_path, cls, options):
    """The Trainer makes two groups of its own, and its own schedule."""
    trainer = counting_trainer(example, tmp_path, optimizer_cls_and_kwargs=(cls, options))
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is cls and [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    resumed = counting_trainer(example, tmp_path, optimizer_cls_and_kwargs=(cls, dict(options)))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(trainer.model, resumed.model)
    assert_same(optimizer.state_dict(), resumed.optimizer.optimizer.state_dict())


def test_our_adamw_is_the_trainers_own(example, tmp_path):
    """With the torch convention and the same options, nothing changes but the last bits."""
    options = {"lr": 0.01, "convention": "torch", "eps": 1e-8}
    ours = counting_trainer(example, tmp_path, optimizer_cls_and_kwargs=(AdamW, options))
    ours.train()
    theirs = counting_trainer(example, tmp_path)
    theirs.train()
    assert_near(ours.model, theirs.model, rtol=1e-4, atol=1e-5)  # six steps of 0.01; Adam's first ones amplify


def test_a_step_in_backward_in_the_transformers_trainer(example, tmp_path):
    """Without the Trainer's clipping, which would find no gradients."""
    runs = []
    for in_backward in (False, True):
        trainer = counting_trainer(example, tmp_path)
        model = trainer.model
        optimizer = AdamW(model.parameters(), lr=0.01)
        if in_backward:
            register_step_in_backward(optimizer, model)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
        optimizers = (optimizer, scheduler)
        counting_trainer(example, tmp_path, model, optimizers=optimizers, settings={"max_grad_norm": 0.0}).train()
        runs.append((model, optimizer))
    assert_same(runs[0][0], runs[1][0])
    assert_same(runs[0][1].state_dict(), runs[1][1].state_dict())


def test_accumulation_with_a_step_in_backward_is_refused_in_the_transformers_trainer(example, tmp_path):
    model = counting_trainer(example, tmp_path).model
    optimizer = AdamW(model.parameters(), lr=0.01)
    register_step_in_backward(optimizer, model)
    optimizers = (optimizer, torch.optim.lr_scheduler.LinearLR(optimizer))
    trainer = counting_trainer(
        example, tmp_path, model, optimizers=optimizers, settings={"gradient_accumulation_steps": 2}
    )
    with pytest.raises(RuntimeError, match=r"got a second gradient before step\(\)"):
        trainer.train()


def batches(number):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 4, 5, generator=generator)


def loss_of(model, x):
    return model(x).square().mean()


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


@pytest.mark.parametrize("wrapper", ["accelerate", "lightning"])
def test_wrapped_optimizers_are_unwrapped_for_a_step_in_backward(wrapper):
    model = torch.nn.Linear(2, 1)
    optimizer = AdamW(model.parameters())
    if wrapper == "accelerate":
        wrapped = pytest.importorskip("accelerate").Accelerator().prepare(optimizer)
    else:
        pytest.importorskip("pytorch_lightning")
        from pytorch_lightning.core.optimizer import LightningOptimizer

        wrapped = LightningOptimizer(optimizer)
    register_step_in_backward(wrapped, model)
    model(torch.ones(2)).sum().backward()
    assert model.weight.grad is None and optimizer.state[model.weight]["step"] == 1


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


def test_a_rate_that_is_a_function_of_the_step_and_the_trainers_schedule_exclude_each_other(example, tmp_path):
    """The Trainer makes a schedule where it gets none."""
    model = counting_trainer(example, tmp_path).model
    optimizer = VARIANTS["AdamWeightDecay-function"](model, decay=0.0)
    with pytest.raises(ValueError, match="learning_rate is a function of the step"):
        counting_trainer(example, tmp_path, model, optimizers=(optimizer, None)).train()


def test_the_folder_of_the_kernels_is_not_taken_for_the_package_of_that_name():
    """transformers imports a package `kernels` where there is one; ours is a folder on the way to fusedopt_kernels."""
    pytest.importorskip("transformers")
    from transformers.utils import import_utils

    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        assert not import_utils.is_kernels_available()


def test_a_trainer_that_resumes_with_more_steps_follows_the_longer_schedule(example, tmp_path):
    rates = {}
    for steps, checkpoint in ((6, None), (12, str(tmp_path / "checkpoint-6"))):
        model = counting_trainer(example, tmp_path).model
        optimizer = AdamW(model.parameters(), lr=0.01)
        scheduler = get_scheduler("linear", optimizer, 2, steps)
        recorder = LRRecorder(optimizer, first_step=0 if checkpoint is None else 6)
        trainer = counting_trainer(example, tmp_path, model, optimizers=(optimizer, scheduler))
        trainer.args.max_steps = steps
        trainer.train(resume_from_checkpoint=checkpoint)
        rates[steps] = recorder.rates[:, 0].tolist()
    schedule = LinearSchedule(2, 12)
    # The first step has the rate of the optimizer's checkpoint, as with transformers' own schedules.
    assert rates[12] == pytest.approx([0.0, *[0.01 * schedule(step) for step in range(7, 12)]])


@pytest.mark.parametrize("name", ["greedy", "reduce_lr_on_plateau"])
def test_schedulers_driven_by_a_metric_in_the_transformers_trainer(example, tmp_path, name):
    def run(checkpoint=None):
        model = counting_trainer(example, tmp_path).model
        optimizer = AdamW(model.parameters(), lr=0.001)
        kwargs = {"patience": 0, "factor": 0.5, **({"min_lr": 1e-6} if name == "greedy" else {"threshold": 10.0})}
        scheduler = get_scheduler(name, optimizer, scheduler_specific_kwargs=kwargs)
        settings = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "eval_loss"}
        data = example("transformers_trainer", "transformers").counting(8)
        trainer = counting_trainer(
            example, tmp_path, model, optimizers=(optimizer, scheduler), eval_dataset=data, settings=settings
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return model, scheduler

    model, scheduler = run()
    assert scheduler.last_epoch == 2 and scheduler.get_last_lr() != [0.001]
    resumed, again = run(str(tmp_path / "checkpoint-3"))
    assert_same(model, resumed)
    assert again.state_dict() == scheduler.state_dict()


def test_create_optimizers_pair_in_the_transformers_trainer(example, tmp_path):
    def run(checkpoint=None):
        model = counting_trainer(example, tmp_path).model
        optimizer, schedule = create_optimizer(model, 0.01, 6, 2, weight_decay_rate=0.01)
        trainer = counting_trainer(example, tmp_path, model, optimizers=(optimizer, schedule))
        trainer.train(resume_from_checkpoint=checkpoint)
        logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
        assert logged == pytest.approx([schedule(step) for step in range(6)])
        return model, optimizer

    model, optimizer = run()
    resumed, again = run(str(tmp_path / "checkpoint-3"))
    assert_same(model, resumed)
    assert_same(optimizer.state_dict(), again.state_dict())


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
