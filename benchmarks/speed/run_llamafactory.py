"""LLaMA-Factory's `train` on rows of messages, with the template that it reads off the tokenizer."""

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from meter import start

job = start()

if importlib.util.find_spec("torchaudio") is None:  # for audio, which is not used; there is no build for each torch
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.train.tuner import run_exp  # noqa: E402

about = {
    "rows": {
        "file_name": job.rows_path,
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
}
Path(job.scratch_dir, "dataset_info.json").write_text(json.dumps(about), encoding="utf-8")
run_exp(
    {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job.model_dir,
        "finetuning_type": "lora",
        "lora_rank": job.rank,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
        "lora_target": ",".join(job.targets),
        "dataset_dir": job.scratch_dir,
        "dataset": "rows",
        "cutoff_len": job.max_length,
        "preprocessing_num_workers": 1,
        "dataloader_num_workers": 0,
        "output_dir": str(Path(job.scratch_dir) / "run"),
        "per_device_train_batch_size": job.batch_size,
        "gradient_accumulation_steps": 1,
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "disable_gradient_checkpointing": True,
        "disable_shuffling": True,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": job.device == "cpu",
        "bf16": job.is_bf16,
        "seed": job.seed,
        **job.settings_dict(),
    }
)
