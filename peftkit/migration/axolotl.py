"""axolotl: its keys (read: release 0.19.0, utils/schemas and the arguments of its integrations) and what they mean here."""

from __future__ import annotations

from peftkit.migration import shared, steps
from peftkit.migration.axolotl_data import read_data
from peftkit.migration.axolotl_left_out import IGNORED, NO_EQUAL
from peftkit.migration.base import Draft, Move, Tool, is_on, listed, same, spread

_ATTENTION = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
}
_TRACKERS = {
    "wandb": ("use_wandb", "wandb_project"),
    "mlflow": ("use_mlflow", "mlflow_experiment_name"),
    "tensorboard": ("use_tensorboard",),
    "trackio": ("use_trackio", "trackio_project_name"),
}
_PARALLEL = {
    "context_parallel_size": "context_parallel",
    "sequence_parallel_degree": "context_parallel",
    "tensor_parallel_size": "tensor_parallel",
    "dp_shard_size": "fsdp2",
    "dp_replicate_size": "fsdp2",
}


def _task(draft: Draft) -> None:
    draft.add("task", "CAUSAL_LM", "axolotl trains causal language models")
    rl = draft.get("rl")
    if rl is not None:
        draft.refuse("rl", f"`{rl}`: preference and reinforcement learning cannot be had here; {shared.TRAINS}")
    for key, what in (("reward_model", "reward models"), ("process_reward_model", "process reward models")):
        if draft.is_on(key):
            draft.refuse(key, f"{what} cannot be trained here; {shared.TRAINS}")
    if draft.get("datasets") is None and draft.get("pretraining_dataset") is None:
        draft.refuse("datasets", "is missing: this trains nothing; `peftkit merge`, `infer` and `evaluate` are commands here")
    if draft.is_on("processor_type") and draft.is_on("skip_prepare_dataset"):
        draft.refuse("processor_type", "rows with images or sound are learned so; peftkit learns from text alone")


def _model(draft: Draft) -> None:
    for key, ours in (("base_model", "name_or_path"), ("tokenizer_config", "tokenizer_name_or_path")):
        if draft.get(key) is not None:
            place = draft.place(str(draft.get(key)))
            draft.put(f"model.{ours}", place, key)
    if draft.get("base_model") is None:
        draft.refuse("base_model", "is missing: the base model")
    if draft.is_on("reinit_weights"):
        draft.put("model.init", "random", "reinit_weights")
    _attention(draft)
    template = draft.get("chat_template_jinja")
    if isinstance(template, str) and "{" not in template:
        place = draft.place(template)
        draft.put("model.chat_template", place, "chat_template_jinja")
    elif template is not None:
        draft.drop("chat_template_jinja", "write the text into a file, and name it by `model.chat_template`", "no_equal")


def _attention(draft: Draft) -> None:
    steps.attention(draft, "attn_implementation")
    for key, kernel in _ATTENTION.items():
        if draft.is_on(key) and draft.get("attn_implementation") is None:
            draft.put("model.attn_implementation", kernel, key)
        else:
            draft.drop(key, "is off, or attn_implementation says it")


def _method(draft: Draft) -> None:
    kind = draft.get("adapter")
    if kind not in (None, "lora", "qlora"):
        draft.refuse(
            "adapter",
            f"`{kind}` does not go over; lora, qlora and none (full fine-tuning) do, and `peftkit methods` names more",
        )
        return
    draft.put("adapter.method", "lora", "adapter")
    if kind is None:
        draft.add("adapter.method", "full", "axolotl trains the whole model without `adapter`")
        for key in (*_LORA, *_LORA_READ):
            draft.drop(key, "has no effect without `adapter: lora`")
        return
    targets = draft.get("lora_target_modules", [])
    if draft.is_on("lora_target_linear"):
        draft.put("adapter.target_modules", "all-linear", "lora_target_linear", "lora_target_modules")
    elif is_on(targets):
        draft.put("adapter.target_modules", steps.lora_targets(targets, "all-linear"), "lora_target_modules")
    if draft.get("lora_target_parameters") is not None:
        draft.put("adapter.target_parameters", listed(draft.get("lora_target_parameters")), "lora_target_parameters")
    _loftq(draft)


