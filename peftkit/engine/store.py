"""The adapter folder: written so that plain PEFT (or, for `full`, plain transformers) loads it, and read back."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from peftkit.engine.adapter import adapter_state, read_tensors, trainable_state
from peftkit.engine.model import Base, is_tied
from peftkit.errors import LoadError
from peftkit.plan import Plan
from peftkit.run import new_folder, write_json, write_text
from peftkit.tasks import TASKS
from peftkit.tasks.base import Encoding

FACTS, CONFIG, TENSORS = "peftkit.json", "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFacts:
    """What peftkit.json keeps beside the adapter, so that inference repeats what training did.

    Attributes:
        task: task type.
        method: adapter method.
        base: base model, as it was loaded.
        revision: its revision.
        dtype: dtype of the frozen weights.
        mixed_precision: autocast of the run.
        format: format of the training rows.
        columns: our column names -> those of the training file.
        encoding: how rows became token ids.
        system_prompt: system message for rows that have none.
        generation: settings of the recipe's generation section.
        trust_remote_code: as in the recipe.
        init: `random` where the base was built from its config with `seed`.
        seed: seed of the run.
        config_overrides: changed keys of the model's config.
        attn_implementation: attention kernel of the run.
    """

    task: str
    method: str
    base: str
    revision: str | None = None
    dtype: str = "auto"
    mixed_precision: str = "no"
    format: str = "auto"
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    encoding: Encoding | None = None
    system_prompt: str | None = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    trust_remote_code: bool = False
    init: str = "pretrained"
    seed: int = 0
    config_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    attn_implementation: str | None = None

    def rename(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with the columns that the training rows were renamed from, renamed alike."""
        return dict(row) | {ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row}

    def base_model(self, folder: Path) -> Base:
        """The base model that the adapter in `folder` goes onto; for `full` the folder itself is the model."""
        full = self.method == "full"
        return Base(
            path=str(folder) if full else self.base,
            task=TASKS[self.task],
            dtype=self.dtype,
            revision=None if full else self.revision,
            init="pretrained" if full else self.init,
            seed=self.seed,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            config_overrides={} if full else self.config_overrides,
        )


def facts_of(plan: Plan, base: str, encoding: Encoding, data_format: str) -> AdapterFacts:
    """The facts of a run's adapter."""
    recipe = plan.recipe
    return AdapterFacts(
        task=recipe.task,
        method=plan.method.name,
        base=base,
        revision=recipe.model.revision,
        dtype=plan.dtype,
        mixed_precision=plan.mixed_precision,
        format=data_format,
        columns=dict(recipe.data.train.columns) if recipe.data else {},
        encoding=encoding,
        system_prompt=recipe.data.system_prompt if recipe.data else None,
        generation=recipe.generation.model_dump(mode="json") if plan.task.generates else {},
        trust_remote_code=recipe.model.trust_remote_code,
        init=recipe.model.init,
        seed=recipe.training.seed,
        config_overrides=dict(recipe.model.config_overrides),
        attn_implementation=recipe.model.attn_implementation,
    )


