"""Helpers around checkpoints. Saving and loading are methods of the engine."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(__name__, submodules=("ds_to_universal", "universal_checkpoint", "utils"))
