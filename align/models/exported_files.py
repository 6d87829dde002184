"""What an exported folder holds beside its weights: config, tokenizer, template, stop ids, padding token, code."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_relative_imports

from align.config import ModelConfig, TrainedRewardConfig
from align.data import chat
from align.data.chat import Message, Renderer
from align.errors import AlignError, ModelError
from align.models import load
from align.models.weights import stored_file

CONFIGS = ("config.json", "tokenizer_config.json")
"""Files whose ``auto_map`` names Python modules of the folder."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
KEPT = ("do_sample", *SAMPLING, "max_new_tokens", "max_length", "bos_token_id", "pad_token_id")
"""Fields of the base's generation config that an export keeps. Penalties, suppressed and forced tokens, least lengths
and beams go: they change greedy answers, and no rollout used them."""
PAD = "<|pad|>"
TEXTS = (
    "Hello  world's end.\n\n\tdef f(x): return x+1  # 123456 caf\u00e9 \u4e2d\u6587 \U0001f600",
    " leading blank, CAPITALS, 3.14159 and a_name; \u00dcml\u00e4ute \u0440\u0443\u0441 \u3042\n",
)
"""What a tokenizer encodes before and after it was written."""

Loader = Literal["AutoTokenizer", "PreTrainedTokenizerFast"]
End = Literal["cut", "append", "all"]


@dataclass(frozen=True)
class Chat:
    """How a run renders conversations: what a reader of its exported model must do likewise."""

    template: str
    date: str | None
    """Passed to the template as ``date_string``."""
    stop_ids: tuple[int, ...]
    """Ids that end a response."""
    end_id: int
    """The last token of a conversation that a reward model scores."""
    end: End
    """What makes a rendered conversation end in it: text after it is ``cut``, it is ``append``-ed, or ``all`` text is
    read as the template writes it."""
    ids: frozenset[int]
    """Those of a short conversation."""
    loader: Loader = "AutoTokenizer"
    """Class whose ``from_pretrained`` encodes as the run does."""

    @classmethod
    def of(cls, renderer: Renderer, whole: bool = False) -> Chat:
        """As ``renderer`` does; ``whole``: conversations are scored with all that the template writes."""
        ids = renderer.conversation_ids([Message("user", "question"), Message("assistant", "answer")])
        end: End = "all" if whole else "cut" if renderer.closes_turns else "append"
        end_id = ids[-1] if whole else renderer.end_id
        return cls(renderer.template, renderer.date, renderer.stop_ids, end_id, end, frozenset({*ids, end_id}))

    def set_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Have ``tokenizer`` be written with the run's template; named templates beside an equal default stay."""
        own: Any = tokenizer.chat_template
        if (own.get("default") if isinstance(own, dict) else own) != self.template:
            tokenizer.chat_template = self.template


@dataclass(frozen=True)
class Exported:
    """What the folder of an exported model says beside its weights."""

    algorithm: str
    chat: Chat


def set_stop_ids(model: PreTrainedModel, stop_ids: Collection[int]) -> None:
    """Have ``model`` be written with these stop ids and those that its checkpoint names, in ``config.json`` and
    ``generation_config.json``. Raises `ModelError` for generation fields that transformers cannot write."""
    base, text = model.generation_config, model.config.get_text_config()
    own = getattr(base, "eos_token_id", None)
    ids = {*stop_ids, *(own if isinstance(own, list) else [own] if own is not None else [])}
    stops = sorted(id for id in ids if 0 <= id < text.vocab_size)
    fields = {name: value for name in KEPT if (value := getattr(base, name, None)) is not None}
    if not fields.get("do_sample"):
        fields = {name: value for name, value in fields.items() if name not in SAMPLING}
    try:
        model.generation_config = GenerationConfig(**fields, eos_token_id=stops)
        model.generation_config.validate(strict=True)
    except ValueError as error:
        raise ModelError(
            f"its generation_config.json cannot be written again: {error}",
            where=model.config.name_or_path,
            remedy="correct or delete that file",
        ) from error
    for config in (model.config, text):
        _set_eos(config, stops)


