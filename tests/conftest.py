"""Small models and data that many tests share."""

import gc
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on models this small, threads cost more than they give
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nothing here is compiled but DeepSpeed's Muon, which no run uses: loading Inductor for it takes seconds a process.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from align.data import toy, toy_family
from align.data.genrm_prompts import Verdict
from align.data.genrm_prompts import format_verdict as verdict

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


LONGEST = (
    *("test_exact", "test_workers_ray", "test_exact_ray", "test_end_to_end_algorithms", "test_learning"),
    *("test_going_on", "test_toy_improves", "test_end_to_end", "test_state", "test_service", "test_invariance"),
)
"""Files that take a minute and more each: with two processes they must not be what is left at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the rest in the order of their paths."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """DeepSpeed collects garbage often, and what was imported is none."""
    gc.freeze()


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled task with 300 + 40 rows."""
    return toy.write_toy(tmp_path_factory.mktemp("toy"), 300, 40, seed=0)


def _save(auto, folder: Path, tokenizer: PreTrainedTokenizerFast, **fields) -> Path:
    settings = AutoConfig.for_model(fields.pop("model_type"), vocab_size=len(tokenizer), **fields)
    torch.manual_seed(0)
    auto.from_config(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random causal language model that reads the bundled task."""
    return _save(AutoModelForCausalLM, tmp_path_factory.mktemp("policy"), toy.tokenizer(), **LLAMA)


@pytest.fixture(scope="session")
def tiny_reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model that reads the bundled task."""
    return _save(
        AutoModelForSequenceClassification, tmp_path_factory.mktemp("reward"), toy.tokenizer(), **LLAMA, num_labels=1
    )


@pytest.fixture(scope="session")
def family_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled task with feedback, edits, verdicts and principles, 120 + 20 rows of each."""
    return toy_family.write_toy_family(tmp_path_factory.mktemp("family"), 120, 20, seed=0)


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random causal language model that reads `family_data`."""
    fields = LLAMA | {"max_position_embeddings": 256}
    return _save(AutoModelForCausalLM, tmp_path_factory.mktemp("family_policy"), toy_family.tokenizer(), **fields)


@pytest.fixture(scope="session")
def tiny_attributes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model of three attributes that reads `family_data`."""
    names = dict(enumerate(("verbosity", "helpfulness", "coherence")))
    fields = LLAMA | {"max_position_embeddings": 256, "id2label": names, "label2id": {n: i for i, n in names.items()}}
    folder = tmp_path_factory.mktemp("attributes")
    return _save(AutoModelForSequenceClassification, folder, toy_family.tokenizer(), **fields)


def _judge(folder: Path, words: list[str]) -> Path:
    """A random model that mostly says one of ``words``, each of which is a token, and ends: which one hangs on what it
    reads. Now and then it says more, which is no verdict."""
    tokenizer = toy_family.tokenizer()
    tokenizer.add_tokens(words)
    ids = [id for word in words for id in tokenizer.encode(word, add_special_tokens=False)]
    fields = LLAMA | {"max_position_embeddings": 256, "tie_word_embeddings": False, "initializer_range": 0.2}
    _save(AutoModelForCausalLM, folder, tokenizer, **fields)
    model = AutoModelForCausalLM.from_pretrained(folder)
    read, said = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    read[:, 0], read[:, 1], read[ids, 1] = 4.0, 0.0, 20.0  # the second number is of what has been said
    said[:, 0], said[:, 1] = -3.0, 0.0
    said[ids, 0], said[ids, 1], said[tokenizer.eos_token_id, 1] = 3.0, -5.0, 5.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that writes verdicts of form json on one response or two; some of them are broken."""
    found = [(4, 2, 2), (2, 4, 5), (3, 3, 3), (3, 3, 4), (5, 1, 1), (1, 2, 4), (2, None, None), (4, None, None)]
    return _judge(tmp_path_factory.mktemp("judge"), [verdict(Verdict(*one), "json") for one in found])


@pytest.fixture(scope="session")
def tiny_yes_no(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that answers mostly by Yes or No."""
    return _judge(tmp_path_factory.mktemp("yes_no"), ["Yes", "No"])


@pytest.fixture
def human_preference() -> Path:
    """Pairs labelled by people in HelpSteer3's layout, read in place where they are at hand."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ALIGN_SHARED_DATA", default)) / "human-preference"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} (ALIGN_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with a chat template: reads any text, in any language."""
    folder = tmp_path_factory.mktemp("bytes")
    bytes_only = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    bytes_only.pre_tokenizer, bytes_only.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, eos_token="</s>", pad_token="<pad>", chat_template=template
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_models(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Path) -> tuple[Path, Path]:
    """A random policy and a random reward model over bytes."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(byte_tokenizer)
    sizes = {**LLAMA, "max_position_embeddings": 1024}
    return (
        _save(AutoModelForCausalLM, tmp_path_factory.mktemp("byte-policy"), tokenizer, **sizes),
        _save(
            AutoModelForSequenceClassification, tmp_path_factory.mktemp("byte-reward"), tokenizer, **sizes, num_labels=1
        ),
    )
