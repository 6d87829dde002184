"""Recipes that are killed and resumed; their epochs do not divide by their batches."""

HEAD = """
algorithm: {algorithm}
run: {{dir: x, steps: 6, seed: 1, logged_samples: 3, progress: none, trackers: [], max_restarts: 0}}
checkpoint: {{every: 2}}
executor: local
data: {{path: {data}, format: {format}, max_rows: 60}}
"""
POLICY = "policy: {{path: {policy}, dtype: float32, zero_stage: 2, lora: {lora}, optimizer: {{lr: 2e-3}}}}\n"
SAMPLED = """
reward: {{path: {reward}, dtype: float32}}
prompts_per_step: 7
truncated: keep
sampling: {{num_samples: 2, max_tokens: 8}}
minibatches: 2
epochs: 2
evaluation: {{every: 3, prompts: 5, keep_best: true}}
"""
GRADIENT = "kl_target: 0.5\nkl_horizon: 50\nkl_coef: 0.1\nshaping: {{running: true}}\n"
PAIRS = "batch_size: 7\n"
CRITIC = "critic: {{zero_stage: 2, optimizer: {{lr: 2e-3}}, lora: {lora}}}\n"
RATED = """
reward: {{path: {attributes}, dtype: float32, weights: {{helpfulness: 1.0}}}}
steering: {{attributes: [helpfulness, verbosity]}}
sampling: {{num_samples: 2, max_tokens: 24}}
evaluation: {{every: 3, prompts: 5, keep_best: true}}
"""
LORA = "{rank: 2, alpha: 4, dropout: 0.1}"
"""Dropout makes the generators of each rank part of the result."""

ALGORITHMS = {
    "sft": ("sft", POLICY + PAIRS),
    "reward_model": (
        "reward_model",
        "reward: {{path: {policy}, dtype: float32, zero_stage: 2, lora: {lora}, optimizer: {{lr: 2e-3}}}}\n"
        + PAIRS
        + "validate_every: 3\n",
    ),
    "reward_model, regression": (
        "reward_model",
        "reward: {{path: {policy}, dtype: float32, zero_stage: 2, lora: {lora}, optimizer: {{lr: 2e-3}}, "
        "attributes: [helpfulness, verbosity]}}\nloss: regression\n" + PAIRS + "validate_every: 3\n",
    ),
    "dpo": (
        "dpo",
        POLICY
        + PAIRS
        + "reward: {{path: {reward}}}\nevaluation: {{every: 3, prompts: 5}}\nsampling: {{max_tokens: 24}}\n",
    ),
    "online_dpo": ("online_dpo", POLICY + SAMPLED),
    "best_of_n": ("best_of_n", POLICY + SAMPLED),
    "ppo": ("ppo", POLICY + SAMPLED + GRADIENT + CRITIC),
    "rloo": ("rloo", POLICY + SAMPLED + GRADIENT + "loss: {{kind: clipped}}\n"),
    "rloo, two steps behind": (
        "rloo",
        POLICY + SAMPLED + GRADIENT + "loss: {{kind: clipped}}\nmax_off_policy_steps: 2\n",
    ),
    "rloo with a function": (
        "rloo",
        POLICY
        + SAMPLED.replace("{{path: {reward}, dtype: float32}}", "{{kind: function, function: '{judge}'}}")
        + GRADIENT
        + "loss: {{kind: clipped}}\n",
    ),
    "rloo with a judge that writes": (
        "rloo",
        POLICY
        + SAMPLED.replace(
            "{{path: {reward}, dtype: float32}}",
            "{{kind: generative, judge: {{path: {writer}, dtype: float32}}, form: json, "
            "custom_roles: true, verdict_retries: 1, sampling: {{max_tokens: 4}}}}",
        )
        + GRADIENT
        + "loss: {{kind: clipped}}\n",
    ),
    "feedback_edit": (
        "feedback_edit",
        POLICY + SAMPLED + GRADIENT + "loss: {{kind: clipped}}\nediting: {{instruction: 'edit {{feedback}}'}}\n",
    ),
    "grpo": ("grpo", POLICY + SAMPLED + GRADIENT),
    "dapo": ("grpo", POLICY + SAMPLED + GRADIENT + "max_attempts: 3\n"),
    "genrm": (
        "genrm",
        POLICY
        + SAMPLED.replace("reward: {{path: {reward}, dtype: float32}}", "verdict: {{form: json, custom_roles: true}}")
        # Random weights write no verdict: length and entropy are what is learned.
        + "kl_target: 0.5\nkl_horizon: 50\nkl_coef: 0.1\n"
        + "shaping: {{overlong_buffer: 8}}\nloss: {{entropy_coef: 0.1}}\n",
    ),
    "reinforce": ("reinforce", POLICY + SAMPLED + GRADIENT),
    "remax": ("reinforce", POLICY + SAMPLED + GRADIENT + "baseline: greedy\nwhiten: false\n"),
    "ppo, two rounds": ("ppo", POLICY + SAMPLED + GRADIENT + CRITIC + "rounds: 2\n"),
    "steerlm, two rounds": ("steerlm", POLICY + RATED + PAIRS + "rounds: 2\n"),
    "steerlm2": (
        "steerlm2",
        POLICY + RATED + "base: {{path: {policy}, dtype: float32}}\nprompts_per_step: 7\nmax_off_policy_steps: 1\n",
    ),
}

PLACEMENTS = {
    "sft": "{policy: 0-1}",
    "reward_model": "{reward: 0-1}",
    "dpo": "{policy: 0-1, reference: 2, reward: 3}",
    "ppo": "{policy: 0-1, critic: 2, reference: 3, reward: 3}",
    "online_dpo": "{policy: 0-1, reference: 2, reward: 3}",
    "rloo": "{policy: 0-1, reference: 2, reward: 3}",
    "rloo with a judge that writes": "{policy: 0-1, reference: 2, reward: 3}",
    "grpo": "{policy: 0-1, reference: 2, reward: 3}",
    "rloo, two steps behind": "{policy: 0-1, sampler: 2, reference: 3, reward: 3}",
    "steerlm2": "{policy: 0-1, previous: 2, base: 3, reward: 3}",
}
"""Of those that are killed on Ray, with the policy on two ranks."""

ALWAYS_ON_RAY = ("ppo",)
"""Those that every change is killed on Ray with, see `test_workers_ray`; the others are killed in one process."""
