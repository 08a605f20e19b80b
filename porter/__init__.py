"""Port a model from PyTorch to an accelerator it was not made for, and say what the port costs."""

__version__ = "0.1.0"
