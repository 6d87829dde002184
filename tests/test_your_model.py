"""Every command of docs/your_model.md, in order, on a tiny model with a template like Qwen's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from align.cli import main
from launchers import slurm

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "your_model.md").read_text()
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REPLACED = {
    "Qwen/Qwen2.5-0.5B-Instruct": "model",
    "http://localhost:8000/v1#Qwen/Qwen2.5-32B-Instruct": "judge.py:verdict",
}
SAMPLING = ["sampling.num_samples=2", "sampling.max_tokens=8"]
SMALLER = {
    "reward_model": ["executor=local", "reward.path=model", "batch_size=16", "reward.optimizer.lr=1e-2"],
    "rloo": ["executor=local", "policy.path=model", "run.steps=2", "prompts_per_step=4", *SAMPLING],
    "policy": ["sampling.max_tokens=8"],
}
"""Overrides that fit a recipe to the tiny model, by the folder of the recipe; `policy` is `align eval policy`."""


@pytest.fixture
def workspace(tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with recipes, pairs, questions, a judge, and the model."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", TEMPLATE
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields |= {"num_key_value_heads": 2, "max_position_embeddings": 32768}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"Name a number below {n}.", "chosen": f"{n - 1}", "rejected": "?" * 9} for n in range(10, 110)]
    (tmp_path / "data/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data/questions.jsonl").write_text('{"prompt": "Name a number."}\n')
    (tmp_path / "judge.py").write_text("def verdict(messages, number):\n    return '[[A=B]]'\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands() -> list[str]:
    return [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


def status(command: str) -> int:
    """The exit status of a command of the page, in this process, on the tiny model and with smaller numbers."""
    for name, replacement in REPLACED.items():
        command = command.replace(name, replacement)
    program, *words = shlex.split(command)
    kind = next((word.split("/")[1] for word in words if word.startswith("recipes/")), "policy" * ("policy" in words))
    if program == "python":
        return slurm.main([*words[1:], "policy.path=model"])
    return main([*words, *SMALLER.get(kind, [])])


@pytest.mark.slow
def test_every_command_of_the_page_in_order(workspace: Path, capsys: pytest.CaptureFixture[str]):
    output_of = {}
    for command in commands():
        assert status(command) == 0, command + "\n" + "\n".join(capsys.readouterr())
        output_of[command] = capsys.readouterr().out
    assert len(output_of) == 8  # the RLOO run occurs twice, and the second time it is complete
    outputs = list(output_of.values())
    assert "done before" in next(text for command, text in output_of.items() if "run.dir=runs/rloo/mine" in command)
    heldout = next(text for command, text in output_of.items() if "--benchmark heldout" in command)
    assert "100.0" in heldout, heldout  # the reward model recognizes responses of question marks
    assert "#SBATCH --gpus-per-node=1" in outputs[-1]
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(snippet, "docs/your_model.md", "exec"), {})
    capsys.readouterr()
