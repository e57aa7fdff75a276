"""Arithmetic on tensors and the Task protocol: no network, no files, no scheduler."""
