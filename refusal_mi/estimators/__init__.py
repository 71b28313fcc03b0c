"""Activations of two classes in, candidate directions out: the formulas beside the difference of means."""
