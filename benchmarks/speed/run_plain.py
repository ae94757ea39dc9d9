"""The plain script: transformers' Trainer and peft, as their own examples use them."""

from meter import start

job = start()

from datasets import load_dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

tokenizer = AutoTokenizer.from_pretrained(job.model_dir)


def render(row):
    """Token ids of a chat; the question is not learned."""
    prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + ids[len(prompt) :]}


rows = load_dataset("json", data_files=job.rows_path, split="train").map(render, remove_columns="messages")
model = AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=job.torch_dtype)
set_seed(job.seed)
model = get_peft_model(
    model,
    LoraConfig(
        task_type="CAUSAL_LM", r=job.rank, lora_alpha=job.alpha, lora_dropout=0.0, target_modules=job.targets, bias="none"
    ),
)
arguments = TrainingArguments(
    output_dir=job.scratch_dir,
    per_device_train_batch_size=job.batch_size,
    max_steps=job.steps,
    learning_rate=job.learning_rate,
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=1.0,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    use_cpu=job.device == "cpu",
    bf16=job.is_bf16,
    seed=job.seed,
)
collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()
