"""AdamWeightDecay, create_optimizer and the schedules of transformers' TensorFlow half, for torch."""

from fusedopt.keras.adam_weight_decay import AdamWeightDecay

__all__ = ["AdamWeightDecay"]
