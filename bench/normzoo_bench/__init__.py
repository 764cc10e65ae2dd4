"""Measuring normzoo: the static gate, the harness and what they are compared with."""