def _loftq(draft: Draft) -> None:
    made = draft.get("peft")
    config = made.get("loftq_config") if isinstance(made, dict) else None
    if isinstance(config, dict):
        draft.put("adapter.init_lora_weights", "loftq", "peft")
        draft.put("adapter.loftq_config", {"loftq_bits": config.get("loftq_bits", 4)}, "peft")


def _quantization(draft: Draft) -> None:
    bits = 4 if draft.is_on("load_in_4bit") else 8 if draft.is_on("load_in_8bit") else None
    further = draft.get("bnb_config_kwargs", {})
    if bits is None or not isinstance(further, dict):
        draft.drop("bnb_config_kwargs", "has no effect: nothing is quantised while it is loaded")
        return
    names = {
        "bnb_4bit_quant_type": "quant_type",
        "bnb_4bit_use_double_quant": "double_quant",
        "llm_int8_threshold": "llm_int8_threshold",
    }
    made = {"bits": bits} | {ours: further[theirs] for theirs, ours in names.items() if theirs in further}
    others = [name for name in further if name not in names]
    why = f"{', '.join(others)} is decided here" if others else ""
    draft.put("model.quantization", made, f"load_in_{bits}bit", "bnb_config_kwargs", why=why)


def _precision(draft: Draft) -> None:
    for key, dtype, kind in (("bfloat16", "bfloat16", "bf16"), ("float16", "float16", "fp16"), ("float32", "float32", "no")):
        if draft.is_on(key):
            draft.put("training.mixed_precision", kind, key)
            draft.put(
                "model.dtype", dtype, key, why="weights that are trained are kept in float32 here" if kind != "no" else ""
            )
    if draft.get("bf16") == "full":
        draft.put("training.mixed_precision", "bf16", "bf16", why="weights that are trained are kept in float32 here")
    else:
        steps.precision(draft)


def _batch(draft: Draft) -> None:
    if draft.get("batch_size") is None:
        steps.batch(draft, "micro_batch_size", "gradient_accumulation_steps", 1)
        return
    draft.put("training.batch_size", draft.get("batch_size"), "batch_size", why=steps.BATCH)
    draft.put("training.micro_batch_size", draft.get("micro_batch_size", 1), "micro_batch_size")
    draft.drop("gradient_accumulation_steps", "follows from batch_size over micro_batch_size, there too")


def _schedule(draft: Draft) -> None:
    steps.length_of_run(draft, "num_epochs")
    steps.optimizer(draft, "optimizer")
    steps.schedule(draft, "lr_scheduler")
    if draft.get("lr_scheduler") is None:
        draft.add("training.lr_scheduler_type", "cosine")
    ratio = draft.get("cosine_min_lr_ratio")
    if ratio is not None and draft.value("training.lr_scheduler_type") == "cosine":
        draft.put("training.lr_scheduler_type", "cosine_with_min_lr", "lr_scheduler", "cosine_min_lr_ratio")
        draft.put("training.lr_scheduler_kwargs", {"min_lr_rate": ratio}, "cosine_min_lr_ratio")
    draft.number("learning_rate", 0.0)


def _evaluation(draft: Draft) -> None:
    steps.evaluation(draft, "eval_batch_size")
    for key in ("evals_per_epoch", "saves_per_epoch"):
        times, ours = draft.get(key), "training.eval_steps" if "eval" in key else "training.save_steps"
        has_effect = key == "saves_per_epoch" or "data.validation" in draft.entries
        if not has_effect:
            draft.drop(key, "there are no rows to evaluate on")
        elif times == 1 or not times:
            draft.drop(key, f"is when peftkit does, unless {ours} says otherwise")
        else:
            draft.drop(key, f"once an epoch here; `{ours}` is a number of steps, which `peftkit plan` counts", "changed")
    patience = draft.get("early_stopping_patience")
    if is_on(patience) and "data.validation" in draft.entries:
        draft.put("training.early_stopping_patience", patience, "early_stopping_patience")
    else:
        draft.drop("early_stopping_patience", "is off, or there are no rows to evaluate on")
    steps.saving(draft)


