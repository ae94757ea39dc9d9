"""axolotl's keys that are left out here: those without an equal, and what happens without them, and those that need none."""

from __future__ import annotations

from peftkit.migration import shared
from peftkit.migration.base import spread

_TEXTS = "the tokenizer stays as it is; `peftkit data` shows which end token is learned"
NO_EQUAL = spread(
    {
        shared.TEMPLATE: "chat_template",
        _TEXTS: """
            special_tokens tokens added_tokens_overrides eot_tokens fix_untrained_tokens
            resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings
            tokenizer_use_mistral_common
        """,
        shared.IMAGES: """
            processor_type processor_kwargs image_size image_resize_algorithm role_boundaries freeze_mm_modules
            skip_prepare_dataset
        """,
        "training starts from a new adapter, not from one that is there": "lora_model_dir",
        "the loss is the cross-entropy of what is learned": "use_eaft eaft_alpha eaft_k orpo_alpha",
        "parameters are trained by their method: `adapter.modules_to_save` trains modules whole": """
            unfrozen_parameters lisa_n_layers lisa_step_interval lisa_layers_attribute spectrum_top_fraction
            spectrum_model_name
        """,
        "one learning rate for all; `training.loraplus_lr_ratio` has another for lora_B": """
            embedding_lr embedding_lr_scale lr_groups
        """,
        "the learning rate falls to 0, or to cosine_min_lr_ratio, without steps up again": """
            cosine_constant_lr_ratio lr_div_factor lr_quadratic_warmup eta_min jagged_restart_steps
            jagged_restart_warmup_steps jagged_restart_anneal_steps relora relora_prune_ratio
            relora_prune_method relora_cpu_offload
        """,
        "belongs to an optimizer that there is not here": """
            optim_args optim_target_modules torchdistx_path adam_epsilon2 adam_beta3 dion_lr dion_momentum
            dion_rank_fraction dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap qgalore_scale
            qgalore_proj_type qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold
            qgalore_gamma_proj qgalore_queue_size grokfast_alpha grokfast_lamb
        """,
        "the computation is in bf16, fp16 or float32": """
            fp8 fp8_config fp8_enable_fsdp_float8_all_gather fp32_norms fp32_norm_classes embeddings_skip_upcast
            peft_autocast_adapter_dtype
        """,
        "nothing is trained as if it were quantised, nor pruned": """
            qat quantization llmcompressor use_onebitllms nvfp4_merge_aware nvfp4_merge_aware_start_step
        """,
        "experts are quantised and laid out as transformers and bitsandbytes do it": """
            quantize_moe_experts experts_implementation llama4_linearized_experts ple_cpu_offload expert_backend
            nonexpert_quantization moe_grouped_backend moe_dequant_chunk_size moe_bnb_fast use_scattermoe
            use_sonicmoe dsv4_fp8_nonexpert_mode dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel dsv4_bf16_all
            dsv4_fp4_grouped_mode gemma4_fp8_nonexpert gemma4_nf4_nonexpert dense_mixer expert_parallel_size
            expert_parallel_backend expert_parallel_num_nvl_bytes expert_parallel_num_rdma_bytes
            expert_parallel_token_capacity expert_parallel_fallback_on_unsupported
        """,
        "the model's layers are as its checkpoint has them": """
            base_model_config cls_model_config overrides_of_model_kwargs model_quantization_config
            model_quantization_config_kwargs scaling_softmax scaling_softmax_factor scaling_softmax_bias
            rope_scaling s2_attention xformers_attention sage_attention num_labels mora trainer_cls
            base_model_ignore_patterns
        """,
        "rows are drawn by the seed, all of them": """
            use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks curriculum_sampling
            sample_packing_sequentially dataset_shard_num dataset_shard_idx min_sample_len max_prompt_len
            eval_sequence_len shuffle_before_merging_datasets pretraining_sample_concatenation
            pretrain_multipack_attn max_packed_sequence_len dataloader_drop_last
        """,
        "rows that come twice are told by `peftkit data`, and trained on": "dataset_exact_deduplication",
        "NaN ends a run with exit code 5; a loss that is merely high does not": """
            loss_watchdog_threshold loss_watchdog_patience
        """,
        "checkpoints are whole and written at their steps": "save_first_step save_only_model dynamic_checkpoint",
        "which modules are recomputed: `training.gradient_checkpointing: selective`": """
            selective_checkpointing layer_offloading
        """,
        "distillation cannot be had here": """
            kd_ce_alpha kd_alpha kd_temperature kd_beta kd_normalize_topk kd_online_server_base_url
            kd_online_topk kd_online_server kd_online_timeout kd_temperature_min
        """,
        "training is on this machine": "hatchery",
        "measured by `peftkit evaluate` (--generation-metrics, --harness)": """
            do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split lm_eval_tasks
            lm_eval_batch_size lm_eval_post_train lm_eval_model eval_table_size eval_max_new_tokens
        """,
        "`evaluation.samples` writes answers to held-out prompts": """
            generate_samples num_generation_samples generation_max_new_tokens generation_temperature
            generation_top_p generation_top_k generation_prompt_ratio generation_do_sample
        """,
        "comet, SwanLab and OpenTelemetry cannot be had here; tensorboard, wandb, mlflow and trackio can": """
            use_comet comet_api_key comet_workspace comet_project_name comet_experiment_key comet_mode
            comet_online comet_experiment_config use_swanlab swanlab_project swanlab_experiment_name
            swanlab_description swanlab_mode swanlab_workspace swanlab_api_key swanlab_log_model
            swanlab_web_host swanlab_api_host swanlab_lark_webhook_url swanlab_lark_secret
            swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer
            use_otel_metrics otel_metrics_host otel_metrics_port
        """,
    }
)
_KERNELS = "kernels change speed alone; peftkit has its own shorter ways to the same loss (training.fast_paths)"
IGNORED = spread(
    {
        shared.PLACES: "output_dir axolotl_config_path",
        shared.HUB: "hub_model_id hub_strategy hub_revision push_dataset_to_hub hf_use_auth_token save_safetensors",
        shared.RESUME: "resume_from_checkpoint auto_resume_from_checkpoints",
        shared.LOGGING: """
            wandb_name wandb_run_id wandb_mode wandb_entity wandb_watch wandb_log_model mlflow_tracking_uri
            mlflow_run_name hf_mlflow_log_artifacts trackio_run_name trackio_space_id profiler_steps
            profiler_steps_start include_tokens_per_second include_tkps debug strict
        """,
        shared.SPEED: """
            tf32 dataloader_pin_memory dataloader_num_workers dataloader_prefetch_factor dataset_processes
            dataset_num_proc dataset_keep_in_memory remove_unused_columns gc_steps torch_empty_cache_steps
            gc_collect_steps gradient_checkpointing_kwargs flex_attn_compile_kwargs deepcompile
            torch_compile_backend torch_compile_mode torch_compile_options low_cpu_mem_usage max_memory
            gpu_memory_limit lora_on_cpu qlora_sharded_model_loading lora_fan_in_fan_out pad_to_sequence_len
            pad_to_multiple_of eval_sample_packing sample_packing_group_size sample_packing_bin_size
            sample_packing_mp_start_method sample_packing_eff_est sample_packing_seq_len_multiplier
            multipack_real_batches batch_flattening pretrain_multipack_buffer_size
            experimental_skip_move_to_device auto_find_batch_size tokenizer_save_jinja_files preprocess_iterable
            is_preprocess
        """,
        _KERNELS: """
            liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation
            liger_cross_entropy liger_fused_linear_cross_entropy liger_use_token_scaling liger_kernel_impl
            cut_cross_entropy lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel
            chunked_cross_entropy chunked_cross_entropy_num_chunks tiled_mlp tiled_mlp_num_shards
            tiled_mlp_use_original_mlp flash_attn_cross_entropy flash_attn_fuse_mlp flash_attn_rms_norm
            flash_optimum fused_attn_kernel gemma4_hybrid_attn_impl large_head_attention flash_attn_d512
            sdpa_varlen use_kernels use_dsv4_kernels use_glm_dsa_kernels plugins
        """,
        "tokenised rows are kept by themselves (data.cache)": "dataset_prepared_path num_dataset_shards_to_save",
        shared.GROUPED: "group_by_length",
        "rows are always shuffled by training.seed": "shuffle_merged_datasets",
        "transformers picks the classes from the checkpoint": """
            model_type type_of_model tokenizer_type tokenizer_use_fast tokenizer_legacy is_falcon_derived_model
            is_llama_derived_model is_mistral_derived_model is_qwen_derived_model torch_dtype
        """,
        "counted by axolotl itself": "total_num_tokens total_supervised_tokens",
        "the metric says by itself which way is better": "greater_is_better",
        "a quantised checkpoint says so itself": "gptq gptq_groupsize gptq_model_v1 gptq_disable_exllama",
        shared.LAUNCHED: """
            device device_map world_size local_rank ddp ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers
            ddp_find_unused_parameters accelerator_config fsdp_version fsdp_final_state_dict_type heads_k_stride
            ring_attn_func use_ray ray_run_name ray_num_workers resources_per_worker
        """,
        "belongs to `peftkit merge` and `peftkit serve`": """
            merge_lora merge_method gradio_title gradio_share gradio_server_name gradio_server_port
            gradio_max_new_tokens gradio_temperature vllm
        """,
        f"belongs to preference or reinforcement learning, which cannot be had here; {shared.TRAINS}": """
            trl ebft center_rewards_coefficient dpo_use_weighting dpo_label_smoothing precompute_ref_log_probs
            dpo_use_liger_kernel dpo_padding_free dpo_loss_type dpo_loss_weights simpo_gamma cpo_alpha
            kto_desirable_weight kto_undesirable_weight rl_beta dpo_beta dpo_use_logits_to_keep
            dpo_generate_during_eval dpo_norm_loss rpo_alpha nemo_gym_enabled nemo_gym_dir nemo_gym_auto_clone
            nemo_gym_config_paths nemo_gym_head_port nemo_gym_server_timeout nemo_gym_verify_timeout
            nemo_gym_run_timeout nemo_gym_datasets nemo_gym_auto_start nemo_gym_model_name nemo_gym_multi_turn
            nemo_gym_max_turns
        """,
    }
)
