"""The native half of the `deepspeed` package (crates/python): everything that computes, communicates or is written.

Tensors are dense, contiguous CPU tensors unless said otherwise, and nobody else touches them during a call. Calls that
may wait release the GIL.

Its types are told in a stub for each file of crates/python/src; of these only this one can be imported.
"""

from deepspeed._native._checkpoint import *
from deepspeed._native._checkpoint_tools import *
from deepspeed._native._config import *
from deepspeed._native._engine import *
from deepspeed._native._errors import *
from deepspeed._native._gathering import *
from deepspeed._native._group import *
from deepspeed._native._launcher import *
from deepspeed._native._memory import *
from deepspeed._native._metrics import *
from deepspeed._native._ops import *
from deepspeed._native._param_state import *
from deepspeed._native._schedules import *
from deepspeed._native._shared_weights import *