def _trackers(draft: Draft) -> None:
    named = [name for name, keys in _TRACKERS.items() if any(map(draft.is_on, keys)) and draft.get(keys[0]) is not False]
    keys = [key for name in named for key in _TRACKERS[name]]
    draft.put("output.report_to", named, *keys)
    for key in {key for keys_of in _TRACKERS.values() for key in keys_of}.difference(keys):
        draft.drop(key, "is off")


def _launch(draft: Draft) -> None:
    steps.launch(draft)
    for key, file in _PARALLEL.items():
        if draft.number(key, 1) > 1:
            steps.launched(draft, key, f"configs/{file}.yaml")
        else:
            draft.drop(key, "is 1")
    steps.checkpointing(draft, "gradient_checkpointing")
    offloading = draft.get("activation_offloading")
    if is_on(offloading):
        why = "" if offloading is True else "to the CPU's memory, whatever was asked for"
        draft.put("training.activation_offloading", True, "activation_offloading", why=why)
    else:
        draft.drop("activation_offloading", "is off")


def _compile(draft: Draft) -> None:
    value = draft.get("torch_compile")
    if value == "auto":
        draft.drop("torch_compile", "nothing is compiled unless the recipe says `true`", "changed")
    elif value is not None:
        draft.put("training.torch_compile", is_on(value), "torch_compile")


_LORA = {
    "lora_r": Move("adapter.r"),
    "lora_alpha": Move("adapter.lora_alpha"),
    "lora_dropout": Move("adapter.lora_dropout"),
    "lora_modules_to_save": Move("adapter.modules_to_save"),
    "lora_rank_pattern": Move("adapter.rank_pattern"),
    "lora_alpha_pattern": Move("adapter.alpha_pattern"),
    "peft_layers_to_transform": Move("adapter.layers_to_transform"),
    "peft_layers_pattern": Move("adapter.layers_pattern"),
    "peft_use_dora": Move("adapter.use_dora"),
    "peft_use_rslora": Move("adapter.use_rslora"),
    "peft_layer_replication": Move("adapter.layer_replication"),
    "peft_init_lora_weights": Move("adapter.init_lora_weights"),
    "peft_trainable_token_indices": Move("adapter.trainable_token_indices"),
    "peft_ensure_weight_tying": Move("adapter.ensure_weight_tying"),
    "loraplus_lr_ratio": Move("training.loraplus_lr_ratio"),
    "loraplus_lr_embedding": Move("training.loraplus_lr_embedding"),
}
_LORA_READ = {
    "lora_target_modules": Move("adapter.target_modules"),
    "lora_target_linear": Move("adapter.target_modules: all-linear"),
    "lora_target_parameters": Move("adapter.target_parameters"),
    "peft": Move("adapter.loftq_config"),
}
_LONGER = "longer rows are left out in silence there and are an error here; `data.truncation: drop` leaves them out"

