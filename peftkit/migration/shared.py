"""Keys of transformers' TrainingArguments (read: 5.23.0, and older ones still in use), which LLaMA-Factory and TRL share."""

from __future__ import annotations

from peftkit.migration.base import Move, same, spread

TRAINS = "peftkit trains on answers (SFT), on text, and CAUSAL_LM learns the chosen answer of preference rows"
IMAGES = "peftkit learns from text alone; rows with images, videos or audio are refused"
TEMPLATE = (
    "the tokenizer's own chat template is used, not one of a list; look at the first rows with `peftkit data`, and name "
    "another by `model.chat_template`"
)
SPEED = "changes speed or memory and nothing that is learned; peftkit decides it"
LOGGING = "says how a run is logged; a run here always writes metrics.jsonl, train.log and its report"
HUB = "sends to the hub; `peftkit push RUN OWNER/NAME` does, when the run is done"
PLACES = "a run makes a folder of its own below `output.dir` (runs); `peftkit train --output DIR` names it"
COMMAND = "what to do is the command here: `peftkit train`, `evaluate`, `infer`"
RESUME = "`peftkit train RECIPE --output RUN --resume` goes on with a run"
GENERATED = "generated answers are measured by `evaluation.generation_metrics`, or by `peftkit evaluate --generation-metrics`"
GROUPED = "rows are shuffled by training.seed, and of a step those of like length go into one pass: the same rows and loss"
LAUNCHED = "how processes are started is the launch file's: `peftkit train RECIPE --launch configs/...`"

MOVES = {
    **same(
        "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon label_smoothing_factor neftune_noise_alpha "
        "torch_compile save_total_limit",
        "training",
    ),
    "run_name": Move("name"),
    "seed": Move("training.seed", "adapter, order of rows and dropout follow from it, but are not the same numbers as there"),
}

READ = {
    "per_device_train_batch_size": Move(
        "training.micro_batch_size",
        "`training.batch_size` is the number of rows of a whole step: this one x gradient_accumulation_steps x the devices",
    ),
    "gradient_accumulation_steps": Move("training.batch_size", "follows from batch_size over micro_batch_size"),
    "num_train_epochs": Move("training.num_train_epochs"),
    "max_steps": Move("training.max_steps"),
    "max_grad_norm": Move("training.max_grad_norm"),
    "optim": Move("training.optim"),
    "adafactor": Move("training.optim: adafactor"),
    "lr_scheduler_type": Move("training.lr_scheduler_type"),
    "lr_scheduler_kwargs": Move("training.lr_scheduler_kwargs"),
    "warmup_steps": Move("training.warmup_steps"),
    "warmup_ratio": Move("training.warmup_steps", "below 1 it is a fraction of all steps"),
    "bf16": Move("training.mixed_precision: bf16"),
    "fp16": Move("training.mixed_precision: fp16"),
    "gradient_checkpointing": Move("training.gradient_checkpointing"),
    "activation_checkpointing": Move("training.gradient_checkpointing"),
    "logging_steps": Move("training.logging_steps"),
    "eval_strategy": Move("training.eval_steps", "with validation rows, at the end of each epoch or every eval_steps"),
    "evaluation_strategy": Move("training.eval_steps", "see eval_strategy"),
    "eval_steps": Move("training.eval_steps"),
    "eval_on_start": Move("training.eval_on_start"),
    "per_device_eval_batch_size": Move("evaluation.batch_size"),
    "load_best_model_at_end": Move("training.load_best_model_at_end"),
    "metric_for_best_model": Move("training.metric_for_best_model"),
    "save_strategy": Move("training.save_steps", "always: at the end of each epoch or every save_steps"),
    "save_steps": Move("training.save_steps"),
    "report_to": Move("output.report_to"),
    "deepspeed": Move("--launch", "a launch file says it: configs/deepspeed_zero2.yaml or deepspeed_zero3.yaml"),
    "fsdp": Move("--launch", "a launch file says it: configs/fsdp2.yaml, for 4-bit bases fsdp2_qlora.yaml"),
    "fsdp_config": Move("--launch", "see fsdp"),
}  # fmt: skip

NO_EQUAL = spread(
    {
        "these kernels are not taken; peftkit's own shorter ways to the same loss are (training.fast_paths)": """
            use_liger_kernel liger_kernel_config
        """,
        "the optimizer has no further arguments; it trains what the adapter adds": "optim_args optim_target_modules",
        "NaN is never hidden: it ends the run with exit code 5": "logging_nan_inf_filter",
        "the order of rows follows from training.seed": "data_seed",
        "the last step of an epoch is trained on with the rows that are left": "dataloader_drop_last",
        "every evaluation that is due takes place": "eval_delay",
        "the seed is set, but no deterministic kernels are asked for": "full_determinism",
        "every checkpoint is whole, so that --resume is exact": "save_only_model",
    }
)

IGNORED = spread(
    {
        PLACES: "output_dir overwrite_output_dir logging_dir",
        LOGGING: """
            logging_strategy logging_first_step log_on_each_node log_level log_level_replica disable_tqdm
            project trackio_space_id trackio_bucket_id trackio_static_space_id include_num_input_tokens_seen
            skip_memory_metrics debug include_tokens_per_second
        """,
        HUB: """
            push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
            push_to_hub_token push_to_hub_model_id push_to_hub_organization
        """,
        COMMAND: "do_train do_eval do_predict prediction_loss_only",
        RESUME: "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint enable_jit_checkpoint",
        GENERATED: "predict_with_generate generation_max_length generation_num_beams generation_config sortish_sampler",
        LAUNCHED: """
            parallelism_config accelerator_config local_rank ddp_find_unused_parameters ddp_bucket_cap_mb
            ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout save_on_each_node use_cpu no_cuda
            use_mps_device ray_scope fsdp_transformer_layer_cls_to_wrap fsdp_min_num_params tpu_num_cores
            tpu_metrics_debug mp_parameters dispatch_batches split_batches
        """,
        SPEED: """
            tf32 dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
            dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
            remove_unused_columns length_column_name torch_compile_backend torch_compile_mode
            torch_empty_cache_steps use_cache gradient_checkpointing_kwargs activation_checkpointing_kwargs
            eval_do_concat_batches eval_use_gather_object eval_accumulation_steps batch_eval_metrics
            bf16_full_eval fp16_full_eval half_precision_backend fp16_backend fp16_opt_level jit_mode_eval
            use_ipex torchdynamo use_legacy_prediction_loop
        """,
        GROUPED: "group_by_length train_sampling_strategy",
        "adapters are always saved as safetensors": "save_safetensors",
        "the task has its own labels and metrics, and each says which way is better": """
            label_names past_index greater_is_better include_for_metrics include_inputs_for_metrics
        """,
        "`training.micro_batch_size: auto` tries the largest pass before the first step": "auto_find_batch_size",
        "every loss is the mean over the target tokens of a whole step and of all devices": "average_tokens_across_devices",
    }
)
