"""TRL's SFTTrainer on rows of prompt and completion, both as messages; its own tokenisation and masking."""

from meter import start

job = start()

from datasets import load_dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


def split(row):
    """The last turn is the completion."""
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


rows = load_dataset("json", data_files=job.rows_path, split="train").map(split, remove_columns="messages")
arguments = SFTConfig(
    output_dir=job.scratch_dir,
    per_device_train_batch_size=job.batch_size,
    max_steps=job.steps,
    max_length=job.max_length,
    learning_rate=job.learning_rate,
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=1.0,
    gradient_checkpointing=False,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    use_cpu=job.device == "cpu",
    bf16=job.is_bf16,
    seed=job.seed,
    model_init_kwargs={"dtype": job.dtype},
    **job.settings_dict(),
)
lora = LoraConfig(task_type="CAUSAL_LM", r=job.rank, lora_alpha=job.alpha, lora_dropout=0.0, target_modules=job.targets)
SFTTrainer(model=job.model_dir, args=arguments, train_dataset=rows, peft_config=lora).train()
