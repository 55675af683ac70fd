"""Benchmarks: what the optimizers cost, measured side by side."""
