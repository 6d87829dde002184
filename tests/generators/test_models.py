"""Models that answer: the same answer in any company, and the margin of Yes against a plain forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.config import GeneratorConfig, ModelGeneratorConfig, SamplingConfig
from align.data.chat import Message
from align.engines import decoder
from align.errors import DataError
from align.generators.base import Request
from align.generators.models import ModelGenerator
from align.types import Rollouts

CPU = torch.device("cpu")
SAMPLING = SamplingConfig(max_tokens=12, temperature=1.0)
REQUESTS = [
    Request((Message("user", "reverse the words : cat dog sun"),)),
    Request((Message("user", "say the last word : moon egg"),), sample=0),
    Request((Message("user", "say the last word : moon egg"),), sample=1),
    Request((Message("user", "sort the words : wolf ant"),), opening="ant"),
    Request(
        (Message("user", "sort the words : wolf ant"), Message("response_1", "wolf"), Message("response_2", "ant"))
    ),
]


@pytest.fixture(scope="module")
def section(tiny_family: Path) -> GeneratorConfig:
    return ModelGeneratorConfig(path=str(tiny_family), dtype="float32")


@pytest.fixture(scope="module")
def generator(section: GeneratorConfig) -> ModelGenerator:
    return ModelGenerator(section, CPU, seed=3)


def test_an_answer_depends_on_its_request_alone(generator: ModelGenerator, section: GeneratorConfig):
    together = generator.complete(REQUESTS, SAMPLING)
    alone = [generator.complete([one], SAMPLING)[0] for one in REQUESTS]
    crowded = ModelGenerator(replace(section, max_num_seqs=2), CPU, seed=3).complete(REQUESTS[::-1], SAMPLING)
    assert together == alone == crowded[::-1]
    assert together[1].text != together[2].text, "sample 1 is another answer than sample 0"
    other = ModelGenerator(section, CPU, seed=4).complete(REQUESTS, SAMPLING)
    assert [one.text for one in other] != [one.text for one in together]


def test_tokens_are_counted(generator: ModelGenerator):
    generator.metrics()
    found = generator.complete(REQUESTS, SAMPLING)
    ids = [generator.renderer.prompt_ids(one.messages, one.opening) for one in REQUESTS]
    assert [one.prompt_tokens for one in found] == [len(one) for one in ids]
    assert generator.metrics() == {
        "requests": 5.0,
        "prompt_tokens": float(sum(map(len, ids))),
        "completion_tokens": float(sum(one.tokens for one in found)),
    }
    assert all(one.finished or one.tokens == 12 for one in found)
    assert set(generator.metrics().values()) == {0.0}


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[Rollouts]:
    """All rollouts that are made."""
    made: list[Rollouts] = []
    generate = decoder.generate

    def spy(*arguments: Any) -> Rollouts:
        made.append(generate(*arguments))
        return made[-1]

    monkeypatch.setattr(decoder, "generate", spy)
    return made


def test_the_opening_is_given_and_not_repeated(generator: ModelGenerator, sampled: list[Rollouts]):
    bare, opened = REQUESTS[3]._replace(opening=""), REQUESTS[3]
    ids = generator.renderer.prompt_ids(bare.messages)
    given = generator.renderer.prompt_ids(opened.messages, "ant")
    assert given == [*ids, *generator.renderer.tokenizer.encode("ant", add_special_tokens=False)]
    generator.complete([opened], replace(SAMPLING, temperature=0.0))
    model = AutoModelForCausalLM.from_pretrained(generator.config.path, dtype=torch.float32)
    first = int(model(torch.tensor([given])).logits[0, -1].argmax())
    assert sampled[0].sequences.prompts.lists() == [given]
    assert sampled[0].sequences.responses.lists()[0][0] == first


def test_margins_are_those_of_a_plain_forward_pass(section: GeneratorConfig, sampled: list[Rollouts]):
    """A random model says Yes or No now and then."""
    generator = ModelGenerator(section, CPU, seed=0)
    requests = [Request((Message("user", "hello"),), sample=number) for number in range(60)]
    found = generator.complete(requests, replace(SAMPLING, max_tokens=30), margins=True)
    model = AutoModelForCausalLM.from_pretrained(section.path, dtype=torch.float32)
    vocabulary = generator.renderer.tokenizer.get_vocab()
    pairs = [(vocabulary["Yes▁"], vocabulary["No▁"])]  # the task's tokenizer has them in one form
    prompt, checked = generator.renderer.prompt_ids(requests[0].messages), set()
    for one, ids in zip(found, sampled[0].sequences.responses.lists(), strict=True):
        places = [(i, pair) for i, id in enumerate(ids) for pair in pairs if id in pair]
        assert (one.margin is None) == (not places)
        if places:
            place, (yes, no) = places[-1]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *ids[:place]]])).logits[0, -1]
            assert one.margin == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
            checked.add(ids[place])
    assert len(checked) == 2, "each of the two words was last somewhere"


def test_what_does_not_fit_is_refused(generator: ModelGenerator):
    with pytest.raises(DataError, match=r"exceeds the 256 positions.*\n.*lower sampling.max_tokens"):
        generator.complete(REQUESTS, replace(SAMPLING, max_tokens=250))
