"""ms-swift's `sft` on rows of messages, with a template that says what the tokenizer's says."""

from meter import start

job = start()

from swift import sft_main  # noqa: E402
from swift.template import TemplateMeta, register_template  # noqa: E402

turns = ["<|user|>{{QUERY}}<|end|><|assistant|>"]
register_template(TemplateMeta("job", prefix=[], prompt=turns, chat_sep=["<|end|>"], suffix=["<|end|>"]))
settings = {
    "model": job.model_dir,
    "model_type": "llama",
    "template": "job",
    "dataset": job.rows_path,
    "torch_dtype": job.dtype,
    "tuner_type": "lora",
    "lora_rank": job.rank,
    "lora_alpha": job.alpha,
    "lora_dropout": 0.0,
    "max_length": job.max_length,
    "output_dir": job.scratch_dir,
    "per_device_train_batch_size": job.batch_size,
    "gradient_accumulation_steps": 1,
    "max_steps": job.steps,
    "learning_rate": job.learning_rate,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": "false",
    "dataset_shuffle": "false",
    "train_dataloader_shuffle": "false",
    "dataloader_num_workers": 0,
    "split_dataset_ratio": 0,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": str(job.device == "cpu").lower(),
    "bf16": str(job.is_bf16).lower(),
    "seed": job.seed,
    **job.settings_dict(),
}
arguments = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
sft_main([*arguments, "--target_modules", *job.targets])
