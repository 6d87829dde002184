"""Messages to token ids and back: tokenizers, chat templates and where a response begins and ends.

Only the chat template writes text before and after a message, including the beginning-of-sequence token, as in
``tokenizer.apply_chat_template`` and the inference servers that follow it. `Renderer` adds nothing to that text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from align.data import templates
from align.errors import ConversationError, DataError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

TRUST = (
    "read that code; then set trust_remote_code=true and, for a hub id, revision to the 40-digit commit you have read"
)
"""Remedy for a checkpoint that needs remote code."""

_PROBE = "Hello  world's end.\n\n\tdef f(x): return x+1  # 123456 caf\u00e9 \u4e2d\u6587 \U0001f600 </s>"

_DATE_REQUESTED = "asked for today's date"

# A macro hides the global of the same name, so every branch of a template that reads the clock raises. Jinja's
# trim_blocks removes the newline, so the template still begins at the start of a line.
_NO_CLOCK = f'{{% macro strftime_now(format) %}}{{{{ raise_exception("{_DATE_REQUESTED}") }}}}{{% endmacro %}}\n'


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """``system``, ``user`` or ``assistant``."""
    content: str


class RenderError(ConversationError):
    """A conversation that the chat template or the tokenizer refuses."""


class Dialogue(NamedTuple):
    """A conversation and one response to it, as text."""

    context: tuple[Message, ...]
    """Ends with the user's turn."""
    response: str


