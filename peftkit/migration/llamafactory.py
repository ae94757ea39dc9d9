"""LLaMA-Factory: its keys (read: release 0.9.5, src/llamafactory/hparams) and what they mean here."""

from __future__ import annotations

from peftkit.migration import shared, steps
from peftkit.migration.base import Draft, Move, Tool, is_on, listed, same, spread
from peftkit.migration.llamafactory_data import read_data

_LONGER = "rows that are longer are cut in silence there and are an error here; `data.truncation: right` cuts them"
_STAGES = {
    "rm": "reward models",
    "ppo": "PPO",
    "dpo": "DPO (and ORPO, SimPO and others)",
    "kto": "KTO",
}
_ATTENTION = {"fa2": "flash_attention_2", "flash_attention2": "flash_attention_2", "fa3": "flash_attention_3", "sdpa": "sdpa"}


def _stage(draft: Draft) -> None:
    stage = str(draft.get("stage", "sft"))
    if stage in _STAGES:
        draft.refuse("stage", f"`{stage}`: {_STAGES[stage]} cannot be trained here; {shared.TRAINS}")
    elif stage not in ("sft", "pt"):
        draft.refuse(
            "stage", f"`{stage}` is no stage of LLaMA-Factory; of pt, sft, rm, ppo, dpo, kto the first two can be trained here"
        )
    draft.put("task", "CAUSAL_LM", "stage")
    if draft.get("export_dir") is not None:
        draft.refuse(
            "export_dir", "this exports a model and trains none; the command is `peftkit merge --adapter RUN --output DIR`"
        )
    elif draft.get("dataset") is None and draft.get("eval_dataset") is not None:
        draft.refuse("eval_dataset", "this evaluates and trains nothing; the command is `peftkit evaluate RUN --data FILE`")
    elif draft.get("dataset") is None:
        draft.refuse("dataset", "is missing: this trains nothing; to talk to a model, `peftkit infer` is the command")


def _method(draft: Draft) -> None:
    kind = str(draft.get("finetuning_type", "lora"))
    if kind not in ("lora", "oft", "full"):
        what = "`freeze` trains some layers whole, which no method here does" if kind == "freeze" else f"`{kind}` is unknown"
        draft.refuse("finetuning_type", f"{what}; lora, oft and full go over, and `peftkit methods` names what else there is")
        return
    draft.put("adapter.method", kind, "finetuning_type")
    draft.add("adapter.method", kind)
    {"lora": _lora, "oft": _oft, "full": _full}[kind](draft)


def _lora(draft: Draft) -> None:
    rank = draft.get("lora_rank", 8)
    draft.put("adapter.r", rank, "lora_rank")
    if draft.get("lora_alpha") is not None:
        draft.put("adapter.lora_alpha", draft.get("lora_alpha"), "lora_alpha")
    elif isinstance(rank, int):
        draft.add("adapter.lora_alpha", 2 * rank, "twice lora_rank, the default of LLaMA-Factory")
    _targets(draft, "lora_target")
    if draft.is_on("pissa_init"):
        rounds = draft.get("pissa_iter", 16)
        init = f"pissa_niter_{rounds}" if rounds != -1 else "pissa"
        draft.put("adapter.init_lora_weights", init, "pissa_init", "pissa_iter")
    for key in ("loraplus_lr_ratio", "loraplus_lr_embedding"):
        if draft.get(key) is not None and draft.get("loraplus_lr_ratio") is not None:
            draft.put(f"training.{key}", draft.get(key), key)
    _leave(draft, "oft_rank oft_block_size oft_target module_dropout", "belongs to finetuning_type: oft")


def _oft(draft: Draft) -> None:
    rank = draft.get("oft_rank", 0)
    if rank:
        draft.put("adapter.r", rank, "oft_rank")
        draft.add("adapter.oft_block_size", 0, "the blocks follow from r")
    elif draft.get("oft_block_size") is not None:
        draft.put("adapter.oft_block_size", draft.get("oft_block_size"), "oft_block_size")
    if draft.get("module_dropout") is not None:
        draft.put("adapter.module_dropout", draft.get("module_dropout"), "module_dropout")
    _targets(draft, "oft_target")
    _leave(draft, _LORA_ONLY, "belongs to finetuning_type: lora")


def _full(draft: Draft) -> None:
    _leave(draft, f"{_LORA_ONLY} oft_rank oft_block_size oft_target module_dropout", "has no effect in full fine-tuning")
    _leave(draft, "additional_target", "every module is trained")


