"""Every check of a schema stops a recipe with a message that names the key and its value."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from align import algorithms
from align.cluster.roles import ROLES
from align.config import (
    BenchmarkDataConfig,
    CheckpointConfig,
    CheckpointRewardConfig,
    CriticConfig,
    DataConfig,
    EditingConfig,
    EndpointGeneratorConfig,
    EnsembleRewardConfig,
    EvaluationConfig,
    FunctionGeneratorConfig,
    FunctionRewardConfig,
    GenerativeRewardConfig,
    HttpRewardConfig,
    LoraConfig,
    ModelGeneratorConfig,
    OptimizerConfig,
    PolicyConfig,
    PolicyEvaluationConfig,
    PolicyLossConfig,
    PreferenceLossConfig,
    QuestionDataConfig,
    ReferenceConfig,
    ReplicasConfig,
    RewardEvaluationConfig,
    RewardServiceConfig,
    RewardShapingConfig,
    RunConfig,
    SamplingConfig,
    ScaleConfig,
    ScalePromptsConfig,
    SourceConfig,
    SteeringConfig,
)
from align.config.load import build_config, load_recipe, write_config
from align.data.prompts import require_rows
from align.errors import ConfigError
from align.prechecks.roles import check_roles, role_configs

ALGORITHMS = sorted(module.name for module in pkgutil.iter_modules(algorithms.__path__) if module.name[0] != "_")
ROOT = Path(algorithms.__file__).parents[1]

LEAST = {"run.dir": "runs/x", "run.steps": 3, "data.path": "d"}
POLICY = {**LEAST, "policy.path": "p", "policy.optimizer.lr": 1e-6}
SCORED = {**POLICY, "reward.path": "r"}
NEEDED = {
    **dict.fromkeys(("rloo", "feedback_edit", "grpo", "reinforce", "best_of_n", "online_dpo"), SCORED),
    "ppo": {**SCORED, "critic.optimizer.lr": 1e-6},
    "dpo": POLICY,
    "sft": POLICY,
    "genrm": POLICY,
    "steerlm": SCORED,
    "steerlm2": {**SCORED, "base.path": "b"},
    "reward_model": {**LEAST, "reward.path": "r", "reward.optimizer.lr": 1e-6},
}


def write(folder: Path, algorithm: str, needed: dict[str, object]) -> Path:
    tree: dict[str, Any] = {"algorithm": algorithm}
    for key, value in needed.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    (folder / "r.yaml").write_text(yaml.safe_dump(tree))
    return folder / "r.yaml"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_least_that_a_recipe_must_say(algorithm: str, tmp_path: Path):
    loaded = load_recipe(write(tmp_path, algorithm, NEEDED[algorithm]))
    roles = role_configs(loaded.config)
    assert set(check_roles(loaded.config)) == set(roles)
    assert all(set(type(section).__mro__) & ROLES.keys() for section in roles.values())
    write_config(loaded.config, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml").config == loaded.config
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, algorithm, {}))
    missing = {line.split(": ")[1] for line in str(caught.value).splitlines() if line.endswith("has no value")}
    optional = {"reward.path"} if algorithm in ("dpo", "steerlm") else set()
    assert missing == set(NEEDED[algorithm]) - optional


BATCHES = {
    **dict.fromkeys(("sft", "dpo", "reward_model", "steerlm"), ("batch_size", {"kept": 100})),
    "genrm": ("prompts_per_step", {"kept": 50}),  # pairs, each in both orders
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_steps_follow_from_epochs_and_a_batch_is_no_larger_than_the_data(algorithm: str, tmp_path: Path):
    key, counts = BATCHES.get(algorithm, ("prompts_per_step", {"kept": 100}))
    needed = {name: value for name, value in NEEDED[algorithm].items() if name != "run.steps"}
    needed |= {key: 8, "run.epochs": 2.5, **({"minibatches": 2} if algorithm == "ppo" else {})}
    recipe = load_recipe(write(tmp_path, algorithm, needed)).config
    assert recipe.run.steps == 0 and recipe.num_rows(counts) == 100
    resolved = recipe.with_steps(100)
    assert (resolved.run.steps, resolved.run.epochs) == (32, 0.0)  # 2.5 x 100 / 8 = 31.25
    assert resolved == load_recipe(write(tmp_path, algorithm, needed), ["run.steps=32", "run.epochs=0"]).config
    assert resolved.with_steps(7) == resolved
    require_rows(recipe, 8)
    with pytest.raises(ConfigError, match=f"{key} is 8, and the data has 7 rows"):
        require_rows(recipe, 7)
    require_rows(load_recipe(write(tmp_path, algorithm, {**needed, "data.repeat_within_batch": True})).config, 7)


@pytest.mark.parametrize(("epochs", "rows", "steps"), [(0.1, 30, 1), (0.7, 10, 3), (1.1, 30, 11), (1e-9, 5, 1)])
def test_steps_are_rounded_up_from_the_number_as_it_was_written(tmp_path: Path, epochs: float, rows: int, steps: int):
    needed = {name: value for name, value in NEEDED["sft"].items() if name != "run.steps"}
    recipe = load_recipe(write(tmp_path, "sft", {**needed, "batch_size": 3}), [f"run.epochs={epochs}"]).config
    assert recipe.with_steps(rows).run.steps == steps


def test_attempts_of_dynamic_sampling_draw_no_prompt_twice(tmp_path: Path):
    recipe = load_recipe(write(tmp_path, "grpo", {**SCORED, "prompts_per_step": 4, "max_attempts": 3})).config
    require_rows(recipe, 12)
    with pytest.raises(ConfigError, match="prompts_per_step times max_attempts is 12, and the data has 11 rows"):
        require_rows(recipe, 11)


def test_sources_by_name(tmp_path: Path):
    needed = {name: value for name, value in NEEDED["sft"].items() if name != "data.path"}
    recipe = write(tmp_path, "sft", {**needed, "data.sources.ours.path": "a", "data.sources.more.path": "b"})
    loaded = load_recipe(recipe, ["data.sources.more.weight=0.5", "data.sources.more.columns={prompt: q}"])
    assert loaded.config.data.sources == {
        "ours": SourceConfig(path="a"),
        "more": SourceConfig(path="b", weight=0.5, columns={"prompt": "q"}),
    }
    assert loaded.origin["data.sources.more.weight"] == "command line"
    write_config(loaded.config, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml").config == loaded.config
    with pytest.raises(ConfigError, match="unknown key") as caught:
        load_recipe(recipe, ["data.sources.more.wieght=1"])
    assert "did you mean `data.sources.more.weight`" in str(caught.value)


SPEAKING = "prompts.path=p out=o policy.path=a feedback.path=b edit.path=c select.path=d"
JUDGED = "benchmark=arena-hard baseline_answers.default=b policy.path=p judge.path=j"
SEQUENCE = "sequence_clipped loss.aggregation=sequence_mean_token_mean"
CASES = [
    # losses
    (DataConfig, "path=d validation=1", ["validation = 1.0"]),
    (DataConfig, "path=d sources.a.path=x", ["path = 'd'"]),
    (DataConfig, "path='' sources.a.path=x revision=v", ["revision = 'v'"]),
    (DataConfig, "sources.a.path='' path=''", ["path = ''"]),
    (DataConfig, "path='' sources.a.path=x sources.a.weight=2", ["weight = 2.0"]),
    (RunConfig, "dir=r steps=3 epochs=2", ["steps = 3", "epochs = 2.0"]),
    (RunConfig, "dir=r steps=0", ["steps = 0"]),
    (RunConfig, "dir=r steps=0 epochs=-1", ["epochs = -1.0"]),
    (PolicyLossConfig, "clip_low=0", ["clip_low = 0.0", "clip_high = 0.2"]),
    (PolicyLossConfig, "clip_low=1", ["clip_low = 1.0"]),
    (PolicyLossConfig, "clip_high=0", ["clip_high = 0.0"]),
    (PolicyLossConfig, "kind=clipped dual_clip=1", ["dual_clip = 1.0", "kind = 'clipped'"]),
    (PolicyLossConfig, "dual_clip=2", ["dual_clip = 2.0", "kind = 'reinforce'"]),
    (PolicyLossConfig, "kind=sequence_clipped", ["kind = 'sequence_clipped'", "aggregation = 'token_mean'"]),
    (PolicyLossConfig, "importance_cap=0.5", ["importance_cap = 0.5"]),
    (PreferenceLossConfig, "beta=0", ["beta = 0.0"]),
    (PreferenceLossConfig, "kind=cdpo smoothing=0.5", ["smoothing = 0.5", "kind = 'cdpo'"]),
    (PreferenceLossConfig, "kind=robust smoothing=-0.1", ["smoothing = -0.1"]),
    (PreferenceLossConfig, "smoothing=0.1", ["smoothing = 0.1", "kind = 'dpo'"]),
    # roles
    (LoraConfig, "rank=8 targets=[]", ["targets = []"]),
    (LoraConfig, "rank=0", ["rank = 0"]),
    (OptimizerConfig, "lr=-1", ["lr = -1.0"]),
    (OptimizerConfig, "lr=1 betas=[0.9,1]", ["betas = (0.9, 1.0)"]),
    (ReferenceConfig, "path=p zero_stage=4", ["zero_stage = 4"]),
    (CheckpointRewardConfig, "path=p max_tokens_per_micro_batch=0", ["max_tokens_per_micro_batch = 0"]),
    (ReferenceConfig, "path=p offload_parameters=true", ["offload_parameters = True", "zero_stage = 0"]),
    (
        ReferenceConfig,
        "path=a/b trust_remote_code=true revision=main",
        ["trust_remote_code = True", "path = 'a/b'", "revision = 'main'"],
    ),
    (PolicyConfig, "path=p optimizer.lr=1 zero_stage=0 dtype=bfloat16", ["zero_stage = 0"]),
    (PolicyConfig, "path=p optimizer.lr=1 dtype=float32 engine=vlm", ["engine = 'vlm'"]),
    (
        CriticConfig,
        "path=p optimizer.lr=1 zero_stage=0 dtype=float32 offload_optimizer=true",
        ["offload_optimizer = True", "zero_stage = 0"],
    ),
    (HttpRewardConfig, "url=''", ["url = ''"]),
    (FunctionRewardConfig, "function=f", ["function = 'f'"]),
    (CheckpointRewardConfig, "path=''", ["path = ''"]),
    (
        CheckpointRewardConfig,
        "head=yes_no path=p principle=x attributes=[a]",
        ["head = 'yes_no'", "attributes = ['a']"],
    ),
    (CheckpointRewardConfig, "path=p principle=x", ["head = 'auto'", "principle = 'x'"]),
    (CheckpointRewardConfig, "head=yes_no path=p", ["head = 'yes_no'", "principle = ''"]),
    (
        CheckpointRewardConfig,
        "head=yes_no path=p principle=x question=Well?",
        ["principle = 'x'", "question = 'Well?'"],
    ),
    (EnsembleRewardConfig, "path=p", ["paths = []"]),
    (EnsembleRewardConfig, "path=p paths=[q] penalty=-1", ["penalty = -1.0"]),
    (GenerativeRewardConfig, "judge.path=j form=principle", ["form = 'principle'", "principle = ''"]),
    (
        GenerativeRewardConfig,
        "judge.path=j form=principle principle=x custom_roles=true",
        ["form = 'principle'", "custom_roles = True"],
    ),
    (GenerativeRewardConfig, "judge.path=j votes=0", ["votes = 0", "verdict_retries = 3"]),
    (
        GenerativeRewardConfig,
        "judge.path=j votes=2 sampling.temperature=0",
        ["votes = 2", "sampling.temperature = 0.0"],
    ),
    (GenerativeRewardConfig, "judge.path=j sampling.num_samples=2", ["sampling.num_samples = 2"]),
    (GenerativeRewardConfig, "judge.path=j top=0", ["top = 0.0"]),
    (GenerativeRewardConfig, "judge.path=j style_coef=-1", ["style_coef = -1.0"]),
    (GenerativeRewardConfig, "judge.path=j judge.zero_stage=3", ["judge.zero_stage = 3"]),
    (EndpointGeneratorConfig, "url=http://x/v1 model=''", ["model = ''"]),
    (FunctionGeneratorConfig, "function=f", ["function = 'f'"]),
    (ModelGeneratorConfig, "path=''", ["path = ''"]),
    (ModelGeneratorConfig, "path=p max_num_seqs=0", ["max_num_seqs = 0"]),
    (EndpointGeneratorConfig, "url=http://user:pass@x/v1 model=m", ["url = 'http://user:pass@x/v1'"]),
    (EndpointGeneratorConfig, "url=http://x/v1 model=m timeout_s=0", ["timeout_s = 0.0"]),
    (EndpointGeneratorConfig, "url=http://x/v1 model=m retries=-1", ["retries = -1"]),
    (HttpRewardConfig, "url=ftp://x", ["url = 'ftp://x'"]),
    (HttpRewardConfig, "url=http://x timeout_s=0", ["timeout_s = 0.0"]),
    (HttpRewardConfig, "url=http://x retries=-1", ["retries = -1"]),
    (HttpRewardConfig, "url=http://x batch_size=0", ["batch_size = 0"]),
    ("rloo", "sampler.zero_stage=1", ["sampler.zero_stage = 1"]),
    # rollouts
    (EvaluationConfig, "every=-1", ["every = -1"]),
    (EvaluationConfig, "prompts=0", ["prompts = 0"]),
    (EvaluationConfig, "keep_best=true", ["keep_best = True", "every = 0"]),
    (RewardShapingConfig, "std=0", ["std = 0.0"]),
    (RewardShapingConfig, "clip=-1", ["clip = -1.0"]),
    (RewardShapingConfig, "running=true mean=2", ["running = True", "mean = 2.0", "std = 1.0"]),
    ("rloo", "reward.path=''", ["reward.path = ''"]),
    ("rloo", "prompts_per_step=0", ["prompts_per_step = 0"]),
    ("rloo", "max_off_policy_steps=-1", ["max_off_policy_steps = -1"]),
    ("rloo", "rounds=0", ["rounds = 0"]),
    ("ppo", "epochs=0", ["epochs = 0"]),
    ("ppo", "minibatches=0", ["minibatches = 0"]),
    ("ppo", "minibatches=513", ["minibatches = 513", "prompts_per_step = 512"]),
    ("rloo", "sampling.num_samples=1", ["sampling.num_samples = 1"]),
    ("grpo", "sampling.num_samples=1", ["sampling.num_samples = 1"]),
    ("best_of_n", "sampling.num_samples=1", ["sampling.num_samples = 1"]),
    ("online_dpo", "sampling.temperature=0", ["sampling.temperature = 0.0"]),
    ("reinforce", "baseline=group sampling.num_samples=1", ["sampling.num_samples = 1"]),
    ("rloo", "kl_placement=loss kl_estimator=k1", ["kl_placement = 'loss'", "kl_estimator = 'k1'"]),
    ("rloo", "epochs=2", ["loss.kind = 'reinforce'", "epochs = 2", "minibatches = 1"]),
    ("rloo", "minibatches=2", ["loss.kind = 'reinforce'", "minibatches = 2"]),
    ("rloo", "kl_target=0", ["kl_target = 0.0"]),
    ("rloo", "kl_target=1 kl_horizon=255", ["kl_horizon = 255"]),  # 64 prompts times 4 samples are 256
    # runs
    (CheckpointConfig, "every=-1", ["every = -1"]),
    (CheckpointConfig, "keep_latest=0", ["keep_latest = 0"]),
    (RunConfig, "dir=d steps=1 max_time=3:50:00", ["max_time = '3:50:00'"]),
    (RunConfig, "dir=d steps=1 max_restarts=-1", ["max_restarts = -1"]),
    (RunConfig, "dir=d steps=1 max_non_finite=0", ["max_non_finite = 0"]),
    (DataConfig, "path=d domains=[code] format=helpsteer2", ["domains = ['code']", "format = 'helpsteer2'"]),
    (DataConfig, "path=d max_rows=3 format=helpsteer2", ["max_rows = 3", "format = 'helpsteer2'"]),
    (DataConfig, "path=d max_spread=-1", ["max_spread = -1"]),
    (SamplingConfig, "num_samples=0", ["num_samples = 0"]),
    (SamplingConfig, "max_tokens=0", ["max_tokens = 0"]),
    (SamplingConfig, "temperature=-1", ["temperature = -1.0"]),
    (SamplingConfig, "top_k=-1", ["top_k = -1"]),
    (SamplingConfig, "top_p=0", ["top_p = 0.0"]),
    (SamplingConfig, "min_p=1.5", ["min_p = 1.5"]),
    # algorithms
    ("ppo", f"loss.kind={SEQUENCE}", ["loss.kind = 'sequence_clipped'"]),
    ("ppo", "gamma=1.5", ["gamma = 1.5", "gae_lambda = 0.95"]),
    ("ppo", "gae_lambda=-0.1", ["gae_lambda = -0.1"]),
    ("reinforce", f"loss.kind={SEQUENCE}", ["loss.kind = 'sequence_clipped'"]),
    ("grpo", "max_attempts=0", ["max_attempts = 0"]),
    ("grpo", "max_attempts=2 max_off_policy_steps=1", ["max_attempts = 2", "max_off_policy_steps = 1"]),
    ("dpo", "gold=reward loss.kind=rpo_sq", ["gold = 'reward'", "reward = None"]),
    ("dpo", "evaluation.every=2", ["evaluation.every = 2", "reward = None"]),
    ("dpo", "gold=reward reward.path=r", ["gold = 'reward'", "loss.kind = 'dpo'"]),
    (
        "dpo",
        "reference_cache=c reference.path=q",
        ["reference_cache = 'c'", "reference.path = 'q'", "policy.path = 'p'"],
    ),
    (
        "dpo",
        "gold=reward loss.kind=rpo_sq reward.path=r reward.failed=drop",
        ["gold = 'reward'", "reward.failed = 'drop'"],
    ),
    ("dpo", "reward.path=r", ["reward.path = 'r'"]),
    ("dpo", "eval_reward.path=r", ["eval_reward.path = 'r'"]),
    ("dpo", "reference_cache=c loss.kind=simpo", ["reference_cache = 'c'", "loss.kind = 'simpo'"]),
    (SteeringConfig, "attributes=[]", ["attributes = []"]),
    (SteeringConfig, "attributes=[a,'b:c']", ["attributes = ['a', 'b:c']"]),
    (SteeringConfig, "values.verbosity=5", ["values.verbosity = 5"]),
    (SteeringConfig, "values.humor=1", ["values.humor = 1"]),
    ("steerlm", "rounds=0", ["rounds = 0"]),
    ("steerlm", "labels=data", ["reward.path = 'r'", "labels = 'data'"]),
    ("steerlm", "reward=null labels=data rounds=2", ["reward = None", "labels = 'data'", "rounds = 2"]),
    ("steerlm", "eval_reward.path=s", ["eval_reward.path = 's'"]),
    ("steerlm2", "sampling.num_samples=1", ["sampling.num_samples = 1"]),
    ("sft", "responses=all target=edits", ["responses = 'all'", "target = 'edits'"]),
    ("genrm", "format_penalty=-1", ["format_penalty = -1.0"]),
    ("genrm", "max_attempts=2", ["max_attempts = 2"]),
    ("reward_model", "loss=regression", ["loss = 'regression'"]),
    ("reward_model", "reward.attributes=[a]", ["reward.attributes = ['a']", "loss = 'scaled'"]),
    ("reward_model", "center_coef=-1", ["center_coef = -1.0"]),
    (
        "reward_model",
        "loss=regression reward.attributes=[a] center_coef=1",
        ["center_coef = 1.0", "loss = 'regression'"],
    ),
    ("reward_model", "weights.a=1", ["weights.a = 1.0", "loss = 'scaled'"]),
    ("reward_model", "loss=regression reward.attributes=[a] weights.b=1", ["weights.b = 1.0"]),
    # evaluation
    (BenchmarkDataConfig, "max_items=0", ["max_items = 0"]),
    # feedback and edits
    (EditingConfig, "instruction=edit", ["instruction = 'edit'"]),
    (EditingConfig, "min_overlap=2", ["min_overlap = 2.0", "max_permutations = 6"]),
    ("feedback_edit", "copy_penalty=-1", ["copy_penalty = -1.0"]),
    (ScalePromptsConfig, "path=p max_prompts=0", ["max_prompts = 0"]),
    *(
        (ScaleConfig, f"{SPEAKING} {text}", named)
        for text, named in (
            ("drafts=0", ["drafts = 0"]),
            ("draft_samples=7", ["draft_samples = 7", "drafts = 8"]),
            ("max_best_of=-1", ["max_best_of = -1"]),
            ("sweep.edits=[17]", ["sweep.edits = [17]", "edits = 16"]),
            ("edit_sampling.num_samples=2", ["edit_sampling.num_samples = 2"]),
            ("draft_sampling.temperature=0", ["draft_sampling.temperature = 0.0", "drafts = 8"]),
        )
    ),
    (RewardEvaluationConfig, "benchmark=judgebench", ["benchmark = 'judgebench'", "scores = ''"]),
    (RewardEvaluationConfig, "benchmark=judgebench reward.path=p scores=s", ["reward.path = 'p'", "scores = 's'"]),
    (RewardEvaluationConfig, "benchmark=heldout reward.path=p", ["benchmark = 'heldout'", "data.path = ''"]),
    (RewardEvaluationConfig, "benchmark=heldout reward.path=p data.path=d data.split=x", ["data.split = 'x'"]),
    (RewardEvaluationConfig, "benchmark=judgebench reward.path=p prior_sets=true", ["prior_sets = True"]),
    (
        RewardEvaluationConfig,
        "benchmark=judgebench reward.path=p resamples=-1",
        ["resamples = -1", "confidence = 0.95"],
    ),
    (QuestionDataConfig, "max_items=0", ["max_items = 0"]),
    (PolicyEvaluationConfig, f"{JUDGED} answers=a", ["policy.path = 'p'", "answers = 'a'"]),
    (PolicyEvaluationConfig, f"{JUDGED} baseline.path=b", ["baseline.path = 'b'"]),
    (PolicyEvaluationConfig, "benchmark=arena-hard policy.path=p judge.path=j", ["benchmark = 'arena-hard'"]),
    (PolicyEvaluationConfig, f"{JUDGED} benchmark=mt-bench", ["benchmark = 'mt-bench'"]),
    (PolicyEvaluationConfig, f"{JUDGED} benchmark=prompts", ["benchmark = 'prompts'", "data.path = ''"]),
    (PolicyEvaluationConfig, f"{JUDGED} data.references=r", ["data.references = 'r'", "benchmark = 'arena-hard'"]),
    (PolicyEvaluationConfig, f"{JUDGED} judge_form=json judge_prompt=f", ["judge_prompt = 'f'", "judge_form = 'json'"]),
    (PolicyEvaluationConfig, f"{JUDGED} attempts=0", ["attempts = 0", "retry_temperature = 0.6"]),
    (PolicyEvaluationConfig, f"{JUDGED} confidence=1", ["confidence = 1.0", "resamples = 100"]),
    # service
    (ReplicasConfig, "min=0", ["min = 0", "max = 1"]),
    (ReplicasConfig, "target_requests=0", ["target_requests = 0.0"]),
    (ReplicasConfig, "gpus=2", ["gpus = 2.0"]),
    (ReplicasConfig, "shards=2 max=2", ["shards = 2", "max = 2"]),
    (RewardServiceConfig, "reward.path=p host=0.0.0.0", ["host = '0.0.0.0'", "token_env = ''"]),
    (RewardServiceConfig, "reward.path=p port=70000", ["port = 70000"]),
    (RewardServiceConfig, "reward.path=p max_queue=1", ["max_queue = 1", "max_conversations = 256"]),
    (RewardServiceConfig, "reward.path=p batch_wait_s=-1", ["batch_wait_s = -1.0"]),
    (RewardServiceConfig, "reward.path=p replicas.shards=2", ["replicas.shards = 2", "reward.zero_stage = 0"]),
]
"""Schema or algorithm, what is given on the command line, and what the remedy must name."""


def called(value: Any) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", "")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, str], str]:
    """The message of each case."""
    messages, folder = {}, tmp_path_factory.mktemp("recipes")
    for schema, text, _ in CASES:
        if isinstance(schema, str):
            recipe = write(folder, schema, NEEDED[schema])
            build = partial(load_recipe, recipe, text.split())
        else:
            recipe = folder / "section.yaml"
            recipe.write_text("{}")
            build = partial(build_config, schema, recipe, text.split())
        with pytest.raises(ConfigError) as caught:
            build()
        messages[schema, text] = str(caught.value)
    return messages


@pytest.mark.parametrize(("schema", "text", "named"), CASES, ids=called)
def test_a_check_names_key_and_value(schema: Any, text: str, named: list[str], said: dict[tuple[Any, str], str]):
    problem, _, remedy = said[schema, text].partition("\n  remedy: change ")
    assert "(command line)" in remedy  # where a value that is wrong was given
    for setting in named:
        assert setting in remedy
    assert "\n" not in problem + remedy  # one fault


def _checks() -> list[tuple[str, list[str]]]:
    """Place and fixed words of every ValueError that a schema raises."""
    files = [
        *sorted(set((ROOT / "config").glob("*.py")) - {ROOT / "config" / "load.py"}),
        *sorted((ROOT / "algorithms").glob("*.py")),
    ]
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Raise)
                and isinstance(node.exc, ast.Call)
                and ast.unparse(node.exc.func) == "ValueError"
            ):
                message = node.exc.args[0]
                parts = message.values if isinstance(message, ast.JoinedStr) else [message]
                words = [part.value for part in parts if isinstance(part, ast.Constant)]
                found.append((f"{path.stem}:{node.lineno}", words))
    return found


def test_every_check_was_tried(said: dict[tuple[Any, str], str]):
    checks = _checks()
    assert len(checks) >= 30
    untried = [
        place for place, words in checks if not any(all(word in text for word in words) for text in said.values())
    ]
    assert untried == []


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_algorithm_is_read_without_torch(algorithm: str):
    source = Path(importlib.import_module(f"align.algorithms.{algorithm}").__file__ or "").read_text()
    imported = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any("torch" in ast.unparse(node) for node in imported)  # only where types are checked
