"""Memory: estimates for a model, and what this process takes."""

def estimate_zero2(
    params: int, ranks_per_host: int, hosts: int, factor: float, offload_optimizer: bool
) -> tuple[int, int]:
    """(bytes of host memory per host, bytes of memory per accelerator) of a run at stage 2."""

def zero2_table(params: int, ranks_per_host: int, hosts: int, factor: float) -> str:
    """All cases of stage 2, for people to read."""

def estimate_zero3(
    params: int,
    largest_layer: int,
    ranks_per_host: int,
    hosts: int,
    factor: float,
    offload_optimizer: bool,
    offload_param: bool,
    zero_init: bool,
) -> tuple[int, int, int]:
    """(bytes of host memory per host, bytes of memory per accelerator, bytes of the largest layer) of a run at stage 3."""

def zero3_table(params: int, largest_layer: int, ranks_per_host: int, hosts: int, factor: float) -> str:
    """All cases of stage 3, for people to read."""

def memory_in_use() -> dict[str, int]:
    """The proportional set size of this process, bytes: total, anonymous, file, shared."""
