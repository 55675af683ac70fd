"""Accelerate: gradients summed over micro-batches, clipped by their common norm, and a state to go on from.

python examples/accelerate_loop.py
python examples/accelerate_loop.py --resume runs/accelerate/epoch_2
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

from fusedopt import AdamW, get_linear_schedule_with_warmup


def main(arguments: list[str] | None = None) -> tuple[torch.nn.Module, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4, help="of 8 steps each, with 2 micro-batches per step")
    parser.add_argument("--folder", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--resume", type=Path, help="a state folder of an earlier run")
    options = parser.parse_args(arguments)

    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    x = torch.linspace(-3, 3, 256).unsqueeze(1)
    loader = DataLoader(TensorDataset(x, x.sin()), batch_size=16, shuffle=True)
    model = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=8 * options.epochs)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    first, losses = 0, []
    if options.resume:
        accelerator.load_state(options.resume)
        first = int(options.resume.name.removeprefix("epoch_"))

    for epoch in range(first + 1, options.epochs + 1):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = (model(inputs) - targets).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        accelerator.save_state(options.folder / f"epoch_{epoch}")
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} micro-batches")
    return accelerator.unwrap_model(model), losses


if __name__ == "__main__":
    main()
