"""What TRL 1.16 computes on given rows: the one place where the tests of this folder call TRL.

Every number comes out of a real trainer: its constructor, its tokenization and collator or its generation, its scoring,
its ``compute_loss``. Nothing of TRL is replaced or copied. A trainer changes the model it is given (it replaces
``forward`` and sets the padding id), so the other side of a comparison needs a copy made before.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

if not trl.__version__.startswith("1.16."):
    pytest.skip(f"the trainers of TRL 1.16 are compared, this is {trl.__version__}", allow_module_level=True)

from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

disable_progress_bars()
_folder = tempfile.TemporaryDirectory(prefix="trl-oracle-")


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred and a rejected answer, and how much better the one is."""

    prompt: str
    chosen: str
    rejected: str
    margin: float


@dataclass(frozen=True)
class Answer:
    """Loss of a batch, its gradient by name of the weight, and the token ids that were read, without padding.

    ``ids`` are the preferred conversations, then the rejected ones.
    """

    loss: float
    gradients: dict[str, Tensor]
    ids: list[list[int]]


@dataclass(frozen=True)
class Rollout:
    """Sampled responses with what TRL made of them."""

    prompts: list[list[int]]
    responses: list[list[int]]
    advantages: Tensor


def _settings(kind: Any, **changes: Any) -> Any:
    """Arguments of a trainer in float32 on the CPU that reports to nobody."""
    common = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "gradient_checkpointing": False}
    return kind(output_dir=_folder.name, **common, **changes)


def _messages(pair: Pair) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": pair.prompt}],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


def _gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(ids, mask.bool(), strict=True)]


def _answer(trainer: Any, model: PreTrainedModel) -> Answer:
    """The loss of all rows in one batch, made by the trainer's own collator."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    if "input_ids" in batch:
        ids = _unpadded(batch["input_ids"], batch["attention_mask"])
    else:  # CPO keeps preferred and rejected apart
        ids = [
            row
            for side in ("chosen", "rejected")
            for row in _unpadded(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"])
        ]
    loss = trainer.compute_loss(trainer.model, batch)
    return Answer(loss.item(), _gradients(model, loss), ids)


def dpo(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    **settings: Any,
) -> Answer:
    """``DPOTrainer.compute_loss``."""
    args = _settings(DPOConfig, **settings)
    rows = Dataset.from_list([_messages(pair) for pair in pairs])
    return _answer(
        DPOTrainer(model, copy.deepcopy(reference), args, train_dataset=rows, processing_class=tokenizer), model
    )


def cpo(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], **settings: Any) -> Answer:
    """``CPOTrainer.compute_loss``, TRL's home of SimPO, without the likelihood term."""
    args = _settings(CPOConfig, cpo_alpha=0.0, **settings)
    rows = Dataset.from_list([_messages(pair) for pair in pairs])
    return _answer(CPOTrainer(model, args, train_dataset=rows, processing_class=tokenizer), model)


def reward(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    with_margin: bool,
    **settings: Any,
) -> Answer:
    """``RewardTrainer.compute_loss``, with a ``margin`` column or without."""
    args = _settings(RewardConfig, **settings)
    rows = [{**_messages(pair), **({"margin": pair.margin} if with_margin else {})} for pair in pairs]
    return _answer(RewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer), model)


class Online:
    """A trainer that samples: `roll_out` once, then `loss` after the weights of ``model`` were changed in place.

    The reference is read from the folder that ``model`` was loaded from. ``stop_ids`` end a response.
    """

    def __init__(
        self,
        algorithm: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        scores: list[float | None],
        stop_ids: list[int],
        **settings: Any,
    ):
        kind, trainer = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[algorithm]

        def score(completions: list[Any], **_: Any) -> list[float | None]:
            return scores

        assert model.generation_config is not None
        model.generation_config.eos_token_id = stop_ids
        args = _settings(kind, per_device_train_batch_size=len(scores), **settings)
        rows = Dataset.from_list([{"prompt": "unused"}])
        self.model = model.train()
        self.trainer = trainer(model, score, args, train_dataset=rows, processing_class=tokenizer)
        self.trainer.current_gradient_accumulation_steps = 1  # as the training loop would
        self.batch: dict[str, Any] = {}

    def roll_out(self, prompts: Sequence[str]) -> Rollout:
        """Sample an answer to every prompt, score it and take advantages, as ``_generate_and_score_completions`` does.

        Prompts of one group are neighbours.
        """
        torch.manual_seed(7)
        inputs = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
        self.batch = self.trainer._generate_and_score_completions(inputs)
        return Rollout(
            _unpadded(self.batch["prompt_ids"], self.batch["prompt_mask"]),
            _unpadded(self.batch["completion_ids"], self.batch["completion_mask"]),
            self.batch["advantages"],
        )

    def loss(self) -> tuple[Answer, float]:
        """``compute_loss`` of what was sampled, and the share of clipped ratios that TRL logs."""
        loss = self.trainer.compute_loss(self.model, self.batch)
        clipped = self.trainer._metrics["train"]["clip_ratio/region_mean"][-1]
        return Answer(loss.item(), _gradients(self.model, loss), []), clipped
