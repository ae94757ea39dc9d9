"""axolotl's `train` on rows of messages, with the tokenizer's template."""

import json
from pathlib import Path

from meter import start


def main():
    """Apart from the module's top, which axolotl's processes for rows run again."""
    job = start()

    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    config = {
        "base_model": job.model_dir,
        "datasets": [{"path": job.rows_path, "ds_type": "json", "type": "chat_template", "roles_to_train": ["assistant"]}],
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": str(Path(job.cache_dir) / "prepared"),
        "dataset_num_proc": 1,
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,
        "val_set_size": 0.0,
        "sequence_len": job.max_length,
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "adapter": "lora",
        "lora_r": job.rank,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
        "lora_target_modules": job.targets,
        "output_dir": job.scratch_dir,
        "micro_batch_size": job.batch_size,
        "gradient_accumulation_steps": 1,
        "max_steps": job.steps,
        "num_epochs": 1,
        "optimizer": "adamw_torch_fused",
        "learning_rate": job.learning_rate,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": job.is_bf16,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        "attn_implementation": "sdpa",
        "logging_steps": 10,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "seed": job.seed,
        "strict": False,
        **job.settings_dict(),
    }
    path = Path(job.scratch_dir, "config.yaml")
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML too
    do_train(load_cfg(str(path)), None)


if __name__ == "__main__":
    main()
