"""Activation checkpointing."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(__name__, submodules=("checkpointing",))