def load_tokenizer(
    path: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder in Hugging Face layout, or of a hub id.

    transformers 5 builds the tokenizer class that belongs to the ``model_type`` of ``config.json`` (``qwen2``) or to
    ``tokenizer_class`` (``LlamaTokenizer``), with that family's pre-tokenizer in place of the one in
    ``tokenizer.json``, and adds its special tokens. Where the two tokenize text differently, or the folder's files name
    no such token, the files win.

    Raises `DataError` when there is no tokenizer at ``path`` or it cannot be loaded.
    """
    path = str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else str(path)
    files = (*_TOKENIZER_FILES, "tokenizer_config.json") if trust_remote_code else _TOKENIZER_FILES
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in files):
        raise DataError(
            f"the folder has no tokenizer (looked for {', '.join(files)})",
            where=path,
            remedy="save the tokenizer beside the weights: tokenizer.save_pretrained(folder)",
        )
    branch: dict[str, Any] = {} if revision is None else {"revision": revision}
    if trust_remote_code:
        _require_own_code(path, branch)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **branch)
        file = cached_file(path, "tokenizer.json", **branch, _raise_exceptions_for_missing_entries=False)
        if isinstance(tokenizer, PreTrainedTokenizerFast) and file:
            raw = Tokenizer.from_file(file)
            from_transformers = type(tokenizer).__module__.startswith("transformers.")  # no code of the checkpoint
            longer, other = (
                from_transformers and len(tokenizer) > raw.get_vocab_size(),
                _cuts_differently(tokenizer, raw),
            )
            plain = PreTrainedTokenizerFast.from_pretrained(path, **branch) if longer or other else tokenizer
            tokenizer = plain if other or len(plain) < len(tokenizer) else tokenizer
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise DataError(
            f"the tokenizer cannot be loaded: {_first_line(error)}",
            where=path,
            remedy=TRUST
            if "trust_remote_code" in str(error)
            else "give a folder with tokenizer.json and tokenizer_config.json, or a hub id that can be reached",
        ) from error
    return tokenizer


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Embedding rows that this tokenizer needs: its largest id plus one, including `gaps` below it."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def gaps(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids below `vocab_size` without a token, in ascending order."""
    used = set(tokenizer.get_vocab().values())
    unused = [id for id in range(vocab_size(tokenizer)) if id not in used]  # some vocabularies name each id only once
    tokens = cast("list[str | None]", tokenizer.convert_ids_to_tokens(unused))
    return tuple(id for id, token in zip(unused, tokens, strict=True) if token is None)


def _require_own_code(path: str, branch: Mapping[str, Any]) -> None:
    """Refuse code in another repository: transformers would fetch its newest commit and ignore the pinned one."""
    for name in ("config.json", "tokenizer_config.json"):
        file = cached_file(path, name, **branch, _raise_exceptions_for_missing_entries=False)
        try:
            code = json.loads(Path(file).read_text(encoding="utf-8")).get("auto_map") if file else None
        except (ValueError, AttributeError) as error:
            raise DataError(f"{name} cannot be read: {_first_line(error)}", where=path) from error
        if "--" in json.dumps(code):
            raise DataError(
                f"{name} refers to code in another repository, which a revision cannot pin: {code}",
                where=path,
                remedy="download the model and its code into one folder, name its files in auto_map, and use it",
            )


def _cuts_differently(tokenizer: PreTrainedTokenizerFast, raw: Tokenizer) -> bool:
    raw.no_truncation()
    # Includes words of the vocabulary: a word-level tokenizer knows only those.
    probe = " ".join([_PROBE, *sorted(raw.get_vocab())[:500]])
    ids = raw.encode(probe, add_special_tokens=False).ids
    same_ids = tokenizer.encode(probe, add_special_tokens=False, verbose=False) == ids
    return not same_ids or tokenizer.backend_tokenizer.decode(ids) != raw.decode(ids)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


class Renderer:
    """Conversations as token ids, by one tokenizer and one chat template.

    ``chat_template`` is a file that replaces the tokenizer's template. ``date`` is passed to the template as
    ``date_string``. ``section`` is the recipe section that sets both, for remedies. `row` uses ``bad_rows``. Raises
    `DataError` when there is no template, when the template cannot be read or rendered or asks for today's date, and
    when the tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        date: str | None = None,
        section: str = "data",
        bad_rows: Literal["stop", "skip"] = "stop",
    ):
        self._bos, eos = _marks(tokenizer)
        if eos is None:
            raise DataError("the tokenizer has no end-of-sequence token", where=tokenizer.name_or_path)
        self._eos = eos
        self.tokenizer = tokenizer
        self.date, self._section, self._bad_rows = date, section, bad_rows
        self._name = chat_template or f"chat template of {tokenizer.name_or_path or 'the tokenizer'}"
        self.template = _read_template(tokenizer, chat_template, section)
        self._end_of_turn = self._find_end_of_turn()

    def with_bad_rows(self, bad_rows: Literal["stop", "skip"]) -> Renderer:
        """The same renderer with another ``bad_rows``."""
        other = copy(self)
        other._bad_rows = bad_rows
        return other

    @contextmanager
    def row(self, where: str, counts: dict[str, int]) -> Iterator[None]:
        """Render the row at ``where`` in this block.

        When the template or the tokenizer refuses a row, this raises `DataError` with the row's place. With
        ``bad_rows: skip`` it leaves the block instead and counts the row as ``not_rendered``.
        """
        try:
            yield
        except RenderError as error:
            if self._bad_rows == "stop":
                remedy = (
                    f"fix the row, set another template ({self._section}.chat_template=FILE), or skip and "
                    "count such rows: data.bad_rows=skip"
                )
                message = f"{error.where} cannot render the row: {error.message}"
                raise DataError(message, where=where or error.where, remedy=remedy) from error
            counts["not_rendered"] = counts.get("not_rendered", 0) + 1

    def prompt_ids(self, messages: Sequence[Message], opening: str = "") -> list[int]:
        """Ids of the conversation up to where the assistant's next words begin, or ``opening``, its first words."""
        ids = self._encode(self._render(messages, add_generation_prompt=True) + opening)
        if not ids:
            raise RenderError("the prompt has no tokens", public="the prompt has no tokens", where=self._name)
        if ids[:2] == [self._bos, self._bos]:
            message = f"a prompt begins with two beginning-of-sequence tokens ({self.tokenizer.bos_token})"
            quoted = any(str(self.tokenizer.bos_token) in message.content for message in messages)
            remedy = "write it once, in the template, and not in the messages"
            raise RenderError(message, public=message if quoted else "", where=self._name, remedy=remedy)
        return ids

    def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a whole conversation, including its last answer and everything the template writes after it."""
        return self._encode(self._render(messages, add_generation_prompt=False))

    def response_ids(self, messages: Sequence[Message], response: str) -> list[int]:
        """Ids of ``response`` as they follow `prompt_ids`, closed by the end-of-turn token; see `dialogue_ids`."""
        return self.dialogue_ids(messages, [response])[1][0]

    def dialogue_ids(
        self, messages: Sequence[Message], responses: Sequence[str], opening: str = ""
    ) -> tuple[list[int], list[list[int]]]:
        """`prompt_ids`, up to the end of ``opening``, and the ids of each of ``responses`` as they follow it.

        Text that the template writes after the end-of-turn token (Qwen: a newline) is cut off, because the policy never
        samples it. Where the template writes no end-of-turn token, the tokenizer's end-of-sequence token is added.
        Raises `DataError` when the template renders the prompt differently once an answer follows it.
        """
        prompt_ids = self.prompt_ids(messages, opening)
        prompt = self._render(messages, add_generation_prompt=True) + opening
        answers = [opening + response for response in responses]
        return prompt_ids, [self._response_ids(messages, answer, prompt, prompt_ids) for answer in answers]

    def _response_ids(
        self, messages: Sequence[Message], response: str, prompt: str, prompt_ids: list[int]
    ) -> list[int]:
        text = self._render([*messages, Message("assistant", response)], add_generation_prompt=False)
        if not text.startswith(prompt):
            raise RenderError(
                f"the prompt {prompt[-60:]!r} is not the beginning of the conversation with its answer",
                where=self._name,
                remedy="give a template that writes the same text before an answer: "
                f"{self._section}.chat_template=FILE",
            )
        ids = self._encode(text)
        # In context, so SentencePiece puts no word mark before the first word, unless a token straddles the border.
        in_context = ids[: len(prompt_ids)] == prompt_ids
        ids = ids[len(prompt_ids) :] if in_context else self._encode(text[len(prompt) :])
        if self._end_of_turn not in ids:
            return [*ids, self._eos]
        # Take the last occurrence: the response may quote the token.
        return ids[: len(ids) - ids[::-1].index(self._end_of_turn)]

    def text(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens."""
        return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def text_with_special_tokens(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` as the model reads it, where special tokens tell the roles apart."""
        return cast(str, self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the tokenizer's end-of-sequence token and the template's end-of-turn token."""
        return tuple(sorted({self._eos, self.end_id}))

    @property
    def end_id(self) -> int:
        """Last id of a rendered response that is not truncated: end of turn, or end of sequence."""
        return self._eos if self._end_of_turn is None else self._end_of_turn

    @property
    def closes_turns(self) -> bool:
        """Whether the template writes an end-of-turn token after an answer."""
        return self._end_of_turn is not None

    @property
    def writes_bos(self) -> bool:
        """Whether the template writes the beginning-of-sequence token."""
        text = self._render([Message("user", "question")], add_generation_prompt=True)
        return self._bos is not None and self._encode(text)[:1] == [self._bos]

    @property
    def fingerprint(self) -> str:
        """sha256 of vocabulary, special ids, template and date; equal on every machine."""
        content = [sorted(self.tokenizer.get_vocab().items()), _marks(self.tokenizer), self.template, self.date]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _encode(self, text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise RenderError(f"the tokenizer fails: {_first_line(error)}", where=self._name) from error

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        date: dict[str, Any] = {} if self.date is None else {"date_string": self.date}
        try:
            return templates.render(
                _NO_CLOCK + self.template,
                [message._asdict() for message in messages],
                **{**self.tokenizer.special_tokens_map, **date},
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # an expression of a template may raise anything
            if str(error) != _DATE_REQUESTED:
                raise self._failure(error, messages) from error
        raise DataError(
            "the chat template writes today's date, so a run would not be reproducible",
            where=self._name,
            remedy=f"set a fixed date, for example {self._section}.date='26 Jul 2024'"
            if self.date is None
            else f"{self._section}.date is set but the template does not read date_string; give another "
            f"{self._section}.chat_template=FILE",
        )

    def _failure(self, error: Exception, messages: Sequence[Message]) -> RenderError:
        """Convert a template's exception; one from ``raise_exception`` is reported as a fault of the conversation."""
        roles = ", ".join(message.role for message in messages)[:200]
        public = f"the reward model's chat template refuses a conversation of these roles: {roles}"
        refused = type(error) is TemplateError
        return RenderError(
            f"the template fails: {_first_line(error)}", public=public if refused else "", where=self._name
        )

    def _find_end_of_turn(self) -> int | None:
        """The first special token that the template writes after an answer."""
        answer = "answer"
        text = self._render([Message("user", "question"), Message("assistant", answer)], add_generation_prompt=False)
        _, marker, after = text.rpartition(answer)
        if not marker:
            raise DataError("the chat template drops the assistant's messages", where=self._name)
        special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special.update(self.tokenizer.all_special_ids)
        return next((id for id in self._encode(after) if id in special), None)


def _read_template(tokenizer: PreTrainedTokenizerBase, file: str | None, section: str) -> str:
    try:
        return tokenizer.get_chat_template() if file is None else Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the chat template cannot be read: {_first_line(error)}",
            where=file,
            remedy=f"{section}.chat_template=FILE",
        ) from error
    except ValueError as error:
        raise DataError(
            "the tokenizer has no chat template, so conversations cannot be rendered",
            where=tokenizer.name_or_path,
            remedy=f"set one: {section}.chat_template=FILE",
        ) from error


def _marks(tokenizer: PreTrainedTokenizerBase) -> list[int | None]:
    """Beginning- and end-of-sequence ids."""
    return cast("list[int | None]", [tokenizer.bos_token_id, tokenizer.eos_token_id])


def same_vocabulary(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether ids mean the same in both tokenizers: equal vocabularies, beginning- and end-of-sequence ids.

    The padding id may differ, since packed ids hold no padding. So may an entry used only for padding whose id the
    other vocabulary lacks.
    """
    return _marks(a) == _marks(b) and not (_only_in(a, b) or _only_in(b, a))


def _only_in(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether ``a`` has an entry that ``b`` lacks, apart from one used only for padding."""
    more = a.get_vocab().items() - b.get_vocab().items()
    return any(id != a.pad_token_id or id in b.get_vocab().values() for _, id in more)


def require_same_tokenizer(
    a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase, name_a: str = "policy", name_b: str = "reward"
) -> None:
    """Raise `DataError` naming sizes and the first difference unless `same_vocabulary` holds."""
    if same_vocabulary(a, b):
        return
    vocabulary_a, vocabulary_b = a.get_vocab(), b.get_vocab()
    differing = vocabulary_a.items() ^ vocabulary_b.items()
    if differing:
        first = min(id for _, id in differing)
        difference = (
            f"id {first} is {_tokens(vocabulary_a, first)} in {name_a} and {_tokens(vocabulary_b, first)} in {name_b}"
        )
    else:
        difference = f"beginning- and end-of-sequence ids are {_marks(a)} in {name_a} and {_marks(b)} in {name_b}"
    raise DataError(
        f"{name_a} ({len(vocabulary_a)} entries) and {name_b} ({len(vocabulary_b)} entries) have different tokenizers: "
        f"{difference}",
        where=f"{a.name_or_path} and {b.name_or_path}",
        remedy="use models that share a tokenizer, for example of one model family",
    )


def _tokens(vocabulary: dict[str, int], id: int) -> str:
    return " and ".join(repr(token) for token, other in sorted(vocabulary.items()) if other == id) or "missing"
