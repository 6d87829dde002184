"""Names that TRL, transformers, peft, OpenRLHF and verl give to what a recipe calls otherwise."""

from __future__ import annotations

from collections.abc import Iterable

MEANT = {
    **dict.fromkeys(("learning_rate", "actor_learning_rate", "lr"), "optimizer.lr"),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_betas"), "optimizer.betas"),
    **dict.fromkeys(("adam_epsilon", "adam_eps"), "optimizer.eps"),
    **dict.fromkeys(("max_norm", "grad_clip", "clip_grad"), "optimizer.max_grad_norm"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "warmup_style"), "optimizer.schedule"),
    **dict.fromkeys(("lr_warmup_steps", "num_warmup_steps"), "optimizer.warmup_steps"),
    "l2": "optimizer.weight_decay",
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "lora.rank"),
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    **dict.fromkeys(("target_modules", "lora_target_modules"), "lora.targets"),
    **dict.fromkeys(("model_name_or_path", "pretrain", "model_name", "model_path", "base_model"), "policy.path"),
    **dict.fromkeys(("ref_model", "ref_pretrain", "reference_model"), "reference.path"),
    **dict.fromkeys(("reward_model_path", "reward_pretrain", "reward_model", "reward_funcs"), "reward.path"),
    **dict.fromkeys(("dataset_name", "dataset", "prompt_data", "train_files", "dataset_path"), "data.path"),
    **dict.fromkeys(("max_prompt_length", "prompt_max_len"), "data.max_prompt_tokens"),
    **dict.fromkeys(("max_length", "max_seq_length", "max_len"), "data.max_response_tokens"),
    **dict.fromkeys(
        ("max_completion_length", "max_new_tokens", "generate_max_len", "response_length", "max_response_length"),
        "sampling.max_tokens",
    ),
    **dict.fromkeys(("num_generations", "n_samples_per_prompt", "rollout_n"), "sampling.num_samples"),
    **dict.fromkeys(("max_steps", "total_training_steps", "training_steps"), "run.steps"),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "max_epochs", "total_epochs"), "run.epochs"),
    **dict.fromkeys(("output_dir", "save_path", "ckpt_path", "default_local_dir"), "run.dir"),
    **dict.fromkeys(("resume_from_checkpoint", "load_checkpoint", "resume_mode"), "run.resume"),
    **dict.fromkeys(("save_steps", "save_freq"), "checkpoint.every"),
    **dict.fromkeys(("save_total_limit", "max_ckpt_num"), "checkpoint.keep_latest"),
    **dict.fromkeys(("eval_steps", "test_freq"), "evaluation.every"),
    **dict.fromkeys(("init_kl_coef", "kl_loss_coef", "beta"), "kl_coef"),
    "kl_penalty": "kl_estimator",
    **dict.fromkeys(("per_device_train_batch_size", "rollout_batch_size", "train_batch_size"), "prompts_per_step"),
    **dict.fromkeys(("ppo_epochs", "num_ppo_epochs", "num_iterations"), "epochs"),
    **dict.fromkeys(("ppo_mini_batch_size", "num_mini_batches"), "minibatches"),
    **dict.fromkeys(("cliprange", "clip_range", "epsilon", "eps_clip", "clip_ratio"), "clip_low"),
    **dict.fromkeys(("epsilon_high", "clip_ratio_high", "eps_clip_high"), "clip_high"),
    **dict.fromkeys(("lam", "lambd"), "gae_lambda"),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "precision"), "dtype"),
    "attn_implementation": "attention",
}
"""What ends the key that is meant, by the foreign name."""
OTHER = {"beta": "loss.beta", "model_name_or_path": "reward.path"}
OTHER |= dict.fromkeys(("per_device_train_batch_size", "train_batch_size"), "batch_size")
"""A second meaning of some, for recipes that lack the first."""
NONE: dict[str, str] = dict.fromkeys(
    ("gradient_accumulation_steps", "micro_train_batch_size"),
    "leave it out: `max_tokens_per_micro_batch` bounds one forward pass; the gradients of a step are accumulated",
)
"""Why a name has no like here."""


def meant(dotted: str, places: Iterable[str]) -> str | None:
    """The remedy for an unknown key that is the name of another library; None for others. Of several keys that end
    alike, that of the same section comes first."""
    section, _, name = dotted.rpartition(".")
    keys = [*places]
    for ending in filter(None, (MEANT.get(name), OTHER.get(name))):
        own = [key for key in keys if key != dotted and f".{key}".endswith(f".{ending}")]
        same = [key for key in own if section and key.startswith(section.partition(".")[0] + ".")]
        trained = [key for key in own if key.startswith(("policy.", "reward."))]
        if own:
            exact = [ending] if ending in own and not same else []
            return f"align calls it `{(exact or same or trained or own)[0]}`"
    return NONE.get(name)