def initial_state(model: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """The untrained adapter, for initialisations that change the base; empty for all others."""
    if plan.method.kind != "peft" or not plan.method.changes_base(plan.recipe.adapter):
        return {}
    return adapter_state(model)


def save_adapter(path: Path, model: nn.Module, tokenizer: Any, facts: AdapterFacts, initial: dict[str, torch.Tensor]) -> None:
    """Write the adapter folder atomically.

    Args:
        path: the folder.
        model: the trained model.
        tokenizer: saved along, with its chat template.
        facts: written to peftkit.json.
        initial: see `initial_state`.
    """
    with new_folder(path) as folder:
        if isinstance(model, PeftModel):
            _save_peft(folder, model, facts, initial)
        elif facts.method == "full":
            model.save_pretrained(folder)  # type: ignore[operator]
        else:
            _save_subset(folder, model, facts)
        tokenizer.save_pretrained(folder)
        if facts.generation:
            _generation_config(model, tokenizer).save_pretrained(folder)
        write_json(folder / FACTS, dataclasses.asdict(facts))


def _save_peft(folder: Path, model: PeftModel, facts: AdapterFacts, initial: dict[str, torch.Tensor]) -> None:
    state = adapter_state(model)
    config = model.active_peft_config.to_dict()
    config |= {"inference_mode": True, "base_model_name_or_path": facts.base, "task_type": facts.task}
    if initial:
        state, config = as_plain_lora(state, initial, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of conversions that PEFT would do; it is done here
        saved = type(model.active_peft_config)(**{key: value for key, value in config.items() if key != "peft_type"})
    saved.save_pretrained(str(folder))
    save_file(state, folder / TENSORS, metadata={"format": "pt"})


def as_plain_lora(
    state: dict[str, torch.Tensor], initial: dict[str, torch.Tensor], config: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A LoRA whose initialisation changed the base, as a LoRA of twice the rank for the unchanged base.

    Training starts at W = W_res + s B0 A0 and ends at W_res + s B A = W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]
    (the conversion that PiSSA describes, Meng et al. 2024, arXiv:2404.02948).
    """
    result = dict(state)
    for name, tensor in state.items():
        if ".lora_A." in name:
            result[name] = torch.cat([tensor, initial[name]], dim=0).contiguous()
        elif ".lora_B." in name:
            result[name] = torch.cat([tensor, -initial[name]], dim=1).contiguous()
    # The scale alpha / r (or alpha / sqrt(r)) must stay what it was at the single rank.
    factor = math.sqrt(2) if config["use_rslora"] else 2
    changed = {
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in config["rank_pattern"].items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in config["alpha_pattern"].items()},
        "init_lora_weights": True,
    }
    return result, config | changed


def _save_subset(folder: Path, model: nn.Module, facts: AdapterFacts) -> None:
    save_file(trainable_state(model), folder / TENSORS, metadata={"format": "pt"})
    config = {
        "peft_type": facts.method.upper(),
        "task_type": facts.task,
        "base_model_name_or_path": facts.base,
        "revision": facts.revision,
        "note": "written by peftkit: these tensors replace those of the same name in the base model",
    }
    write_json(folder / CONFIG, config)


def _generation_config(model: nn.Module, tokenizer: Any) -> GenerationConfig:
    """The base's generation config with every token that ends an answer."""
    config = GenerationConfig.from_dict(getattr(model, "generation_config", GenerationConfig()).to_dict())
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [token for token in dict.fromkeys([*known, tokenizer.eos_token_id, *_turn_ends(tokenizer)]) if token is not None]
    config.eos_token_id = ends if len(ends) > 1 else ends[0] if ends else None
    config.pad_token_id = tokenizer.pad_token_id
    return config


def _turn_ends(tokenizer: Any) -> list[int]:
    """The special token that the chat template writes after an assistant turn, where it writes one."""
    if not tokenizer.chat_template:
        return []
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenize=False
        )
    except Exception:  # a template that refuses this exchange has no say here
        return []
    tail = tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"][-1:]
    return [token for token in tail if token in tokenizer.all_special_ids]


def read_facts(folder: Path, base: str | None = None) -> AdapterFacts:
    """The facts of an adapter folder; of a plain PEFT adapter, as far as its config and tensors tell.

    Raises:
        LoadError: it is no adapter folder, or its base is not known.
    """
    if (folder / FACTS).is_file():
        data = _read_mapping(folder / FACTS)
        try:
            encoding = Encoding(**data["encoding"] | {"labels": tuple(data["encoding"]["labels"])})
            return AdapterFacts(**data | {"encoding": encoding} | ({"base": base} if base else {}))
        except (KeyError, TypeError) as error:
            raise LoadError(f"{folder / FACTS} is damaged or of another version of peftkit: {error}") from error
    if not (folder / CONFIG).is_file():
        raise LoadError(f"{folder} is no adapter: it has neither {FACTS} nor {CONFIG}")
    config = _read_mapping(folder / CONFIG)
    found = base or config.get("base_model_name_or_path")
    if not found:
        raise LoadError(f"{folder} does not say its base model; name it with --base")
    if not config.get("task_type"):
        raise LoadError(f"{folder}/{CONFIG} has no task_type, so its model class cannot be told")
    labels = tuple(f"LABEL_{number}" for number in range(_num_labels(folder))) if config["task_type"] == "SEQ_CLS" else ()
    encoding = Encoding(max_length=4096, truncation="right", labels=labels)
    return AdapterFacts(config["task_type"], config["peft_type"].lower(), found, config.get("revision"), encoding=encoding)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise LoadError(f"{path} holds no mapping")
    return data


def _num_labels(folder: Path) -> int:
    """Rows of the saved head's last matrix."""
    heads = ("classifier", "score", "out_proj", "logits_proj")
    state = read_tensors(folder / TENSORS)
    sizes = [tensor.shape[0] for name, tensor in state.items() if name.endswith(tuple(f"{head}.weight" for head in heads))]
    if not sizes:
        raise LoadError(f"{folder} has no classification head: its number of classes is not known")
    return int(sizes[-1])


def load_into(base: PreTrainedModel, folder: Path, method: str, missing: set[str]) -> nn.Module:
    """Put the adapter of a folder onto a fresh base model; for `full` the base is the model.

    Args:
        base: the base model.
        folder: the adapter folder.
        method: its method.
        missing: weights of the base that its checkpoint lacks: the adapter must bring them.

    Raises:
        LoadError: tensors are missing, unexpected or of another shape.
    """
    in_file = {} if method == "full" else read_tensors(folder / TENSORS)
    if random := sorted(missing - {name.removeprefix("base_model.model.") for name in in_file}):
        raise LoadError(f"neither {folder} nor its base has weights for {', '.join(random[:3])}: they would be random")
    if method == "full":
        return base.eval()
    return _load_subset(base, folder, in_file) if method == "head" else _load_peft(base, folder, in_file)


def _load_peft(base: PreTrainedModel, folder: Path, in_file: dict[str, torch.Tensor]) -> nn.Module:
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of here was settled before training
            model = PeftModel(base, config)
        _match_dtypes(model, in_file)
        if missing := sorted(adapter_state(model).keys() - in_file.keys()):
            raise LoadError(f"the adapter {folder} does not fit {type(base).__name__}: it lacks {', '.join(missing[:3])}")
        unexpected = sorted(model.load_adapter(str(folder), "default").unexpected_keys)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise LoadError(f"the adapter {folder} cannot be loaded onto {type(base).__name__}: {error}") from error
    if unexpected:
        raise LoadError(
            f"the adapter {folder} does not fit {type(base).__name__}: it has no place for {', '.join(unexpected[:3])}"
        )
    return model.eval()


def _match_dtypes(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Give modules that were saved whole the dtype they were trained in; PEFT would round them to that of the base."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            dtypes = {tensor.dtype for key, tensor in state.items() if key.startswith(f"{name}.")}
            if len(dtypes) == 1:
                module.modules_to_save.to(dtypes.pop())


def _load_subset(base: PreTrainedModel, folder: Path, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    own = dict(base.named_parameters(remove_duplicate=False))
    if unknown := sorted(state.keys() - own.keys()):
        raise LoadError(f"the adapter {folder} has tensors that {type(base).__name__} has not: {unknown[:3]}")
    output = base.get_output_embeddings()
    if is_tied(base) and any(own[name] is output.weight for name in state):
        output.weight = nn.Parameter(output.weight.detach().clone())
        base.config.tie_word_embeddings = False
        own = dict(base.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in state.items():
            if own[name].shape != tensor.shape:
                raise LoadError(
                    f"the adapter {folder} has {name} of shape {tuple(tensor.shape)}, the base {tuple(own[name].shape)}"
                )
            own[name].copy_(tensor)
    return base.eval()


def write_model_card(path: Path, facts: AdapterFacts, metrics: dict[str, Any], certificate: dict[str, Any]) -> None:
    """README.md of the adapter folder: base, task, method, metrics, certificate."""
    header = {
        "base_model": facts.base,
        "library_name": "transformers" if facts.method == "full" else "peft",
        "tags": [facts.method],
    }
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in header.items()),
        "---",
        "",
        f"# {facts.method} for {facts.base}",
        "",
    ]
    lines += [f"Trained for {facts.task} with peftkit on rows in `{facts.format}` format.", ""]
    for split, values in metrics.items():
        lines.append(f"- {split}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    lines.append(f"- certificate: largest difference of logits after reload {certificate['max_abs_diff']:.3g}")
    write_text(path / "README.md", "\n".join(lines) + "\n")
