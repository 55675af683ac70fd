"""Trains one model twice on the same batches: with the original's optimizer loop and with ours."""

import copy
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fusedopt import backends
from fusedopt.demo.checkpoint import check_same_run, load_checkpoint, reading, save_checkpoint
from fusedopt.demo.model import GPT
from fusedopt.demo.settings import CHECKPOINT, CONTEXT, METRICS, OPTIMIZERS, Settings
from fusedopt.demo.text import Text, read_text
from fusedopt.files import append, write_atomically
from fusedopt.schedules import example_arguments, get_scheduler
from fusedopt.statistics.recorder import StatisticsRecorder

MEASURE_EVERY = 25
"""Steps between two measurements of the validation loss, for runs of any length: a longer one repeats a shorter."""

HELD_OUT_WINDOWS = 64
"""Windows of CONTEXT bytes per measurement, always the same ones; it takes about as long as a training step."""

WARMUP_SHARE = 0.1
"""Fraction of the steps in the warm-up of schedules that have one."""

STATISTICS_EVERY, STATISTICS_STEPS = 5, 100
"""Least steps from one with statistics to the next, and most such steps: the median time is that of the others."""


class Outcome(NamedTuple):
    """The result of a run of the demo."""

    settings: Settings
    parameters: int
    tensors: int
    context: int
    """Bytes per window."""
    backend: str
    """The one of our optimizer."""
    records: list[dict[str, Any]]
    """One per step and run, as in metrics.jsonl."""
    statistics: StatisticsRecorder | None = None
    """What our optimizer did to each parameter in the steps of this run; None if nobody asked, or if there was none."""