def _targets(draft: Draft, key: str) -> None:
    draft.put("adapter.target_modules", steps.lora_targets(draft.get(key, "all"), "all"), key)
    if not draft.get(key):
        draft.add("adapter.target_modules", "all-linear")
    if draft.get("additional_target") is not None:
        draft.put("adapter.modules_to_save", listed(draft.get("additional_target")), "additional_target")


def _leave(draft: Draft, names: str, why: str) -> None:
    for key in names.split():
        draft.drop(key, why)


def _quantization(draft: Draft) -> None:
    bits = draft.get("quantization_bit")
    keys = ("quantization_method", "quantization_type", "double_quantization")
    if bits is None:
        _leave(draft, " ".join(("quantization_bit", *keys)), "nothing is quantised while it is loaded")
        return
    method = {"bnb": "bitsandbytes", "bitsandbytes": "bitsandbytes", "hqq": "hqq"}.get(
        str(draft.get("quantization_method", "bnb"))
    )
    if method is None:
        draft.refuse(
            "quantization_method", f"`{draft.get('quantization_method')}` cannot be had here; bitsandbytes, hqq and torchao can"
        )
    made = {"bits": bits}
    if method == "hqq":
        made["method"] = method
    elif bits == 4:
        made |= {"quant_type": draft.get("quantization_type", "nf4")} if draft.get("quantization_type", "nf4") != "nf4" else {}
        made |= {"double_quant": False} if draft.get("double_quantization") is False else {}
    draft.put("model.quantization", made, "quantization_bit", *keys)


def _precision(draft: Draft) -> None:
    if draft.is_on("pure_bf16"):
        draft.put("model.dtype", "bfloat16", "pure_bf16")
        draft.put("training.mixed_precision", "bf16", "pure_bf16", why="weights that are trained are kept in float32 here")
    steps.precision(draft)


def _checkpointing(draft: Draft) -> None:
    _leave(draft, "gradient_checkpointing activation_checkpointing", "disable_gradient_checkpointing alone decides there")
    if draft.is_on("disable_gradient_checkpointing"):
        draft.put("training.gradient_checkpointing", False, "disable_gradient_checkpointing")
        draft.add("training.gradient_checkpointing", False)
    else:
        draft.drop("disable_gradient_checkpointing", "is off")
        draft.add("training.gradient_checkpointing", True)


def _generation(draft: Draft) -> None:
    """What LLaMA-Factory's own defaults of sampling are is of interest only where the file states some of them."""
    stated = [key for key in _GENERATION if draft.get(key) is not None]
    for key in stated:
        if key in _SAMPLING and draft.get("do_sample") is False:
            draft.drop(key, "has no effect without sampling")
        else:
            draft.put(f"generation.{key}", draft.get(key), key)
    if {*stated} & {*_SAMPLING} and draft.get("do_sample") is None:
        draft.add("generation.do_sample", True)


def _shared(draft: Draft) -> None:
    steps.batch(draft, "per_device_train_batch_size", "gradient_accumulation_steps", 8)
    steps.length_of_run(draft, "num_train_epochs")
    steps.optimizer(draft, "optim")
    steps.schedule(draft, "lr_scheduler_type")
    steps.evaluation(draft, "per_device_eval_batch_size")
    steps.saving(draft)
    steps.trackers(draft)
    steps.launch(draft)
    if draft.is_on("train_from_scratch"):
        draft.put("model.init", "random", "train_from_scratch")
    attention = str(draft.get("flash_attn", "auto"))
    if attention in _ATTENTION:
        draft.put("model.attn_implementation", _ATTENTION[attention], "flash_attn")
    elif attention in ("disabled", "False"):
        draft.put("model.attn_implementation", "eager", "flash_attn")
    else:
        draft.drop("flash_attn", "transformers picks what fits the model, as it does there")
    if is_on(draft.get("model_revision")) and draft.get("model_revision") != "main":
        draft.put("model.revision", draft.get("model_revision"), "model_revision")
    else:
        draft.drop("model_revision", "is the default")


