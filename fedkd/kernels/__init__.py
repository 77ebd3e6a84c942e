"""Compiled kernels for nets of common layers; everything works without them, at the speed of plain torch."""
