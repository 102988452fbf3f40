"""Kernel-shaped operations, each beside its plain-PyTorch twin."""
