"""A small byte-level GPT, after nanoGPT: pre-norm blocks, learned positions, the embedding reused as output layer."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

BYTES = 256
"""The vocabulary: a token is a byte."""

_FACTORY: Any = {"dtype": torch.float32, "device": "cpu"}
"""How parameters are made, independent of torch's defaults: a seed means the same weights everywhere."""


class GPT(nn.Module):
    """Predicts the next byte from up to `context` bytes before it. Its parameters are float32, on the CPU.

    Args:
        layers: number of blocks.
        width: features per position; attention heads are 32 wide where that divides it.
        context: longest sequence, in bytes.

    Example:
        >>> import torch
        >>> model = GPT(layers=1, width=8, context=16)
        >>> text = torch.tensor([list(b"to be or not")])
        >>> model.loss(text[:, :-1], text[:, 1:]).shape
        torch.Size([])
    """

    def __init__(self, layers: int, width: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(BYTES, width, **_FACTORY)
        self.position = nn.Parameter(torch.empty(context, width, **_FACTORY))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width, **_FACTORY)
        # Residual branches start small, so that activations do not grow with the depth (GPT-2).
        for name, p in self.named_parameters():
            if p.dim() == 2:
                branch_end = name.endswith(("attend.weight", "shrink.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if branch_end else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits [batch, time, 256] for the byte after each of `tokens` [batch, time]."""
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean cross-entropy in nats per byte, computed in at least float32."""
        logits = self(tokens).flatten(0, 1)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return F.cross_entropy(logits, targets.flatten())


class Block(nn.Module):
    """Attention to earlier positions, then a network for each position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = next(n for n in range(max(1, width // 32), 0, -1) if width % n == 0)
        self.norm1 = nn.LayerNorm(width, **_FACTORY)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False, **_FACTORY)
        self.attend = nn.Linear(width, width, bias=False, **_FACTORY)
        self.norm2 = nn.LayerNorm(width, **_FACTORY)
        self.grow = nn.Linear(width, 4 * width, **_FACTORY)
        self.shrink = nn.Linear(4 * width, width, **_FACTORY)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Not F.scaled_dot_product_attention: this is deterministic on every device, and as fast at this size.
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v
        x = x + self.attend(mixed.transpose(1, 2).flatten(-2))
        fed_forward: Tensor = self.shrink(F.gelu(self.grow(self.norm2(x)), approximate="tanh"))
        return x + fed_forward
