"""What the engine raises."""

class DeepSpeedError(RuntimeError):
    """What the engine raises, unless a more precise class below fits."""

class CommError(DeepSpeedError):
    """A collective failed: a peer is gone, disagrees, or did not arrive."""

class CheckpointError(OSError):
    """A checkpoint could not be written or read. What was there before is untouched."""

class NonFiniteGradientError(ArithmeticError):
    """A gradient is NaN or infinite where none may be (fp32). No weight has been changed."""

class DeepSpeedConfigError(ValueError):
    """A config that cannot be used: every problem in it, each with its place and what to do."""
