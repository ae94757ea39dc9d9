"""unsloth's fast model under TRL's SFTTrainer, as its own examples use it (GPU only; not run yet for want of one)."""

from meter import start

job = start()

from unsloth import FastLanguageModel  # noqa: E402, I001  it patches what is imported after it
from datasets import load_dataset  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

model, tokenizer = FastLanguageModel.from_pretrained(
    job.model_dir, max_seq_length=job.max_length, dtype=job.torch_dtype, load_in_4bit=False
)
model = FastLanguageModel.get_peft_model(
    model,
    r=job.rank,
    lora_alpha=job.alpha,
    lora_dropout=0.0,
    target_modules=job.targets,
    use_gradient_checkpointing=False,
    random_state=job.seed,
)


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
    bf16=job.is_bf16,
    seed=job.seed,
    **job.settings_dict(),
)
SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer).train()
