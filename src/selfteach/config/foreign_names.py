"""Names keys of TRL, Transformers, PEFT and verl by what they are called here, for error messages."""

from __future__ import annotations

OURS = {
    # TRL and Transformers
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "beta": "objective.kl_coef",
    "bf16": 'model.autocast = "bfloat16"',
    "chat_template_kwargs": "model.thinking.student",
    "dataloader_num_workers": "",
    "dataset_name": 'data.path, with data.type = "hub"',
    "epsilon": "objective.clip_low",
    "epsilon_high": "objective.clip_high",
    "eval_steps": "evaluation.every",
    "generation_batch_size": "sampling.batch_size",
    "gradient_accumulation_steps": "train.micro_batch_tokens",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "learning_rate": "optimizer.lr",
    "logging_steps": "",
    "loss_type": "objective.aggregation",
    "lr_scheduler_type": "optimizer.decay",
    "max_completion_length": "sampling.max_tokens",
    "max_grad_norm": "optimizer.grad_clip",
    "max_new_tokens": "sampling.max_tokens",
    "max_prompt_length": "train.max_length",
    "max_steps": "train.steps",
    "model_name_or_path": "model.path",
    "num_generations": "train.group_size",
    "num_iterations": "train.num_iterations",
    "num_train_epochs": "train.steps",
    "output_dir": "--out",
    "per_device_train_batch_size": "train.problems_per_step",
    "report_to": "tracking.sinks",
    "run_name": "--out",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "scale_rewards": "objective.scale_rewards",
    "system_prompt": "model.system",
    "torch_dtype": "model.weights_dtype",
    "use_vllm": 'engine.type = "vllm_server" or "vllm"',
    "vllm_gpu_memory_utilization": "engine.gpu_memory_utilization",
    "vllm_mode": 'engine.type = "vllm_server" or "vllm"',
    "vllm_server_base_url": "engine.url",
    "warmup_ratio": "optimizer.warmup_steps",
    "warmup_steps": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    # PEFT
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_r": "model.lora.rank",
    "lora_rank": "model.lora.rank",
    "lora_target_modules": "model.lora.targets",
    "peft_config": "model.lora",
    "r": "model.lora.rank",
    "target_modules": "model.lora.targets",
    "use_peft": "model.lora",
    # verl
    "actor_rollout_ref": "model, optimizer and sampling",
    "clip_ratio_high": "objective.clip_high",
    "clip_ratio_low": "objective.clip_low",
    "kl_loss_coef": "objective.kl_coef",
    "max_response_length": "sampling.max_tokens",
    "ppo_epochs": "train.num_iterations",
    "ppo_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "save_freq": "train.checkpoint_every",
    "test_freq": "evaluation.every",
    "total_training_steps": "train.steps",
    "train_batch_size": "train.problems_per_step",
    "train_files": 'data.train, with data.type = "files"',
    "val_files": 'data.validation, with data.type = "files"',
}
"""Keys of other trainers, with the key that sets the same here; empty: nothing needs to be set."""


def hint_for(key: str) -> str | None:
    """Return what to write in place of another trainer's key; None for a key that is nobody's."""
    ours = OURS.get(key)
    if ours is None:
        return None
    return f"use {ours}" if ours else "nothing needs to be set here"