_LORA_ONLY = """
    lora_rank lora_alpha lora_dropout lora_target loraplus_lr_ratio loraplus_lr_embedding use_rslora use_dora pissa_init
    pissa_iter pissa_convert
"""
_SAMPLING = ("temperature", "top_p", "top_k")
_GENERATION = ("do_sample", *_SAMPLING, "num_beams", "max_new_tokens", "repetition_penalty")
_NO_OPTIMIZER = "is no optimizer here; adamw_torch_fused is taken, which needs more memory and another learning rate"
_V1 = "the layout of LLaMA-Factory's v1 trainer is not read; that of v0 (model_name_or_path, stage, dataset) is"
_MEGATRON = "Megatron is not used here; `--launch configs/...` divides a model by FSDP2, DeepSpeed or tensor parallelism"

LLAMAFACTORY = Tool(
    name="llamafactory",
    title="LLaMA-Factory",
    version="0.9.5",
    moves={
        **shared.MOVES,
        **same("use_rslora use_dora lora_dropout", "adapter"),
        **same("trust_remote_code", "model"),
    },
    read={
        **shared.READ,
        "stage": Move("task: CAUSAL_LM", "sft and pt; what is learned follows from the rows"),
        "finetuning_type": Move("adapter.method", "lora, oft and full"),
        "model_name_or_path": Move("model.name_or_path"),
        "model_revision": Move("model.revision"),
        "train_from_scratch": Move("model.init: random"),
        "flash_attn": Move("model.attn_implementation"),
        "lora_rank": Move("adapter.r"),
        "lora_alpha": Move("adapter.lora_alpha", "left out, it is twice the rank there, and 8 here: it is written out"),
        "lora_target": Move("adapter.target_modules", "`all` is all-linear"),
        "additional_target": Move("adapter.modules_to_save"),
        "pissa_init": Move("adapter.init_lora_weights: pissa"),
        "pissa_iter": Move("adapter.init_lora_weights: pissa_niter_N"),
        **same("loraplus_lr_ratio loraplus_lr_embedding", "training"),
        "oft_rank": Move("adapter.r"),
        "oft_block_size": Move("adapter.oft_block_size"),
        "oft_target": Move("adapter.target_modules"),
        "module_dropout": Move("adapter.module_dropout"),
        "quantization_bit": Move("model.quantization.bits"),
        "quantization_method": Move("model.quantization.method", "bnb and hqq"),
        "quantization_type": Move("model.quantization.quant_type"),
        "double_quantization": Move("model.quantization.double_quant"),
        "pure_bf16": Move("model.dtype: bfloat16", "weights that are trained are kept in float32 here"),
        "disable_gradient_checkpointing": Move(
            "training.gradient_checkpointing",
            "checkpointing is on there unless it is disabled, and off here: it is written out",
        ),
        "dataset": Move("data.train", "names are looked up in dataset_info.json"),
        "eval_dataset": Move("data.validation"),
        "dataset_dir": Move("data.train.path"),
        "max_samples": Move("data.train.max_rows"),
        "val_size": Move("data.validation", "a fraction; a number of rows becomes 0.1"),
        "mix_strategy": Move("data.stopping_strategy", "interleaving is by data.train.weight"),
        "interleave_probs": Move("data.train.weight"),
        "streaming": Move("data.train.streaming"),
        "buffer_size": Move("data.shuffle_buffer_size"),
        "cutoff_len": Move("data.max_length", _LONGER),
        "train_on_prompt": Move("data.train_on: all"),
        "mask_history": Move("data.train_on: last_turn"),
        "packing": Move("data.packing", "packed rows see each other there unless neat_packing is on; here they never do"),
        "neat_packing": Move("data.packing", "batch_size counts rows here, and packed sequences of many rows there"),
        "default_system": Move("data.system_prompt"),
        "enable_thinking": Move("data.chat_template_kwargs", "only where the tokenizer's own template knows the variable"),
        "overwrite_cache": Move("data.cache: false", "rows are found again by what is in them, so that nothing is stale"),
        **{key: Move(f"generation.{key}") for key in _GENERATION},
    },
    no_equal=shared.NO_EQUAL
    | spread(
        {
            shared.TEMPLATE: "template tool_format",
            shared.IMAGES: """
                image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels
                video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate
                freeze_vision_tower freeze_multi_modal_projector freeze_language_model media_dir
            """,
            _NO_OPTIMIZER: "use_galore use_apollo use_badam use_adam_mini use_muon",
            "belongs to an optimizer that there is not here": """
                galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise
                apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type
                apollo_scale_type apollo_layerwise apollo_scale_front badam_mode badam_start_block
                badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose
            """,
            "the loss is the cross-entropy of the answers": """
                use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha moe_aux_loss_coef
                ignore_pad_token_for_loss
            """,
            "training starts from a new adapter, not from one that is there": """
                adapter_name_or_path adapter_folder create_new_adapter
            """,
            "the model's layers are as its checkpoint has them": "rope_scaling shift_attn mixture_of_depths use_llama_pro",
            "belongs to finetuning_type: freeze, which no method here equals": """
                freeze_trainable_layers freeze_trainable_modules freeze_extra_modules
            """,
            "the vocabulary stays as it is; `adapter.trainable_token_indices` trains tokens that are there": """
                resize_vocab add_tokens add_special_tokens new_special_tokens_config init_special_tokens
            """,
            "special tokens in texts are read as such": "split_special_tokens",
            "the computation is in bf16, fp16 or float32": "fp8 fp8_backend fp8_enable_fsdp_float8_all_gather",
            _MEGATRON: """
                use_mca use_hyper_parallel hyper_parallel_args tensor_model_parallel_size
                pipeline_model_parallel_size expert_model_parallel_size sequence_parallel
                virtual_pipeline_model_parallel_size overlap_param_gather overlap_grad_reduce
                use_distributed_optimizer bias_activation_fusion apply_rope_fusion moe_grouped_gemm
                moe_token_dispatcher_type recompute_granularity
            """,
            "experts are not moved to the CPU": """
                use_kt kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num
                kt_lora_expert_intermediate_size kt_config
            """,
            "these kernels are not taken; peftkit's own shorter ways to the same loss are (training.fast_paths)": """
                use_unsloth use_unsloth_gc enable_liger_kernel use_v1_kernels
            """,
            "norms and logits are in the type of the computation": "upcast_layernorm upcast_lmhead_output",
            "training ends by its steps or evaluations; `training.early_stopping_patience` counts evaluations": """
                early_stopping_steps
            """,
            "rows are always shuffled": "disable_shuffling",
            "validation rows are measured together": "eval_on_each_dataset compute_accuracy",
            "earlier think blocks are as the tokenizer's template has them": "preserve_thinking",
            "SwanLab cannot be had here; tensorboard, wandb, mlflow and trackio can (output.report_to)": """
                use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key
                swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret
            """,
        }
    ),
    ignored=shared.IGNORED
    | spread(
        {
            shared.SPEED: """
                preprocessing_num_workers preprocessing_batch_size low_cpu_mem_usage use_fast_tokenizer
                use_reentrant_gc quantization_device_map offload_folder use_kv_cache device_map compute_dtype
                model_max_length block_diag_attn
            """,
            "tokenised rows are kept by themselves (data.cache)": "tokenized_path data_shared_file_system",
            "the hub's own cache and login are used": "cache_dir hf_hub_token ms_hub_token om_hub_token",
            "PiSSA is always saved as a plain LoRA of twice the rank": "pissa_convert",
            shared.LOGGING: """
                plot_loss include_effective_tokens_per_second print_param_status enable_torch_profiler
                profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps
                profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack
                profile_modules
            """,
            shared.LAUNCHED: """
                ray_num_workers ray_init_kwargs master_addr master_port ray_run_name ray_storage_path
                resources_per_worker placement_strategy
            """,
            "belongs to `peftkit merge` and `peftkit export`": """
                export_dir export_size export_device export_quantization_bit export_quantization_dataset
                export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id
            """,
            "belongs to `peftkit infer` and `peftkit serve`": """
                infer_backend infer_dtype vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank
                vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend
                max_length length_penalty skip_special_tokens eval_num_beams
            """,
            "belongs to `peftkit evaluate --harness`": "task task_dir batch_size lang n_shot save_dir download_mode",
            f"belongs to preference learning, which cannot be had here; {shared.TRAINS}": """
                pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight
                kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target
                ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit reward_model
                reward_model_adapters reward_model_quantization_bit reward_model_type ld_alpha
            """,
        }
    ),
    refused=spread(
        {
            _V1: """
                model model_class train_dataset peft_config dist_config kernel_config quant_config init_config
                sample_backend batching_strategy micro_batch_size
            """,
        }
    ),
    steps=(_stage, _method, _quantization, _precision, _checkpointing, read_data, _shared, _generation),
    defaults={
        "training.learning_rate": 5e-5,
        "training.num_train_epochs": 3.0,
        "data.max_length": 2048,
        "training.seed": 42,
    },
)
