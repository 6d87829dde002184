"""The role that answers: how requests are dealt out and answers put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.cluster.roles import StartOptions, start_roles
from align.config import (
    ClusterConfig,
    FunctionGeneratorConfig,
    FunctionRewardConfig,
    ModelGeneratorConfig,
    SamplingConfig,
)
from align.data.chat import Message
from align.generators.base import Completion, Request
from align.roles import CompletedFuture
from align.workers.base import WorkerGroup
from align.workers.generator import Generator as Role
from align.workers.generator import RankCompletions

SAMPLING = SamplingConfig(max_tokens=4)


def requests(count: int) -> list[Request]:
    return [Request((Message("user", f"{number}"),), sample=number) for number in range(count)]


class Echo(WorkerGroup):
    """Three ranks that answer with what they are asked; the last one counts a retry."""

    world_size = 3

    def call(
        self,
        phase: str,
        method: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        gather: Callable[[list[Any]], Any],
    ) -> CompletedFuture[Any]:
        self.sizes = [len(asked) for asked, _, _ in arguments]
        parts = [
            RankCompletions(
                [Completion(one.messages[0].content, True, 1, 1) for one in asked],
                {"requests": float(len(asked)), "retries": float(rank == 2)},
            )
            for rank, (asked, _, _) in enumerate(arguments)
        ]
        return CompletedFuture(gather(parts))

    def start(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        raise NotImplementedError


def test_answers_come_back_in_order_from_all_ranks():
    ranks = Echo()
    role = Role(ranks, ModelGeneratorConfig(path="p"))
    for count in (7, 2, 0):
        found = role.complete(requests(count), SAMPLING).result()
        assert [one.text for one in found] == [str(number) for number in range(count)]
    assert ranks.sizes == [0, 0, 0], "every rank is asked, for sharded weights need all of them"
    assert role.drain() == {"requests": 9.0, "retries": 3.0}
    assert role.drain() == {}


def test_several_roles_in_this_process(tmp_path: Path):
    file = tmp_path / "two.py"
    file.write_text(
        "def answer(messages, sample):\n    return f\"{messages[-1]['content']} {sample}\"\n"
        "def score(prompts, completions):\n    return [float(len(one[0]['content'])) for one in completions]\n"
    )
    sections = {
        "draft": FunctionGeneratorConfig(function=f"{file}:answer"),
        "select": FunctionRewardConfig(function=f"{file}:score"),
    }
    options = StartOptions(seed=1, announce=print)
    with start_roles(sections, "local", {}, ClusterConfig(), tmp_path, options) as found:
        drafts = found["draft"].complete(requests(3), SAMPLING)
        assert drafts.done()
        assert [one.text for one in drafts.result()] == ["0 0", "1 1", "2 2"]
        assert found["draft"].drain() == {"requests": 3.0}
