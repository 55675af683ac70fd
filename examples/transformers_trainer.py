"""The Trainer of transformers: Adafactor with relative steps, and the schedule that shows the rates it makes.

python examples/transformers_trainer.py
python examples/transformers_trainer.py --optimizer adamw
python examples/transformers_trainer.py --resume runs/trainer/checkpoint-20
"""

import argparse
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from fusedopt import Adafactor, AdamW, decay_groups, get_linear_schedule_with_warmup
from fusedopt.adafactor_schedule import AdafactorSchedule


def counting(number: int, length: int = 16, vocabulary: int = 32) -> list[dict[str, torch.Tensor]]:
    """Sequences that count upwards from somewhere, in steps of one to three."""
    start, stride = torch.arange(number).unsqueeze(1) * 7, torch.arange(number).unsqueeze(1) % 3 + 1
    tokens = (start + stride * torch.arange(length)) % vocabulary
    return [{"input_ids": row, "labels": row} for row in tokens]


def main(arguments: list[str] | None = None) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=["adafactor", "adamw"], default="adafactor")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--folder", default="runs/trainer")
    parser.add_argument("--resume", help="a checkpoint folder of an earlier run")
    options = parser.parse_args(arguments)

    set_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, bos_token_id=0, eos_token_id=0, **size))
    if options.optimizer == "adafactor":
        optimizer = Adafactor(model.parameters(), scale_parameter=True, relative_step=True, warmup_init=False, lr=None)
        scheduler = AdafactorSchedule(optimizer)
    else:
        optimizer = AdamW(decay_groups(model, weight_decay=0.01, report=None), lr=1e-2)
        scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=options.steps)
    settings = TrainingArguments(
        options.folder,
        max_steps=options.steps,
        per_device_train_batch_size=16,
        logging_steps=5,
        save_steps=options.save_every,
        report_to="none",
    )
    trainer = Trainer(model, settings, train_dataset=counting(96), optimizers=(optimizer, scheduler))
    trainer.train(resume_from_checkpoint=options.resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
    return model, trainer.state.log_history


if __name__ == "__main__":
    main()