def stored_stop_ids(folder: Path) -> list[int]:
    """Stop ids of a model folder: of ``generation_config.json``, else of ``config.json``."""
    file = next(file for name in ("generation_config.json", "config.json") if (file := folder / name).is_file())
    stored = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    return stored if isinstance(stored, list) else [] if stored is None else [stored]


def _set_eos(config: PreTrainedConfig, stops: list[int]) -> None:
    before = config.eos_token_id
    config.eos_token_id = stops[0] if len(stops) == 1 else stops
    try:
        type(config).from_dict(config.to_dict())
    except Exception:  # a config class that takes one id alone; generation_config.json has all
        config.eos_token_id = before


def set_padding(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, chat_format: Chat) -> None:
    """Give tokenizer and config of a sequence classifier one padding token, which no conversation holds.

    transformers' classifiers score the last token that is not ``config.pad_token_id``. Tried in this order: the
    tokenizer's own, another special token that is not used, a new one where the embedding has a row to spare. Without
    any, the config has none: transformers then refuses batches instead of scoring a wrong token.
    """
    text = config.get_text_config()
    pad = padding_token(tokenizer, chat_format.ids, chat_format.stop_ids, text.vocab_size)
    if pad is not None and tokenizer.pad_token != pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.padding_side = "right"  # on the left, learned positions (GPT-2) would move
    for part in (config, text):
        part.pad_token_id = None if pad is None else tokenizer.pad_token_id


def padding_token(
    tokenizer: PreTrainedTokenizerBase, used: Collection[int], stop_ids: Collection[int], rows: int
) -> str | None:
    """A token to pad with that is none of the ids ``used``, below ``rows``; None where there is none."""
    own: Any = tokenizer.pad_token_id
    if own is not None and own not in used and own < rows:
        return str(tokenizer.pad_token)
    marks: Any = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    barred = {*used, *stop_ids, *marks}
    special: dict[int, Any] = tokenizer.added_tokens_decoder
    free = {id: token.content for id, token in special.items() if token.special and id < rows and id not in barred}
    if free:
        return str(free[min(free, key=lambda id: (_rank(free[id]), id == tokenizer.unk_token_id, id))])
    spare = len(tokenizer) < rows and PAD not in tokenizer.get_vocab()
    return PAD if spare and len(tokenizer) == 1 + max(tokenizer.get_vocab().values()) else None


def _rank(token: str) -> int:
    """How well a name suits, 0 best."""
    words = ("pad", "reserved", "unused", "extra")
    return next((rank for rank, word in enumerate(words) if word in token.lower()), len(words))


def code(section: ModelConfig) -> dict[str, str]:
    """Text by name of the Python modules that a checkpoint with ``trust_remote_code`` names, and of those they import
    relatively. Raises `ModelError` for a missing file."""
    if not section.trust_remote_code:
        return {}
    waiting, sources = _modules(section), {}
    while waiting:
        name = waiting.pop()
        file = stored_file(section, name)
        if file is None:
            raise ModelError(
                f"{name} is missing, which its auto_map or another module names",
                where=section.path,
                remedy="download the checkpoint again, with its Python files",
            )
        sources[name] = Path(file).read_text(encoding="utf-8")
        waiting |= {f"{module}.py" for module in get_relative_imports(file) if module} - sources.keys()
    return sources


def _modules(section: ModelConfig) -> set[str]:
    names: set[str] = set()
    for config in CONFIGS:
        if file := stored_file(section, config):
            names |= {f"{module}.py" for module in _named(json.loads(Path(file).read_text(encoding="utf-8")))}
    return names


def _named(config: Mapping[str, Any]) -> set[str]:
    """Modules in ``auto_map``, without the name of the class."""
    values = [
        reference for entry in config.get("auto_map", {}).values() for reference in (entry if _many(entry) else [entry])
    ]
    return {str(value).rpartition(".")[0] for value in values if value}


def _many(entry: Any) -> bool:
    return isinstance(entry, (list, tuple))


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: Mapping[str, torch.Tensor],
    folder: Path,
    extra: Mapping[str, str],
) -> None:
    """Write ``state`` with config, generation config and tokenizer to ``folder``, and the texts of ``extra``."""
    implementation = model.config._attn_implementation
    try:
        model.save_pretrained(folder, state_dict=dict(state))  # which it empties
    finally:
        model.config._attn_implementation = implementation
    tokenizer.save_pretrained(folder)
    for name, text in extra.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in CONFIGS:
        _drop_missing_code(folder / name)


