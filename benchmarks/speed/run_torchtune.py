"""torchtune's recipe for LoRA on one device, with its chunked loss; rows come as token ids, as from a dataset of one's own."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

from meter import start

job = start()

import torch  # noqa: E402
import torchtune  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402


class Rows(torch.utils.data.Dataset):
    """The rows as torchtune's collator wants them."""

    def __init__(self, *_):
        self.rows = [{"tokens": row["input_ids"], "labels": row["labels"]} for row in job.tokens()]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return self.rows[place]


def tokenizer():
    """Of the tokenizer the recipe uses the padding id alone."""
    return SimpleNamespace(pad_id=0)


def constant(optimizer, num_training_steps, last_epoch):
    """A schedule that leaves the learning rate alone."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0, last_epoch)


shape = json.loads(Path(job.model_dir, "config.json").read_text(encoding="utf-8"))
config = {
    "output_dir": job.scratch_dir,
    "model": {
        "_component_": "torchtune.models.llama2.lora_llama2",
        "lora_attn_modules": [name.replace("o_proj", "output_proj") for name in job.targets],
        "apply_lora_to_mlp": False,
        "apply_lora_to_output": False,
        "lora_rank": job.rank,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
        "vocab_size": shape["vocab_size"],
        "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"],
        "num_kv_heads": shape["num_key_value_heads"],
        "embed_dim": shape["hidden_size"],
        "intermediate_dim": shape["intermediate_size"],
        "max_seq_len": shape["max_position_embeddings"],
        "norm_eps": shape["rms_norm_eps"],
    },
    "tokenizer": {"_component_": "__main__.tokenizer"},
    "checkpointer": {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": job.model_dir,
        "checkpoint_files": ["model.safetensors"],
        "output_dir": job.scratch_dir,
        "model_type": "LLAMA2",
    },
    "resume_from_checkpoint": False,
    "dataset": {"_component_": "__main__.Rows"},
    "seed": job.seed,
    "shuffle": False,
    "batch_size": job.batch_size,
    "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "weight_decay": 0.0, "lr": job.learning_rate},
    "lr_scheduler": {"_component_": "__main__.constant"},
    "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
    "epochs": 1,
    "max_steps_per_epoch": job.steps,
    "gradient_accumulation_steps": 1,
    "clip_grad_norm": 1.0,
    "compile": False,
    "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": job.scratch_dir},
    "log_every_n_steps": 10,
    "log_peak_memory_stats": False,
    "device": job.device,
    "dtype": "bf16" if job.is_bf16 else "fp32",
    "enable_activation_checkpointing": False,
    "enable_activation_offloading": False,
    **job.settings_dict(),
}
path = Path(torchtune.__file__).parents[1] / "recipes" / "lora_finetune_single_device.py"
spec = importlib.util.spec_from_file_location("lora_finetune_single_device", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
config = OmegaConf.create(config)
recipe = module.LoRAFinetuneRecipeSingleDevice(cfg=config)
recipe.setup(cfg=config)
recipe.train()
