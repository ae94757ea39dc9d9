"""What the plain baselines share: command line, rows, adapters, training. transformers and peft alone, no peftkit."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments


def parse_options(description: str | None, learning_rates: dict[str, float], **defaults: Any) -> argparse.Namespace:
    """The command line: a method with its own learning rate; `defaults` of the script are epochs, batch_size, max_length."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--train", type=Path, required=True, help="JSON lines to learn from")
    parser.add_argument("--test", type=Path, required=True, help="JSON lines to measure on")
    parser.add_argument("--method", choices=learning_rates, default="lora")
    parser.add_argument("--learning-rate", type=float, help="its peak; default: the method's own")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, help="tokens")
    parser.add_argument("--max-rows", type=int, help="learn from the first rows only")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**defaults)
    options = parser.parse_args()
    if options.learning_rate is None:
        options.learning_rate = learning_rates[options.method]
    return options


def read_rows(path: Path, max_rows: int | None = None) -> list[dict[str, Any]]:
    """Rows of a JSON lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:max_rows]


class Bottleneck(nn.Module):
    """A linear layer and an adapter behind it (Pfeiffer et al. 2020); at the start exactly the layer."""

    def __init__(self, layer: nn.Linear, reduction_factor: int = 16) -> None:
        super().__init__()
        hidden = layer.out_features
        self.layer, self.down, self.up = (
            layer,
            nn.Linear(hidden, hidden // reduction_factor),
            nn.Linear(hidden // reduction_factor, hidden),
        )
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., hidden)."""
        x = self.layer(x)
        return x + self.up(torch.relu(self.down(x)))


def adapt(model: nn.Module, method: str, task_type: str | None = None, modules_to_save: list[str] | None = None) -> nn.Module:
    """The model with the parameters of `method`, and its head, left to train. BERT's names of modules are assumed."""
    if method == "lora":
        targets = ["query", "value"]
        config = LoraConfig(task_type=task_type, r=8, lora_alpha=16, target_modules=targets, modules_to_save=modules_to_save)
        return get_peft_model(model, config)
    if method == "ia3":
        return get_peft_model(model, IA3Config(task_type=task_type))
    if method == "prefix":
        return get_peft_model(model, PrefixTuningConfig(task_type=task_type, num_virtual_tokens=20))
    if method == "bottleneck":
        for layer in model.base_model.encoder.layer:
            layer.output.dense = Bottleneck(layer.output.dense)
    trained = {
        "bitfit": lambda name: name.endswith("bias"),
        "bottleneck": lambda name: ".down." in name or ".up." in name,
        "full": lambda name: True,
        "head": lambda name: False,
    }[method]
    for name, parameter in model.named_parameters():
        in_head = not name.startswith(f"{model.base_model_prefix}.")
        parameter.requires_grad = in_head or trained(name)
    return model


def fit(model: nn.Module, rows: list[Any], collator: Any, options: argparse.Namespace) -> tuple[Trainer, float]:
    """The trainer after training on encoded rows, and the seconds it took: AdamW, linear decay, clipping at 1."""
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=64,
        seed=options.seed,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    started = time.perf_counter()
    trainer.train()
    return trainer, time.perf_counter() - started


def report(options: argparse.Namespace, model: nn.Module, seconds: float, metrics: dict[str, Any]) -> None:
    """Print one JSON object."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    settings = {key: value for key, value in vars(options).items() if key not in ("model", "train", "test")}
    print(json.dumps(metrics | {"trainable_params": trained, "train_seconds": round(seconds, 1)} | settings))
