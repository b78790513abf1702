"""Trains a byte-level GPT on a novel, in the style of the Getting Started page.

    deepspeed --num_gpus 2 examples/gpt/train.py --deepspeed --deepspeed_config examples/gpt/ds_config.json

Every file it writes goes to --out: checkpoints/, log.json, loss.svg and sample.txt. With --resume it goes on from the
newest checkpoint there, and sees the same batches that a run without a pause would have seen.
"""

import argparse
import json
import os
import sys
import time

import torch
from model import GPT
from plot import curves

import deepspeed

HERE = os.path.dirname(os.path.abspath(__file__))
VALIDATION_SHARE = 0.1
BAR_WIDTH = 28


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    parser.add_argument(
        "--data", default=os.path.join(HERE, "data", "pride-and-prejudice.txt"), help="the text to learn"
    )
    parser.add_argument("--out", default=os.path.join("build", "gpt"), help="the folder for everything written")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: total_num_steps of the schedule)")
    parser.add_argument("--length", type=int, default=128, help="bytes per sample")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1813)
    parser.add_argument("--report_interval", type=int, default=20, help="steps between two lines of output")
    parser.add_argument(
        "--validate_interval", type=int, default=120, help="steps between two looks at the validation text"
    )
    parser.add_argument("--save_interval", type=int, default=120, help="steps between two checkpoints; 0 saves none")
    parser.add_argument("--sample_bytes", type=int, default=400)
    parser.add_argument(
        "--progress",
        choices=["auto", "bar", "lines"],
        default="auto",
        help="auto draws a bar where stdout is a terminal; a launcher usually puts a pipe there",
    )
    parser = deepspeed.add_config_arguments(parser)
    return parser.parse_args()


