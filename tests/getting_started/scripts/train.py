"""The page's training loop."""

from client import Loader, make_model, parse_arguments

import deepspeed

cmd_args = parse_arguments()
model = make_model()
params = model.parameters()
data_loader = Loader(cmd_args.batches)

# fmt: off
# ruff: noqa: B007
# The page, word for word, from here
model_engine, optimizer, _, _ = deepspeed.initialize(args=cmd_args,
                                                     model=model,
                                                     model_parameters=params)

for step, batch in enumerate(data_loader):
    #forward() method
    loss = model_engine(batch)

    #runs backpropagation
    model_engine.backward(loss)

    #weight update
    model_engine.step()
# to here
# fmt: on

print(f"rank {model_engine.global_rank} of {model_engine.world_size}: {model_engine.global_steps} steps, "
      f"loss {loss.item():.4f}, stage {model_engine.zero_optimization_stage()}, "
      f"fp16 {model_engine.fp16_enabled()}, {cmd_args.deepspeed=}", flush=True)  # fmt: skip
