"""The page's checkpoint loop."""

from client import Loader, dataloader_to_step, make_model, parse_arguments

import deepspeed

args = parse_arguments()
model = make_model()
data_loader = Loader(args.batches)
model_engine, optimizer, _, _ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())

# fmt: off
# The page, word for word, from here
#load checkpoint
_, client_sd = model_engine.load_checkpoint(args.load_dir, args.ckpt_id)
step = client_sd['step']

#advance data loader to ckpt step
dataloader_to_step(data_loader, step + 1)

for step, batch in enumerate(data_loader):

    #forward() method
    loss = model_engine(batch)

    #runs backpropagation
    model_engine.backward(loss)

    #weight update
    model_engine.step()

    #save checkpoint
    if step % args.save_interval:
        client_sd['step'] = step
        ckpt_id = loss.item()
        model_engine.save_checkpoint(args.save_dir, ckpt_id, client_sd = client_sd)
# to here
# fmt: on

print(f"rank {model_engine.global_rank} ends at {model_engine.global_steps} steps, step {step}", flush=True)
