"""Triton kernels, installed as ``pycompress.kernels``. None yet: the CPU kernels are in csrc/."""