def _drop_missing_code(file: Path) -> None:
    """Take ``auto_map`` out of a config whose code was not used, so it is not in the folder."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if any(not (file.parent / f"{module}.py").is_file() for module in _named(config)):
        del config["auto_map"]
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def verify(folder: Path, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool) -> None:
    """Read config and tokenizer back. Raises `ModelError` where the tokenizer encodes or renders other ids."""
    AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _compare(folder, tokenizer, chat.load_tokenizer(folder, trust_remote_code=trust_remote_code))


def _compare(folder: Path, tokenizer: PreTrainedTokenizerBase, again: PreTrainedTokenizerBase) -> None:
    if again.chat_template != tokenizer.chat_template:
        raise ModelError("the chat template reads back other than it was written", where=str(folder))
    for (what, ids), (_, other) in zip(_encoded(tokenizer), _encoded(again), strict=True):
        if ids != other:
            raise ModelError(
                f"the tokenizer reads back other than it was written: {what} is {other[:20]}, it was {ids[:20]}",
                where=str(folder),
                remedy="give a model whose tokenizer transformers can save and load: tokenizer.save_pretrained(folder)",
            )


def _encoded(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[Any]]]:
    """Ids of fixed texts, of a conversation, and of the special tokens."""
    texts = [*TEXTS, "".join(map(str, tokenizer.all_special_tokens))]
    if isinstance(tokenizer.chat_template, str):
        turns = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[1]}]
        date: dict[str, Any] = {"date_string": "26 Jul 2024"}  # a template may read the clock without it
        texts.append(str(tokenizer.apply_chat_template(turns, tokenize=False, **date)))
    marks = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)]
    encoded = [(repr(text), tokenizer.encode(text, add_special_tokens=False, verbose=False)) for text in texts]
    return [("[bos, eos, pad, number of entries]", marks), *encoded]


def try_out(section: ModelConfig, renderer: Renderer) -> Chat:
    """Write the model of a role without its weights to a folder that is deleted, and read it back, so that no run
    fails after its last step.

    Returns what `Chat.of` gives, with the loader that works. Raises `ModelError`.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="align-export-") as temporary:
            return _tried(section, Chat.of(renderer), Path(temporary) / "final")
    except Exception as error:  # code of a tokenizer or config may raise anything
        if isinstance(error, AlignError):
            raise
        raise ModelError(
            f"its config or tokenizer cannot be exported: {type(error).__name__}: {error}",
            where=section.path,
            remedy="give a checkpoint whose config and tokenizer transformers can save and load again",
        ) from error


def _tried(section: ModelConfig, chat_format: Chat, folder: Path) -> Chat:
    tokenizer = chat.load_tokenizer(section.path, section.revision, section.trust_remote_code)
    size = chat.vocab_size(tokenizer)
    model = load.without_weights(section, size)
    chat_format.set_template(tokenizer)
    if isinstance(section, TrainedRewardConfig):
        set_padding(tokenizer, model.config, chat_format)
    else:
        set_stop_ids(model, chat_format.stop_ids)
    write(model, tokenizer, {}, folder, code(section))
    verify(folder, tokenizer, section.trust_remote_code)
    again = load.without_weights(replace(section, path=str(folder), revision=None, init={}), size)
    if _shape(again) != _shape(model):
        raise ModelError(
            f"{type(model).__name__} is read back as {type(again).__name__} or with other weights",
            where=section.path,
            remedy="correct its config.json and the code that auto_map names",
        )
    plain = AutoTokenizer.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    same = _encoded(plain) == _encoded(tokenizer)
    return replace(chat_format, loader="AutoTokenizer" if same else "PreTrainedTokenizerFast")


def _shape(model: PreTrainedModel) -> tuple[str, dict[str, torch.Size]]:
    return type(model).__name__, {name: parameter.shape for name, parameter in model.named_parameters()}
