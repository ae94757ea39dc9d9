"""A bare loop: transformers' model, peft's LoRA, torch's AdamW, batches padded to their longest row, nothing else."""

from meter import start

job = start()

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed  # noqa: E402

PADDING = {"input_ids": AutoTokenizer.from_pretrained(job.model_dir).pad_token_id, "labels": -100, "attention_mask": 0}


def collate(rows):
    """A batch of rows, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows], device=job.device)
        for name, value in PADDING.items()
    }


rows = job.tokens()
model = AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=job.torch_dtype)
set_seed(job.seed)
model = get_peft_model(
    model,
    LoraConfig(task_type="CAUSAL_LM", r=job.rank, lora_alpha=job.alpha, lora_dropout=0.0, target_modules=job.targets),
).to(job.device)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0, fused=True)
model.train()
for step in range(job.steps):
    batch = collate(rows[step * job.batch_size : (step + 1) * job.batch_size])
    with torch.autocast(job.device, torch.bfloat16, enabled=job.is_bf16):
        loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
