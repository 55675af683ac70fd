"""A layer with a bad start in a small transformer: the table names it first, the picture shows it.

python examples/sick_layer.py
python examples/sick_layer.py --sick blocks.layers.1.linear2.weight --times 0.02
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from fusedopt import AdamW, StatisticsRecorder


class Transformer(nn.Module):
    """Predicts the next of 32 numbers."""

    def __init__(self, layers: int, width: int = 32) -> None:
        super().__init__()
        self.numbers = nn.Embedding(32, width)
        nn.init.normal_(self.numbers.weight, std=0.1)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.blocks(self.numbers(tokens), mask=mask, is_causal=True))


def main(arguments: list[str] | None = None) -> StatisticsRecorder:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sick", default="blocks.layers.2.linear1.weight", help="the parameter with a bad start")
    parser.add_argument("--times", type=float, default=50.0, help="what its first weights are multiplied by")
    parser.add_argument("--picture", type=Path, default=Path("runs/statistics.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = Transformer(options.layers)
    with torch.no_grad():
        model.get_parameter(options.sick).mul_(options.times)
    # Sequences that count upwards from somewhere, in steps of one to three.
    start, stride = torch.arange(64).unsqueeze(1) * 7, torch.arange(64).unsqueeze(1) % 3 + 1
    sequences = (start + stride * torch.arange(17)) % 32

    optimizer = AdamW(model.named_parameters(), lr=1e-3, track_statistics=True)
    recorder = StatisticsRecorder(optimizer)
    for _ in range(options.steps):
        logits = model(sequences[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    print(optimizer.statistics.table(rows=5))
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    recorder.plot(options.picture)
    return recorder


if __name__ == "__main__":
    main()
