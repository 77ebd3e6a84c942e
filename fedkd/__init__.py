"""Federated and data-free knowledge distillation that keeps data private."""

__version__ = "0.1.0"
