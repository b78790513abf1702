"""The Trainer with DeepSpeed, as transformers' documentation has it:

deepspeed --num_gpus 2 run_trainer.py --deepspeed ds_config.json --output_dir out --do_train ...
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, set_seed

from tiny_models import CLASS_OF, Examples, build


@dataclass
class ScriptArguments:
    model: str = field(default="gpt2", metadata={"help": "gpt2, llama, bert, vit or t5"})
    model_name_or_path: str | None = field(default=None, metadata={"help": "a folder to take the weights from"})
    examples: int = field(default=32, metadata={"help": "how many to train on"})
    lora: bool = field(default=False, metadata={"help": "train a LoRA adapter and leave the model as it is"})
    dropout: float = field(default=0.0, metadata={"help": "of a model made from a config"})
    freeze: str | None = field(default=None, metadata={"help": "parameters whose names contain this are not trained"})


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, Seq2SeqTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)

    # TrainingArguments come first: at ZeRO stage 3 they are what makes from_pretrained build the model sharded.
    if script.model_name_or_path:
        model = CLASS_OF[script.model].from_pretrained(script.model_name_or_path, dtype=torch.float32)
    else:
        model = build(script.model, script.dropout)
    if script.lora:
        from peft import LoraConfig, get_peft_model

        target = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}[script.model]
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=target))
    if script.freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(script.freeze not in name)

    def exact(prediction: object) -> dict[str, float]:
        return {"exact": float((prediction.predictions[:, 1:3] == prediction.label_ids[:, :2]).mean())}

    seq2seq = script.model == "t5"
    trainer = (Seq2SeqTrainer if seq2seq else Trainer)(
        model=model,
        args=args,
        train_dataset=Examples(script.model, script.examples),
        eval_dataset=Examples(script.model, 8, seed=1),
        compute_metrics=exact if seq2seq and args.predict_with_generate else None,
    )
    if args.do_train:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
