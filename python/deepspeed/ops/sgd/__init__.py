"""SGD with momentum."""

from deepspeed.ops.sgd.fused_sgd import FusedSGD

__all__ = ["FusedSGD"]