READ = {
    "base_model": Move("model.name_or_path"),
    "tokenizer_config": Move("model.tokenizer_name_or_path"),
    "reinit_weights": Move("model.init: random"),
    "chat_template_jinja": Move("model.chat_template", "a file"),
    "attn_implementation": Move("model.attn_implementation"),
    **{key: Move(f"model.attn_implementation: {kernel}") for key, kernel in _ATTENTION.items()},
    "adapter": Move("adapter.method", "lora and qlora are lora; none is full"),
    **_LORA_READ,
    "load_in_4bit": Move("model.quantization: {bits: 4}"),
    "load_in_8bit": Move("model.quantization: {bits: 8}"),
    "bnb_config_kwargs": Move("model.quantization"),
    "bf16": Move("training.mixed_precision: bf16"),
    "fp16": Move("training.mixed_precision: fp16"),
    "bfloat16": Move("model.dtype: bfloat16", "weights that are trained are kept in float32 here"),
    "float16": Move("model.dtype: float16", "weights that are trained are kept in float32 here"),
    "float32": Move("model.dtype: float32"),
    "datasets": Move("data.train", "paths, types and columns; see below"),
    "pretraining_dataset": Move("data.train.streaming"),
    "streaming": Move("data.train.streaming"),
    "streaming_multipack_buffer_size": Move("data.shuffle_buffer_size"),
    "test_datasets": Move("data.validation"),
    "val_set_size": Move("data.validation", "a fraction; a number of rows becomes 0.1"),
    "sequence_len": Move("data.max_length", _LONGER),
    "excess_length_strategy": Move("data.truncation", values={"truncate": "right", "raise": "error", "drop": "drop"}),
    "sample_packing": Move("data.packing", "batch_size counts rows here, and packed sequences of many rows there"),
    "train_on_inputs": Move("data.train_on: all"),
    "micro_batch_size": shared.READ["per_device_train_batch_size"],
    "gradient_accumulation_steps": shared.READ["gradient_accumulation_steps"],
    "batch_size": Move("training.batch_size", steps.BATCH),
    "num_epochs": Move("training.num_train_epochs"),
    **{name: shared.READ[name] for name in ("max_steps", "max_grad_norm", "warmup_steps", "warmup_ratio")},
    "lr_scheduler_kwargs": shared.READ["lr_scheduler_kwargs"],
    "optimizer": Move("training.optim"),
    "lr_scheduler": Move("training.lr_scheduler_type", "left out, it is cosine there, and linear here: it is written out"),
    "cosine_min_lr_ratio": Move("training.lr_scheduler_kwargs: {min_lr_rate: ...}"),
    "eval_batch_size": Move("evaluation.batch_size"),
    "evals_per_epoch": Move("training.eval_steps", "a number of steps here; left out, once an epoch"),
    "saves_per_epoch": Move("training.save_steps", "a number of steps here; left out, once an epoch"),
    "early_stopping_patience": Move("training.early_stopping_patience"),
    **{
        key: shared.READ[key]
        for key in (
            "eval_strategy", "evaluation_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model",
            "save_strategy", "save_steps", "logging_steps", "deepspeed", "fsdp", "fsdp_config", "gradient_checkpointing",
        )
    },
    **{key: Move(f"output.report_to: [{name}]") for name, keys in _TRACKERS.items() for key in keys},
    **{key: Move("--launch", f"configs/{file}.yaml") for key, file in _PARALLEL.items()},
    "activation_offloading": Move("training.activation_offloading"),
    "torch_compile": Move("training.torch_compile"),
    "rl": Move("", f"refused: {shared.TRAINS}"),
    "reward_model": Move("", f"refused: {shared.TRAINS}"),
    "process_reward_model": Move("", f"refused: {shared.TRAINS}"),
}  # fmt: skip

AXOLOTL = Tool(
    name="axolotl",
    title="axolotl",
    version="0.19.0",
    moves={
        **_LORA,
        **same(
            "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon neftune_noise_alpha save_total_limit",
            "training",
        ),
        "adam_eps": Move("training.adam_epsilon"),
        "noisy_embedding_alpha": Move("training.neftune_noise_alpha"),
        "seed": shared.MOVES["seed"],
        "trust_remote_code": Move("model.trust_remote_code"),
        "revision_of_model": Move("model.revision"),
        "overrides_of_model_config": Move("model.config_overrides"),
        "model_config": Move("model.config_overrides"),
        "default_system_message": Move("data.system_prompt"),
        "chat_template_kwargs": Move("data.chat_template_kwargs"),
    },
    read=READ,
    no_equal=NO_EQUAL,
    ignored=IGNORED,
    refused=spread(
        {
            f"distillation and diffusion cannot be had here; {shared.TRAINS}": "kd_trainer diffusion",
        }
    ),
    steps=(
        _task,
        _model,
        _method,
        _quantization,
        _precision,
        read_data,
        _batch,
        _schedule,
        _evaluation,
        _trackers,
        _launch,
        _compile,
    ),
    defaults={
        "training.num_train_epochs": 1.0,
        "training.seed": 42,
        "data.max_length": 512,
    },
)
