"""The optimizers and schedules of Hugging Face transformers for PyTorch, fused into a handful of Triton launches."""

from fusedopt.adamw import AdamW

__version__ = "0.1.0"

__all__ = ["AdamW", "__version__"]
