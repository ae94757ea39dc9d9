"""litgpt's LoRA fine-tuning; rows come as token ids from a data module of one's own, the checkpoint in litgpt's form."""

import json
import shutil
from pathlib import Path

from meter import start

job = start()

import torch  # noqa: E402
from litgpt.args import EvalArgs, TrainArgs  # noqa: E402
from litgpt.config import name_to_config  # noqa: E402
from litgpt.data import DataModule, get_sft_collate_fn  # noqa: E402
from litgpt.finetune.lora import setup  # noqa: E402
from litgpt.prompts import Default  # noqa: E402
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint  # noqa: E402


class Rows(DataModule):
    """The rows, and one of them to validate on, which litgpt does before it trains."""

    def __init__(self):
        super().__init__()
        self.prompt_style = Default()
        self.rows = [self.row(**row) for row in job.tokens()]

    @staticmethod
    def row(input_ids, labels, attention_mask):
        """A row with the counts that litgpt adds up."""
        counts = {"raw": len(input_ids), "raw_plus_prompt_template": len(input_ids)}
        return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels), "token_counts": counts}

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        """Called before the loaders are asked for."""
        self.batch_size = batch_size

    def train_dataloader(self):
        """The rows in the order of the file."""
        collate = get_sft_collate_fn(max_seq_length=job.max_length, pad_id=0, ignore_index=-100)
        return torch.utils.data.DataLoader(self.rows, batch_size=self.batch_size, collate_fn=collate)

    def val_dataloader(self):
        """One short row."""
        collate = get_sft_collate_fn(max_seq_length=16, pad_id=0, ignore_index=-100)
        return torch.utils.data.DataLoader(self.rows[:1], collate_fn=collate)


def converted():
    """The folder of the checkpoint in litgpt's form, made when it is missing."""
    folder = Path(job.cache_dir) / "checkpoint"
    if (folder / "lit_model.pth").exists():
        return folder
    shutil.copytree(job.model_dir, folder, dirs_exist_ok=True)
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name_to_config["Llama-job"] = {
        "name": "Llama-job",
        "block_size": shape["max_position_embeddings"],
        "vocab_size": shape["vocab_size"],
        "padded_vocab_size": shape["vocab_size"],
        "n_layer": shape["num_hidden_layers"],
        "n_head": shape["num_attention_heads"],
        "n_embd": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "norm_eps": shape["rms_norm_eps"],
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
    }
    convert_hf_checkpoint(folder, model_name="Llama-job")
    return folder


names = {"q_proj": "lora_query", "k_proj": "lora_key", "v_proj": "lora_value", "o_proj": "lora_projection"}
setup(
    converted(),
    out_dir=Path(job.scratch_dir),
    precision="bf16-mixed" if job.is_bf16 else "32-true",
    lora_r=job.rank,
    lora_alpha=job.alpha,
    lora_dropout=0.0,
    data=Rows(),
    train=TrainArgs(
        save_interval=None,
        log_interval=10,
        global_batch_size=job.batch_size,
        micro_batch_size=job.batch_size,
        lr_warmup_steps=1,
        epochs=1,
        max_steps=job.steps + 1,
        max_norm=None,
    ),
    eval=EvalArgs(interval=10**9, max_new_tokens=1, max_iters=1),
    optimizer={
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": job.learning_rate, "weight_decay": 0.0, "fused": True},
    },
    seed=job.seed,
    **{argument: name in job.targets for name, argument in names.items()},
    **job.settings_dict(),
)
