"""What several test files need: comparisons, the table of optimizers, recorded runs, tensors, small models."""
