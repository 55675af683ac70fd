"""Formulas and Triton kernels of fusedopt. Knows tensors, not optimizers."""
