"""Estimates of memory at stages 1 and 2. The figures are those of this engine's memory plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from deepspeed import _native

if TYPE_CHECKING:
    import torch


def elements(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Elements of `parameters`, sharded ones counted whole."""
    return sum(int(getattr(p, "ds_numel", None) or p.numel()) for p in parameters)


def estimate_zero2_model_states_mem_needs(
    total_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """(bytes of host memory per node, bytes of memory per GPU) for weights, gradients and optimizer state."""
    return _native.estimate_zero2(
        int(total_params), num_gpus_per_node, num_nodes, additional_buffer_factor, cpu_offload
    )


def estimate_zero2_model_states_mem_needs_all_live(
    model: torch.nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Prints the estimates of every case for `model`."""
    estimate_zero2_model_states_mem_needs_all_cold(
        elements(model.parameters()), num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Prints the estimates of every case for a model of `total_params` elements."""
    print(_native.zero2_table(int(total_params), num_gpus_per_node, num_nodes, additional_buffer_factor), end="")
