"""What becomes of the options that TRL's ``DPOConfig`` and ``GRPOConfig`` have beside those of its ``SFTConfig``.

As :mod:`postgrad.trl_options`: an option that is a field of the configuration is honoured, all others are here. A test
compares these tables with TRL's dataclasses; ``docs/trl.md`` is generated from them.
"""

from __future__ import annotations

from postgrad.trl_options import Option

_LENGTHS = "use max_length and excess_length_strategy"

DPO: dict[str, Option] = {
    "precompute_ref_log_probs": Option("harmless", "the reference is always computed once, before training"),
    "precompute_ref_batch_size": Option("harmless", "passes are cut by token_budget"),
    "padding_free": Option("harmless", "there is no padding"),
    "f_alpha_divergence_coef": Option("harmless", "it belongs to an f_divergence_type that is refused"),
    "ref_model_mixup_alpha": Option("harmless", "it belongs to sync_ref_model, which is refused"),
    "ref_model_sync_steps": Option("harmless", "it belongs to sync_ref_model, which is refused"),
    "generate_during_eval": Option("harmless", "held-out prompts are answered before and after"),
    "f_divergence_type": Option("refused", "the divergence is reverse_kl", ("reverse_kl", None)),
    "use_weighting": Option("refused", "leave it out: pairs count alike (WPO is not supported)", (False, None)),
    "sync_ref_model": Option("refused", "the reference is the starting model throughout", (False, None)),
    "rpo_alpha": Option("refused", "use loss_type=[sigmoid, sft] with loss_weights", (None,)),
    "max_prompt_length": Option("refused", _LENGTHS, (None,)),
    "max_completion_length": Option("refused", _LENGTHS, (None,)),
}

DPO_LOSSES = {
    "aot": "it sorts the pairs of a batch, so its value depends on how a step is cut into batches",
    "aot_unpaired": "it sorts the answers of a batch, so its value depends on how a step is cut into batches",
}

_VLLM = "not supported yet: rollouts come from postgrad's own generator; leave it out"
_OWN_GENERATOR = "rollouts come from postgrad's own generator"
_OTHER_LOSS = "it belongs to a loss_type that is refused"
_ENTROPY = "it belongs to use_adaptive_entropy, which is refused"
_ONE_BATCH = "a step's completions are written together; use num_iterations for several updates on them"
_SHOWN = "completions are in rollouts.jsonl and in the report"

# Each with the value that TRL gives it by default.
_VLLM_DEFAULTS: dict[str, object] = {
    "use_vllm": False,
    "vllm_mode": "colocate",
    "vllm_model_impl": "vllm",
    "vllm_enable_sleep_mode": False,
    "vllm_structured_outputs_regex": None,
    "vllm_server_base_url": None,
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
    "vllm_server_timeout": 240.0,
    "vllm_group_port": 51216,
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_max_model_length": None,
    "vllm_tensor_parallel_size": 1,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None,
    "vllm_importance_sampling_cap": None,
}

GRPO: dict[str, Option] = {
    "ds3_gather_for_generation": Option("harmless", "it belongs to deepspeed, which is refused"),
    "cache_implementation": Option("harmless", _OWN_GENERATOR),
    "use_transformers_continuous_batching": Option("harmless", _OWN_GENERATOR),
    "transformers_continuous_batching_config": Option("harmless", _OWN_GENERATOR),
    "use_transformers_paged": Option("harmless", _OWN_GENERATOR),
    "log_completions": Option("harmless", _SHOWN),
    "log_multimodal": Option("harmless", _SHOWN),
    "num_completions_to_print": Option("harmless", _SHOWN),
    "log_unique_prompts": Option("harmless", _SHOWN),
    "sapo_temperature_neg": Option("harmless", _OTHER_LOSS),
    "sapo_temperature_pos": Option("harmless", _OTHER_LOSS),
    "vespo_k_pos": Option("harmless", _OTHER_LOSS),
    "vespo_lambda_pos": Option("harmless", _OTHER_LOSS),
    "vespo_k_neg": Option("harmless", _OTHER_LOSS),
    "vespo_lambda_neg": Option("harmless", _OTHER_LOSS),
    "entropy_coef_min": Option("harmless", _ENTROPY),
    "entropy_coef_max": Option("harmless", _ENTROPY),
    "entropy_coef_delta": Option("harmless", _ENTROPY),
    "entropy_target": Option("harmless", _ENTROPY),
    "ref_model_mixup_alpha": Option("harmless", "it belongs to sync_ref_model, which is refused"),
    "ref_model_sync_steps": Option("harmless", "it belongs to sync_ref_model, which is refused"),
    "sync_ref_model": Option("refused", "the reference is the starting model throughout", (False, None)),
    "shuffle_dataset": Option(
        "refused", "use train_sampling_strategy: random reshuffles in every epoch, sequential does not", (True, None)
    ),
    "use_adaptive_entropy": Option("refused", "use epsilon_high above epsilon to keep entropy up", (False, None)),
    "entropy_coef": Option("refused", "use epsilon_high above epsilon to keep entropy up", (0.0, None)),
    "top_entropy_quantile": Option("refused", "all tokens of a completion are trained; leave it out", (1.0, None)),
    "off_policy_mask_threshold": Option("refused", "use delta or epsilon_high to bound ratios", (None,)),
    "multi_objective_aggregation": Option(
        "refused", "rewards are weighted and added up, then compared in their group", ("sum_then_normalize", None)
    ),
    "num_generations_eval": Option("refused", "use num_samples: held-out tasks are answered so often", (None,)),
    "generation_batch_size": Option("refused", _ONE_BATCH, (None,)),
    "steps_per_generation": Option("refused", _ONE_BATCH, (None,)),
    "generation_kwargs": Option("refused", "use temperature, top_p, top_k, min_p, max_completion_length", (None, {})),
    "repetition_penalty": Option("refused", "use temperature: the loss is that of plain sampling", (1.0, None)),
    "cast_lm_head_to_fp32": Option("refused", "use bf16=false: the head computes as the layers do", (False, None)),
    "max_tool_calling_iterations": Option("refused", "use environment and max_turns", (None,)),
    "max_prompt_length": Option("refused", _LENGTHS, (None,)),
    "log_completions_hub_repo": Option("refused", "upload rollouts.jsonl with: hf upload NAME RUN", (None,)),
    **{
        name: Option("refused", _VLLM, (default,) if default is None else (default, None))
        for name, default in _VLLM_DEFAULTS.items()
    },
}

GRPO_LOSSES = {
    "sapo": "use importance_sampling_level=token with epsilon_high",
    "luspo": "use importance_sampling_level=sequence",
    "vespo": "use cispo with epsilon_high, which bounds the weight of a ratio as well",
}

# Fields of the two configurations that TRL has under no name.
POSTGRAD_ONLY = frozenset(
    {
        "reference_free",
        "overlong_cache",
        "max_resamples",
        "reward_funcs",
        "reward_timeout",
        "allow_code_execution",
        "environment",
        "max_turns",
        "num_samples",
    }
)
