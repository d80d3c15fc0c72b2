"""Triton kernels, installed as ``pycompress.kernels``: one file an operation, imported when a call first needs it.

Each file holds the jit functions, their tuning (a frozen dataclass beside ``pick``), a launcher that takes the checked
arguments of a call, and ``shipped()``, every configuration that ``pick`` may choose, which the tests compile ahead of
time. ``common.py`` is what they share.
"""
