"""Workloads: the parameters of models people train, as lists of shapes with a name."""

from dataclasses import dataclass, replace
from math import prod

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """The parameters that an optimizer updates."""

    name: str
    about: str  # one line for a reader
    shapes: tuple[Shape, ...]
    dtype: torch.dtype = torch.float32  # of parameters and gradients
    channels_last: bool = False  # layout of 4-d parameters and their gradients

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def tensors(self) -> int:
        return len(self.shapes)

    @property
    def params(self) -> int:
        return sum(map(prod, self.shapes))

    def empty(self, shape: Shape, device: torch.device) -> torch.Tensor:
        """Returns an uninitialised tensor in the workload's dtype and layout."""
        layout = torch.channels_last if self.channels_last and len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=self.dtype, device=device, memory_format=layout)


def _gpt(layers: int, width: int, vocabulary: int, context: int) -> tuple[Shape, ...]:
    """GPT-2: biases everywhere, a tied head, 12 tensors per block."""
    w = width
    block = [(w,), (w,), (3 * w, w), (3 * w,), (w, w), (w,), (w,), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
    return ((vocabulary, w), (context, w), *block * layers, (w,), (w,))


def _bert(layers: int, width: int, vocabulary: int) -> tuple[Shape, ...]:
    """BERT: token, position and segment embeddings, 16 tensors per layer, a pooler."""
    w = width
    attention = [(w, w), (w,)] * 4
    layer = [*attention, (w,), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,), (w,), (w,)]
    return ((vocabulary, w), (512, w), (2, w), (w,), (w,), *layer * layers, (w, w), (w,))


def _vit(layers: int, width: int, patch: int, tokens: int, classes: int) -> tuple[Shape, ...]:
    """ViT: GPT-2's blocks and last norm; class token, positions, patches and a classifier."""
    begin = ((1, 1, width), (1, tokens, width), (width, 3, patch, patch), (width,))
    return (*begin, *_gpt(layers, width, 0, 0)[2:], (classes, width), (classes,))


def _llama(layers: int, width: int, hidden: int, vocabulary: int, kv_width: int | None = None) -> tuple[Shape, ...]:
    """Llama: no biases, gated feed-forward, an untied head, 9 tensors per block."""
    w, kv = width, kv_width or width
    block = [(w, w), (kv, w), (kv, w), (w, w), (hidden, w), (hidden, w), (w, hidden), (w,), (w,)]
    return ((vocabulary, w), *block * layers, (w,), (vocabulary, w))


def _resnet50() -> tuple[Shape, ...]:
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            outside = 4 * width
            for conv in ((width, inside, 1, 1), (width, width, 3, 3), (outside, width, 1, 1)):
                shapes += [conv, (conv[0],), (conv[0],)]
            if block == 0:
                shapes += [(outside, inside, 1, 1), (outside,), (outside,)]
            inside = outside
    return (*shapes, (1000, 2048), (1000,))


_ALL = (
    Workload(
        "gpt_50m",
        "GPT-2's architecture with 7 layers of width 512 and normalised embeddings",
        (*_gpt(7, 512, 50257, 4096), (512,), (512,)),
    ),
    Workload(
        "matrices_50m",
        "29 matrices of 1 to 8 M elements and 61 vectors, whose temporaries the caches and the allocator keep",
        ((1024, 1024),) * 24 + ((4096, 1024),) * 4 + ((8192, 1024),) + ((1024,),) * 61,
    ),
    Workload("gpt_13m", "GPT-2's architecture, small enough for a laptop", _gpt(4, 384, 16384, 512)),
    Workload("gpt2", "GPT-2 124M", _gpt(12, 768, 50257, 1024)),
    Workload("bert_base", "BERT-base, uncased", _bert(12, 768, 30522)),
    Workload("resnet50", "ResNet-50, channels_last", _resnet50(), channels_last=True),
    Workload("vit_l", "ViT-L/16, 224 pixels", _vit(24, 1024, 16, 197, 1000)),
    Workload("llama_1g", "1.1 G parameters in Llama's architecture", _llama(22, 2048, 5632, 32000, 256)),
    Workload("llama2_7b", "Llama-2 7B in bfloat16", _llama(32, 4096, 11008, 32000), torch.bfloat16),
    Workload("tiny_300", "300 tensors of 64 elements: the host's time", ((64,),) * 300),
    Workload("tiny_2000", "2,000 tensors of 64 elements: the host's time", ((64,),) * 2000),
    Workload("embedding_2g4", "one embedding of 2.4 G elements", ((1_171_875, 2048),), torch.bfloat16),
    Workload("equal", "four equal matrices, to count bytes on", ((256, 256),) * 4),
    Workload("smoke", "a few odd shapes, for tests", ((33, 17), (7,), (1024,), (3, 5, 4), (1,))),
)
WORKLOADS = {workload.name: workload for workload in _ALL}


def get(name: str) -> Workload:
    """Returns a workload by its name; `name:bfloat16` is the same one in another dtype."""
    base, _, dtype = name.partition(":")
    if base not in WORKLOADS:
        raise ValueError(f"workload must be one of {', '.join(WORKLOADS)}, got {base!r}")
    if not dtype:
        return WORKLOADS[base]
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"dtype of a workload must be a dtype of torch, got {dtype!r}")
    return replace(WORKLOADS[base], name=name, dtype=kind)
