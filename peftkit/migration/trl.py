"""TRL's SFT: its keys (read: release 1.16.0, SFTConfig, ModelConfig, arguments of its script) and what they mean here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkit.migration import shared, steps
from peftkit.migration.base import Draft, Move, Tool, is_on, listed, same, spread
from peftkit.migration.trl_data import LEARNED, LONGER, read_data

_DEVICES = ("num_processes", "nproc_per_node")
_BITS = {"load_in_4bit": 4, "load_in_8bit": 8}
_BNB = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")


def _command(draft: Draft) -> None:
    command = draft.config.command
    if command not in ("", "sft"):
        draft.refuse("", f"`trl {command}` cannot be had here; {shared.TRAINS}")
    draft.put("task", "CAUSAL_LM", "lora_task_type")
    draft.add("task", "CAUSAL_LM", "what SFT trains")
    if draft.get("lora_task_type", "CAUSAL_LM") != "CAUSAL_LM":
        draft.refuse("lora_task_type", f"`{draft.get('lora_task_type')}`: {shared.TRAINS}")
    name = draft.get("model_name_or_path")
    if name is None:
        draft.refuse("model_name_or_path", "is missing: the base model")
    else:
        draft.put("model.name_or_path", draft.place(name), "model_name_or_path")


def _model(draft: Draft) -> None:
    revision = draft.get("model_revision", "main")
    if revision != "main":
        draft.put("model.revision", revision, "model_revision")
    else:
        draft.drop("model_revision", "is the default")
    key = "dtype" if draft.get("dtype") is not None else "torch_dtype"
    dtype = str(draft.get(key, "float32"))
    if dtype in ("auto", "float32", "bfloat16", "float16"):
        draft.put("model.dtype", dtype, key)
        draft.add("model.dtype", dtype)
    else:
        draft.drop(key, f"`{dtype}` is no type here; `auto` is taken", "no_equal")
    steps.attention(draft, "attn_implementation")
    template = draft.get("chat_template_path")
    if template is not None and Path(str(template)).suffix in (".jinja", ".jinja2"):
        draft.put("model.chat_template", draft.place(template), "chat_template_path")
    elif template is not None:
        draft.drop(
            "chat_template_path",
            "a model's template is copied there; `model.chat_template` takes the Jinja file itself",
            "no_equal",
        )


def _method(draft: Draft) -> None:
    if not draft.is_on("use_peft"):
        draft.put("adapter.method", "full", "use_peft")
        draft.add("adapter.method", "full", "TRL trains the whole model without use_peft")
        for key in (*_LORA, "lora_target_modules"):
            draft.drop(key, "has no effect without use_peft")
        return
    draft.put("adapter.method", "lora", "use_peft")
    for name, value in (("r", 16), ("lora_alpha", 32), ("lora_dropout", 0.05)):
        key = "lora_r" if name == "r" else name
        if draft.get(key) is None:
            draft.add(f"adapter.{name}", value)
    if is_on(draft.get("lora_target_modules")):
        draft.put(
            "adapter.target_modules", steps.lora_targets(draft.get("lora_target_modules"), "all-linear"), "lora_target_modules"
        )
    for key in ("lora_modules_to_save", "lora_target_parameters"):
        if draft.get(key) is not None:
            draft.put(_LORA[key].ours, listed(draft.get(key)), key)


def _quantization(draft: Draft) -> None:
    key = next((key for key in _BITS if draft.is_on(key)), None)
    if key is None:
        for name in (*_BITS, *_BNB):
            draft.drop(name, "nothing is quantised while it is loaded")
        return
    made: dict[str, Any] = {"bits": _BITS[key]}
    if key == "load_in_4bit":
        made |= {"double_quant": draft.is_on("use_bnb_nested_quant")}
        made |= {
            ours: draft.get(f"bnb_4bit_{ours}") for ours in ("quant_type", "quant_storage") if draft.get(f"bnb_4bit_{ours}")
        }
    draft.put("model.quantization", made, key, *(_BNB if key == "load_in_4bit" else ()))


def _training(draft: Draft) -> None:
    devices = next((draft.get(key) for key in _DEVICES if isinstance(draft.get(key), int)), 1)
    steps.batch(draft, "per_device_train_batch_size", "gradient_accumulation_steps", 8, devices)
    for key in _DEVICES:
        draft.drop(key, "is in `training.batch_size`; `peftkit train --processes N` starts as many", "changed")
    steps.length_of_run(draft, "num_train_epochs")
    steps.optimizer(draft, "optim")
    steps.schedule(draft, "lr_scheduler_type")
    if draft.get("bf16") is None and not draft.is_on("fp16"):
        draft.add("training.mixed_precision", "bf16")
    steps.precision(draft)
    steps.evaluation(draft, "per_device_eval_batch_size")
    steps.saving(draft)
    steps.trackers(draft)
    for key in ("activation_checkpointing", "gradient_checkpointing"):
        steps.checkpointing(draft, key)
    draft.add("training.gradient_checkpointing", True)
    _launch(draft)


def _launch(draft: Draft) -> None:
    steps.launch(draft)
    for key in ("accelerate_config", "config_file"):
        name = str(draft.get(key, ""))
        file = next((ours for theirs, ours in _LAUNCH_FILES.items() if theirs in Path(name).name), "")
        if file:
            steps.launched(draft, key, f"configs/{file}.yaml")
        else:
            draft.drop(key, "names a launch file of accelerate, which `peftkit train --launch FILE` takes too", "changed")


_LAUNCH_FILES = {
    "zero1": "deepspeed_zero2",
    "zero2": "deepspeed_zero2",
    "zero3": "deepspeed_zero3",
    "fsdp": "fsdp2",
    "context": "context_parallel",
    "multi_gpu": "ddp",
    "single_gpu": "single",
}
_LORA = {
    "lora_r": Move("adapter.r"),
    "lora_alpha": Move("adapter.lora_alpha"),
    "lora_dropout": Move("adapter.lora_dropout"),
    "use_rslora": Move("adapter.use_rslora"),
    "use_dora": Move("adapter.use_dora"),
    "lora_modules_to_save": Move("adapter.modules_to_save"),
    "lora_target_parameters": Move("adapter.target_parameters"),
}
TRL = Tool(
    name="trl",
    title="TRL",
    version="1.16.0",
    moves={
        **shared.MOVES,
        **_LORA,
        **same("trust_remote_code", "model"),
        "activation_offloading": Move("training.activation_offloading"),
    },
    read={
        **shared.READ,
        "model_name_or_path": Move("model.name_or_path"),
        "model_revision": Move("model.revision"),
        "dtype": Move("model.dtype", "float32 is the default there, and `auto` here: it is written out"),
        "torch_dtype": Move("model.dtype"),
        "attn_implementation": Move("model.attn_implementation"),
        "chat_template_path": Move("model.chat_template", "the Jinja file itself"),
        "use_peft": Move("adapter.method", "lora, or full without it"),
        "lora_task_type": Move("task"),
        "lora_target_modules": Move("adapter.target_modules"),
        "load_in_4bit": Move("model.quantization: {bits: 4}"),
        "load_in_8bit": Move("model.quantization: {bits: 8}"),
        "bnb_4bit_quant_type": Move("model.quantization.quant_type"),
        "bnb_4bit_quant_storage": Move("model.quantization.quant_storage"),
        "use_bnb_nested_quant": Move(
            "model.quantization.double_quant", "left out, it is off there and on here: it is written out"
        ),
        "dataset_name": Move("data.train.path"),
        "dataset_config": Move("data.train.config"),
        "dataset_train_split": Move("data.train.split"),
        "dataset_test_split": Move("data.validation.split", "where eval_strategy asks for an evaluation"),
        "dataset_streaming": Move("data.train.streaming"),
        "datasets": Move("data.train", "a list of sources"),
        "streaming": Move("data.train.streaming"),
        "test_split_size": Move("data.validation"),
        "dataset_text_field": Move("data.train.columns: {text: NAME}"),
        "completion_only_loss": Move("data.train_on", LEARNED),
        "assistant_only_loss": Move("data.train_on: assistant"),
        "max_length": Move("data.max_length", LONGER),
        "max_seq_length": Move("data.max_length", LONGER),
        "truncation_mode": Move("data.truncation"),
        "packing": Move("data.packing", "packed rows never see each other, and batch_size counts rows here"),
        "num_processes": Move("training.batch_size", "and `peftkit train --processes N`"),
        "nproc_per_node": Move("training.batch_size", "and `peftkit train --processes N`"),
        "accelerate_config": Move("--launch", "configs/*.yaml"),
        "config_file": Move("--launch", "configs/*.yaml"),
    },
    no_equal=shared.NO_EQUAL
    | spread(
        {
            "the base is loaded as its checkpoint has it": "model_init_kwargs",
            "the loss is the cross-entropy of what is learned": "loss_type router_aux_loss_coef",
            "the tokenizer stays as it is; `peftkit data` shows which end token is learned": "eos_token pad_token",
            "rows are read as they are": "dataset_kwargs",
            "code of the hub's repositories runs by `model.trust_remote_code` alone": "model_code_revision",
        }
    ),
    ignored=shared.IGNORED
    | spread(
        {
            shared.SPEED: """
                dataset_num_proc dataset_batch_size padding_free pad_to_multiple_of eval_packing use_liger
                gradient_checkpointing_use_reentrant
            """,
            "rows are always shuffled, by training.seed": "shuffle_dataset",
            "rows of a step fill sequences of max_length, the longest first": "packing_strategy",
            shared.LAUNCHED: """
                ignore_bias_buffers env num_machines machine_rank main_process_ip main_process_port
                mixed_precision multi_gpu num_cpu_threads_per_process dynamo_backend nnodes node_rank
                master_addr master_port rdzv_endpoint rdzv_backend gpu_ids debug
            """,
        }
    ),
    refused=spread(
        {
            f"belongs to preference or reinforcement learning or distillation, which cannot be had here; {shared.TRAINS}": """
                beta loss_weights ref_model_mixup_alpha ref_model_sync_steps sync_ref_model
                precompute_ref_log_probs f_divergence_type ld_alpha discopop_tau num_generations
                reward_model_path reward_model_name_or_path reward_funcs max_completion_length max_prompt_length
                use_vllm vllm_mode desirable_weight undesirable_weight center_rewards_coefficient epsilon
                num_iterations scale_rewards teacher_model_name_or_path lmbda judge missing_eos_penalty kl_coef
                cliprange num_ppo_epochs sft_model_path
            """,
        }
    ),
    steps=(_command, _model, _method, _quantization, read_data, _training),
    defaults={
        "training.learning_rate": 2e-5,
        "training.num_train_epochs": 3.0,
        "training.seed": 42,
    },
    logging_steps=10,
)
