"""What all optimizers have in common, above the backends: the step, the state, clipping, checkpoints."""
