"""The part that all optimizers share, above the backends: the step, the state, clipping, checkpoints."""
