"""Plain PyTorch: decay by kind of layer, a warm-up, clipping, and a checkpoint to go on from.

python examples/plain_pytorch.py
python examples/plain_pytorch.py --resume runs/plain/step_20.pt
"""

import argparse
from pathlib import Path

import torch

from fusedopt import AdamW, decay_groups, get_cosine_schedule_with_warmup


def main(arguments: list[str] | None = None) -> tuple[torch.nn.Module, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--folder", type=Path, default=Path("runs/plain"))
    parser.add_argument("--resume", type=Path, help="a checkpoint of an earlier run")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 64).unsqueeze(1)
    model = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    optimizer = AdamW(decay_groups(model, weight_decay=0.01, report=None), lr=1e-2)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=options.steps)
    first, losses = 0, []
    if options.resume:
        saved = torch.load(options.resume, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        first, losses = saved["step"], saved["losses"]

    for step in range(first + 1, options.steps + 1):
        loss = (model(x) - x.sin()).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % options.save_every == 0:
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            saved = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**saved, "step": step, "losses": losses}, options.folder / f"step_{step}.pt")
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
    return model, losses


if __name__ == "__main__":
    main()
