"""Times `import torch` and then `import deepspeed` and its `initialize`; prints one line `BENCH {json}`."""

import json
import time

t0 = time.perf_counter()
import torch  # noqa: E402, F401

t1 = time.perf_counter()
import deepspeed  # noqa: E402

deepspeed.initialize  # noqa: B018  the import may be lazy: the name is what every script touches
t2 = time.perf_counter()
print("BENCH " + json.dumps({"torch_s": t1 - t0, "import_s": t2 - t1}), flush=True)
