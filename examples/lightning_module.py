"""Lightning: an optimizer and a schedule from configure_optimizers, with automatic or manual optimization.

python examples/lightning_module.py
python examples/lightning_module.py --manual
python examples/lightning_module.py --resume runs/lightning/epoch=1.ckpt
"""

import argparse
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from fusedopt import AdamW, get_cosine_schedule_with_warmup


class Sine(pl.LightningModule):
    def __init__(self, steps: int, manual: bool) -> None:
        super().__init__()
        self.steps, self.automatic_optimization, self.losses = steps, not manual, []
        self.net = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=1e-2, weight_decay=0.01)
        scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            optimizer, scheduler = self.optimizers(), self.lr_schedulers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            scheduler.step()
        return loss


def main(arguments: list[str] | None = None) -> tuple[torch.nn.Module, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4, help="of 8 steps each")
    parser.add_argument("--manual", action="store_true", help="call backward and step in training_step")
    parser.add_argument("--folder", default="runs/lightning")
    parser.add_argument("--resume", help="a checkpoint of an earlier run")
    options = parser.parse_args(arguments)

    pl.seed_everything(0, verbose=False)
    x = torch.linspace(-3, 3, 256)[torch.randperm(256)].unsqueeze(1)
    model = Sine(8 * options.epochs, options.manual)
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        gradient_clip_val=None if options.manual else 1.0,
        callbacks=[pl.callbacks.ModelCheckpoint(options.folder, "{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(x, x.sin()), batch_size=32), ckpt_path=options.resume)
    print(f"loss {model.losses[0]:.4f} -> {model.losses[-1]:.4f} in {len(model.losses)} steps")
    return model, model.losses


if __name__ == "__main__":
    main()
