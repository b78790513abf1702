"""Optimizers whose updates run natively, usable with or without the engine."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(__name__, submodules=("adagrad", "adam", "lamb", "lion"))
