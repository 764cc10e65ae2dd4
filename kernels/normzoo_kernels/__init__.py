"""Triton kernels of normzoo. Imports torch, triton and itself; users call :mod:`normzoo`."""
