"""The Trainer of transformers and a plain loop train a tiny model and go on, bit for bit, from their own checkpoint."""

import importlib
import importlib.metadata
from pathlib import Path

import pytest
import torch
from helpers.comparing import assert_near, assert_same
from helpers.optimizers import VARIANTS
from helpers.trainers import QUIET

from fusedopt import (
    Adafactor,
    AdafactorSchedule,
    AdamW,
    AdamWeightDecay,
    LinearSchedule,
    LRRecorder,
    create_optimizer,
    get_scheduler,
    register_step_in_backward,
)

pytestmark = QUIET

EXAMPLES = Path(__file__).parent.parent / "examples"


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sick", "times"),
    [
        ("blocks.layers.1.linear2.weight", 0.02),
        pytest.param(None, None, marks=pytest.mark.slow),
        pytest.param("blocks.layers.0.self_attn.out_proj.weight", 50, marks=pytest.mark.slow),
        pytest.param("blocks.layers.2.norm1.weight", 50, marks=pytest.mark.slow),
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


@pytest.mark.parametrize("optimizer", ["adafactor", pytest.param("adamw", marks=pytest.mark.slow)])
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "cls, options",
    [
        (AdamW, {"lr": 0.01, "convention": "torch", "eps": 1e-8}),
        pytest.param(AdamWeightDecay, {"learning_rate": 0.01}, marks=pytest.mark.slow),
        pytest.param(Adafactor, {"lr": 0.01, "relative_step": False, "scale_parameter": False}, marks=pytest.mark.slow),
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


@pytest.mark.slow
def test_our_adamw_is_the_trainers_own(example, tmp_path):
    """With the torch convention and the same options, nothing changes but the last bits."""
    options = {"lr": 0.01, "convention": "torch", "eps": 1e-8}
    ours = counting_trainer(example, tmp_path, optimizer_cls_and_kwargs=(AdamW, options))
    ours.train()
    theirs = counting_trainer(example, tmp_path)
    theirs.train()
    assert_near(ours.model, theirs.model, rtol=1e-4, atol=1e-5)  # six steps of 0.01; Adam's first ones amplify


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", pytest.param("greedy", marks=pytest.mark.slow)])
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


@pytest.mark.slow
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
