"""Makes the first checkpoint, for resume.py to continue from."""

from client import make_model, parse_arguments

import deepspeed

args = parse_arguments()
model = make_model()
model_engine, _, _, _ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
model_engine.save_checkpoint(args.save_dir, "begin", client_state={"step": -1})