class Text:
    """A text cut into training and validation parts. Which windows a step sees depends on nothing but its number."""

    def __init__(self, path: str, length: int, seed: int):
        with open(path, "rb") as file:
            text = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()
        split = int(len(text) * (1 - VALIDATION_SHARE))
        self.train, self.validation = text[:split], text[split:]
        self.length, self.seed = length, seed
        if len(self.validation) <= length:
            raise SystemExit(f"{path} is too short: its last tenth must be longer than --length {length}")

    def batch(self, micro_step: int, size: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random windows of the training part: inputs and, one byte further, targets, each (size, length)."""
        generator = torch.Generator().manual_seed((self.seed << 32) + micro_step * world + rank)
        starts = torch.randint(len(self.train) - self.length - 1, (size,), generator=generator)
        return self.windows(self.train, starts)

    def validation_batches(self, size: int, rank: int, world: int, limit: int | None = None):
        """This rank's part of the validation text in windows side by side; `limit` takes that many, evenly spread."""
        starts = torch.arange(0, len(self.validation) - self.length - 1, self.length)
        if limit is not None and limit < len(starts):
            starts = starts[torch.linspace(0, len(starts) - 1, limit).long()]
        for part in starts[rank::world].split(size):
            yield self.windows(self.validation, part)

    def windows(self, text: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = starts[:, None] + torch.arange(self.length + 1)
        return text[index[:, :-1]], text[index[:, 1:]]


class Progress:
    """A bar that redraws itself on a terminal, plain lines anywhere else."""

    def __init__(self, total: int, shown: bool, interval: int, style: str):
        self.total, self.shown, self.interval = total, shown, interval
        self.bar = shown and (style == "bar" or (style == "auto" and sys.stdout.isatty()))

    def update(self, step: int, text: str) -> None:
        if self.bar:
            filled = BAR_WIDTH * step // self.total
            print(
                f"\r\x1b[K[{'█' * filled}{'░' * (BAR_WIDTH - filled)}] {step}/{self.total}  {text}", end="", flush=True
            )
        elif self.shown and (step % self.interval == 0 or step == self.total):
            print(f"step {step}/{self.total}  {text}", flush=True)

    def line(self, text: str) -> None:
        if self.shown:
            print(f"\r\x1b[K{text}" if self.bar else text, flush=True)


def mean_over_ranks(total: float, count: float) -> float:
    """The mean of values of which every rank holds its sum and their count."""
    both = torch.tensor([total, count], dtype=torch.float64)
    if deepspeed.comm.get_world_size() > 1:
        both = both.to(deepspeed.get_accelerator().current_device_name())
        deepspeed.comm.all_reduce(both)
    return float(both[0] / both[1])


@torch.no_grad()
def validation_loss(engine, text: Text, size: int, limit: int | None = None) -> float:
    """Nats per byte on the validation text."""
    engine.eval()
    total = count = 0.0
    for inputs, targets in text.validation_batches(size, engine.global_rank, engine.world_size, limit):
        total += engine(inputs.to(engine.device), targets.to(engine.device)).item() * inputs.numel()
        count += inputs.numel()
    engine.train()
    return mean_over_ranks(total, count)


def sample(engine, count: int, seed: int) -> str:
    """Text from the model. Every rank takes part, so that it also works where no rank holds all weights."""
    engine.eval()
    prompt = torch.tensor(list(b"It is a truth universally acknowledged, that "), device=engine.device)
    text = engine.module.generate(prompt, count, temperature=0.8, generator=torch.Generator().manual_seed(seed))
    engine.train()
    decoded = bytes(text.tolist()).decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in decoded)


def write(path: str, text: str) -> None:
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    text = Text(args.data, args.length, args.seed)
    model = GPT(args.width, args.layers, args.heads, args.length)
    model_engine, _, _, _ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())

    rank, world = model_engine.global_rank, model_engine.world_size
    size, accumulation = model_engine.train_micro_batch_size_per_gpu(), model_engine.gradient_accumulation_steps()
    steps = args.steps or model_engine.config["scheduler"]["params"]["total_num_steps"]
    checkpoints = os.path.join(args.out, "checkpoints")
    os.makedirs(args.out, exist_ok=True)
    progress = Progress(steps, shown=rank == 0, interval=args.report_interval, style=args.progress)

    client_state = {"step": 0, "train": [], "validation": []}
    if args.resume:
        path, client_state = model_engine.load_checkpoint(checkpoints)
        if path is None:
            raise SystemExit(f"--resume: there is no checkpoint in {checkpoints}")
        progress.line(f"resumed from {path}, after step {client_state['step']}")
    train, validation = client_state["train"], client_state["validation"]
    parameters = sum(p.numel() for p in model.parameters())
    samples = size * accumulation * world
    progress.line(
        f"{parameters / 1e6:.1f} M parameters, {world} ranks, {samples} samples of {args.length} bytes a step"
    )

    loss_sum, loss_count = torch.zeros((), device=model_engine.device), 0
    trained_seconds, trained_samples, speed = 0.0, 0, 0.0
    for step in range(client_state["step"] + 1, steps + 1):
        started = time.perf_counter()
        for micro_step in range((step - 1) * accumulation, step * accumulation):
            inputs, targets = text.batch(micro_step, size, rank, world)
            loss = model_engine(inputs.to(model_engine.device), targets.to(model_engine.device))
            model_engine.backward(loss)
            model_engine.step()
            loss_sum += loss.detach()
            loss_count += 1
        last = step == steps
        if step % args.report_interval == 0 or last:
            train.append((step, mean_over_ranks(loss_sum.item(), loss_count)))
            loss_sum.zero_()
            loss_count = 0
        trained_seconds += time.perf_counter() - started
        trained_samples += samples
        speed = trained_samples / trained_seconds
        shown_loss = f"loss {train[-1][1]:.3f}  " if train else ""
        progress.update(step, f"{shown_loss}rate {model_engine.get_lr()[0]:.2e}  {speed:.1f} samples/s")

        if step % args.validate_interval == 0 and not last:
            validation.append((step, validation_loss(model_engine, text, size, limit=64)))
            progress.line(f"step {step}/{steps}  validation loss {validation[-1][1]:.3f} (64 samples)")
        if args.save_interval and (step % args.save_interval == 0 or last):
            state = {"step": step, "train": train, "validation": validation}
            model_engine.save_checkpoint(checkpoints, client_state=state)

    final = validation_loss(model_engine, text, size)
    validation.append((steps, final))
    written = sample(model_engine, args.sample_bytes, args.seed) if args.sample_bytes else ""
    if rank == 0:
        curves(
            os.path.join(args.out, "loss.svg"),
            "Byte-level GPT on Pride and Prejudice",
            "step",
            "nats per byte",
            {"training": train, "validation": validation},
        )
        log = {
            "parameters": parameters,
            "world": world,
            "config": model_engine.config,
            "seconds": trained_seconds,
            "samples_per_second": speed,
            "validation_loss": final,
            "train": train,
            "validation": validation,
        }
        write(os.path.join(args.out, "log.json"), json.dumps(log, indent=1) + "\n")
        write(os.path.join(args.out, "sample.txt"), written + "\n")
    deepspeed.comm.barrier()
    if rank == 0:
        print(f"\n{written}\n\nwritten to {args.out}: loss.svg, log.json, sample.txt\n")
        print(f"validation loss: {final:.4f} nats/byte")
        print(f"throughput: {speed:.1f} samples/s", flush=True)


if __name__ == "__main__":
    main()
