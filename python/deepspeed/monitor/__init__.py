"""Metrics of training for TensorBoard, CSV readers, Weights & Biases and Comet."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(
    __name__, submodules=("comet", "config", "csv_monitor", "monitor", "tensorboard", "wandb")
)