class Run:
    """One of the two trainings: a model, its optimizer, and a scheduler unless the optimizer has a rate of its own."""

    def __init__(
        self, name: str, model: GPT, make: Callable[..., Optimizer], settings: Settings, track_statistics: int = 0
    ) -> None:
        self.name = name
        self.model = model
        choice, lr, schedule = OPTIMIZERS[settings.optimizer], settings.learning_rate, settings.schedule_name
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        # Norms and biases do not decay.
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        options = {choice.lr_name: lr, **choice.options}
        if track_statistics:
            options["track_statistics"] = track_statistics
        self.optimizer = make(groups, **options)
        if track_statistics:
            names = {p: name for name, p in model.named_parameters()}
            for group in self.optimizer.param_groups:
                group["param_names"] = [names[p] for p in group["params"]]
        self.scheduler: Any = None
        if schedule is not None and lr is not None:
            self.scheduler = get_scheduler(
                schedule,
                self.optimizer,
                num_warmup_steps=round(WARMUP_SHARE * settings.steps),
                num_training_steps=settings.steps,
                scheduler_specific_kwargs=example_arguments(schedule, settings.steps, lr),
            )

    @property
    def lr(self) -> float | None:
        """The rate of the next step; None if the optimizer has one of its own."""
        lr = self.optimizer.param_groups[0]["lr"]
        return None if lr is None else float(lr)

    def advance_schedule(self, train_loss: float) -> None:
        if isinstance(self.scheduler, LambdaLR):
            self.scheduler.step()
        elif self.scheduler is not None:
            self.scheduler.step(train_loss)

    def state_dict(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues `state`, from now on with the rates of this run's schedule, which may be longer."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if isinstance(self.scheduler, LambdaLR):
            for group, factor in zip(self.optimizer.param_groups, self.scheduler.lr_lambdas):
                group["lr"] = group["initial_lr"] * factor(self.scheduler.last_epoch)


def train(settings: Settings, *, resume: bool = False, statistics: bool = False) -> Outcome:
    """Trains both runs side by side, step by step, and leaves metrics.jsonl and checkpoint.pt in `settings.out`.

    Args:
        settings: of the run.
        resume: True to go on from the checkpoint in `settings.out`, bit for bit as if the run had not stopped. With
            more `steps` than before, rates follow the schedule of the longer run from here on.
        statistics: True to keep those of every fifth step of our optimizer, of fewer in runs of more than 500 steps;
            checkpoints are without.

    Raises:
        ValueError: the text cannot be used, or the checkpoint is missing, unreadable or of another run.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tiny = Settings(steps=2, batch_size=2, layers=1, width=8, device="cpu", out=folder)
        ...     [(record["run"], record["step"]) for record in train(tiny).records]
        [('eager', 1), ('fused', 1), ('eager', 2), ('fused', 2)]
    """
    from tqdm import tqdm

    device, out = settings.torch_device, Path(settings.out)
    content = read_text(settings.text)
    identity = {**settings.identity(), "text": hashlib.sha256(content).hexdigest()}

    # Both runs share text, batches and first weights, drawn on the CPU so that a seed means the same on every device.
    text = Text(content, CONTEXT)
    held_out = [part.to(device) for part in text.held_out(HELD_OUT_WINDOWS)]
    batches = torch.Generator("cpu").manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = GPT(settings.layers, settings.width, CONTEXT)
    model.to(device, getattr(torch, settings.dtype))

    # They differ in their optimizer.
    choice = OPTIMIZERS[settings.optimizer]
    every = max(STATISTICS_EVERY, -(-settings.steps // STATISTICS_STEPS)) if statistics else 0
    runs = [
        Run("eager", copy.deepcopy(model), choice.reference, settings),
        Run("fused", model, choice.ours, settings, every),
    ]

    # The first step, or the one after the checkpoint's. Records of later steps are dropped.
    done, records = 0, []
    if resume:
        checkpoint = load_checkpoint(out / CHECKPOINT)
        check_same_run(checkpoint, identity, settings.steps)
        done, records = checkpoint["step"], checkpoint["records"]
        with reading(out / CHECKPOINT):
            batches.set_state(checkpoint["batches"])
            for run in runs:
                run.load_state_dict(checkpoint["runs"][run.name])
    recorder = StatisticsRecorder(runs[1].optimizer, first_step=done + 1) if statistics else None
    out.mkdir(parents=True, exist_ok=True)
    if not resume:  # This run may be interrupted before its first checkpoint: an earlier run's must not be resumed.
        (out / CHECKPOINT).unlink(missing_ok=True)
    write_atomically(out / METRICS, lambda file: file.writelines(map(_line, records)))

    with (
        deterministic(device),
        open(out / METRICS, "ab", buffering=0) as log,  # no step is lost by a crash or Ctrl-C
        tqdm(total=settings.steps, initial=done, unit="step", mininterval=0.5, dynamic_ncols=True) as bar,
    ):
        for step in range(done + 1, settings.steps + 1):
            drawn = [text.batch(settings.batch_size, batches) for _ in range(settings.accumulate)]
            micro_batches = [(tokens.to(device), targets.to(device)) for tokens, targets in drawn]
            for run in runs:
                # Forward and backward. The loss stays on the device until the step is done.
                loss_sum = torch.zeros((), dtype=torch.float32, device=device)
                for tokens, targets in micro_batches:
                    loss = run.model.loss(tokens, targets) / settings.accumulate
                    loss.backward()
                    loss_sum = loss_sum + loss.detach()

                # The step. On a GPU both readings of the clock wait for the device, so that the time is the step's
                # with its launches; `.item()` waits after it.
                lr = run.lr
                began = clock(device)
                run.optimizer.step()
                optimizer_ms = 1e3 * (clock(device) - began)
                run.optimizer.zero_grad(set_to_none=True)
                train_loss = loss_sum.item()

                # The record.
                record = {"run": run.name, "step": step, "train_loss": train_loss}
                if step == 1 or step % MEASURE_EVERY == 0 or step == settings.steps:
                    record["val_loss"] = validation_loss(run.model, *held_out)
                records.append({**record, "lr": lr, "optimizer_ms": optimizer_ms})
                append(log, _line(records[-1]))
                run.advance_schedule(train_loss)

            bar.set_postfix_str("loss " + ", ".join(f"{r['run']} {r['train_loss']:.4f}" for r in records[-2:]), False)
            bar.update()
            if step == settings.steps or (settings.checkpoint_every and step % settings.checkpoint_every == 0):
                checkpoint = {
                    "settings": asdict(settings),
                    "identity": identity,
                    "step": step,
                    "records": records,
                    "batches": batches.get_state(),
                    "runs": {run.name: run.state_dict() for run in runs},
                }
                save_checkpoint(out / CHECKPOINT, checkpoint)

    parameters = list(model.parameters())
    backend = backends.choose(device)
    kept = recorder if recorder is not None and len(recorder.steps) else None
    return Outcome(settings, sum(p.numel() for p in parameters), len(parameters), CONTEXT, backend, records, kept)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


@torch.no_grad()
def validation_loss(model: GPT, tokens: Tensor, targets: Tensor) -> float:
    return model.loss(tokens, targets).item()


def clock(device: torch.device) -> float:
    """Returns the time in seconds, after all work of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Makes a GPU deterministic: the runs then differ only in their optimizer, and resume bit for bit."""
    if device.type != "cuda":
        yield
        return
    # cuBLAS reads this at its first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling new tensors with NaN would add to the time of optimizers that make temporaries.
    options.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        options.fill_uninitialized_memory = before[1]
