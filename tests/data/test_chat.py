"""Tokenizers, templates, and where a response begins and ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from align.data import chat
from align.data.chat import Message, Renderer, load_tokenizer
from align.errors import ConversationError, DataError

# Shapes of the published templates; the date, the trimming and the trailing newline are what matters.
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{%- endif %}{{- '<|start|>system<|end|>Today: ' + date_string + '<|eot|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start|>' + message['role'] + '<|end|>' + message['content'] | trim + '<|eot|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>' }}{%- endif %}"
)
QWEN = (
    "{%- for message in messages %}{{- '<|start|>' + message.role + '\\n' + message.content + '<|eot|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{%- endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SPECIAL = ["<bos>", "<eos>", "<pad>", "<|start|>", "<|end|>", "<|eot|>"]


def make_tokenizer(template: str | None, eos: str = "<|eot|>", extra: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, special tokens first, and a post-processor that would add <bos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *([extra] if extra else []), *alphabet]
    raw = Tokenizer(models.BPE({word: id for id, word in enumerate(words)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token=eos, pad_token="<pad>", chat_template=template
    )


HELLO = [Message("user", " hello ")]


def show(renderer: Renderer, ids: list[int]) -> str:
    return renderer.tokenizer.decode(ids)


class TestRendering:
    def test_llama(self):
        renderer = Renderer(make_tokenizer(LLAMA3), date="26 Jul 2024")
        prompt = renderer.prompt_ids(HELLO)
        assert show(renderer, prompt) == (
            "<bos><|start|>system<|end|>Today: 26 Jul 2024<|eot|>"
            "<|start|>user<|end|>hello<|eot|><|start|>assistant<|end|>"
        )
        assert prompt.count(0) == 1  # the post-processor's <bos> is not added to the template's
        assert show(renderer, renderer.response_ids(HELLO, "  hi  ")) == "hi<|eot|>"

    def test_qwen_newline_after_the_end_token_is_cut(self):
        renderer = Renderer(make_tokenizer(QWEN))
        assert show(renderer, renderer.prompt_ids(HELLO)) == "<|start|>user\n hello <|eot|>\n<|start|>assistant\n"
        assert show(renderer, renderer.response_ids(HELLO, "hi")) == "hi<|eot|>"
        assert renderer.stop_ids == (5,)

    def test_end_of_turn_that_is_not_the_eos_token_stops_too(self):
        renderer = Renderer(make_tokenizer(QWEN, eos="<eos>"))
        assert show(renderer, renderer.response_ids(HELLO, "hi")) == "hi<|eot|>"
        assert renderer.stop_ids == (1, 5)

    def test_eos_is_added_where_the_template_writes_none(self):
        renderer = Renderer(make_tokenizer(PLAIN, eos="<eos>"))
        assert show(renderer, renderer.response_ids(HELLO, "hi")) == " hi\n<eos>"
        assert renderer.stop_ids == (1,)

    def test_a_response_that_quotes_the_end_token_is_not_cut_there(self):
        renderer = Renderer(make_tokenizer(QWEN))
        assert show(renderer, renderer.response_ids(HELLO, "a<|eot|>b")) == "a<|eot|>b<|eot|>"

    def test_ids_are_those_of_transformers(self):
        tokenizer = make_tokenizer(QWEN)
        expected = tokenizer.apply_chat_template(
            [m._asdict() for m in HELLO], add_generation_prompt=True, return_dict=False
        )
        assert Renderer(tokenizer).prompt_ids(HELLO) == expected

    def test_dialogue_is_prompt_and_responses(self):
        renderer = Renderer(make_tokenizer(QWEN))
        prompt, responses = renderer.dialogue_ids(HELLO, ["a", ""])
        assert prompt == renderer.prompt_ids(HELLO)
        assert responses == [renderer.response_ids(HELLO, "a"), [5]]

    def test_text_leaves_out_special_tokens(self):
        renderer = Renderer(make_tokenizer(QWEN))
        response = "It 's , caf\u00e9 !\n"
        assert renderer.text(renderer.response_ids(HELLO, response)) == response

    def test_no_word_mark_before_the_first_word(self):
        # SentencePiece style: encoding a text on its own puts a mark before it.
        words = ["<s>", "</s>", "[I]", "[/I]", "\u2581", "\u2581hi", "hi", "q"]
        raw = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="q"))
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        raw.add_special_tokens(["<s>", "</s>", "[I]", "[/I]"])
        template = (
            "<s>{% for m in messages %}{% if m.role == 'user' %}[I]{{ m.content }}[/I]"
            "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
        )
        renderer = Renderer(
            PreTrainedTokenizerFast(
                tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="q", chat_template=template
            )
        )
        full = raw.encode("<s>[I]q[/I]hi</s>", add_special_tokens=False).ids
        prompt, responses = renderer.dialogue_ids([Message("user", "q")], ["hi"])
        assert prompt + responses[0] == full

    def test_a_token_across_the_border_is_cut_at_the_border(self):
        raw = Tokenizer(models.BPE({"<eos>": 0, "a": 1, ":": 2, "b": 3, ":b": 4}, [(":", "b")]))
        raw.add_special_tokens(["<eos>"])
        template = "a:{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<eos>{% endif %}{% endfor %}"
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", chat_template=template)
        with pytest.raises(DataError, match="drops the assistant's messages"):
            Renderer(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", chat_template="a:"))
        prompt, responses = Renderer(tokenizer).dialogue_ids([Message("user", "a")], ["b"])
        assert (prompt, responses) == ([1, 2], [[3, 0]])


class TestRefusals:
    def test_no_template(self):
        with pytest.raises(DataError, match="no chat template") as error:
            Renderer(make_tokenizer(None))
        assert error.value.remedy is not None and "data.chat_template=FILE" in error.value.remedy

    def test_template_file_replaces_the_tokenizers(self, tmp_path: Path):
        file = tmp_path / "mine.jinja"
        file.write_text(QWEN)
        renderer = Renderer(make_tokenizer(None), chat_template=str(file))
        assert show(renderer, renderer.response_ids(HELLO, "hi")) == "hi<|eot|>"

    def test_template_file_missing(self, tmp_path: Path):
        with pytest.raises(DataError, match="cannot be read.*none.jinja"):
            Renderer(make_tokenizer(QWEN), chat_template=str(tmp_path / "none.jinja"))

    def test_today_needs_a_date(self):
        with pytest.raises(DataError, match="today's date") as error:
            Renderer(make_tokenizer(LLAMA3))
        assert error.value.remedy is not None and "data.date" in error.value.remedy

    def test_today_that_no_date_can_replace(self):
        template = "{{ strftime_now('%Y') }}" + QWEN
        with pytest.raises(DataError, match="does not read date_string"):
            Renderer(make_tokenizer(template), date="26 Jul 2024")

    def test_today_in_a_branch_that_few_conversations_reach(self):
        template = "{% if messages[0].role == 'system' %}{{ strftime_now('%Y') }}{% endif %}" + QWEN
        renderer = Renderer(make_tokenizer(template))
        assert renderer.prompt_ids(HELLO)
        with pytest.raises(DataError, match="today's date"):
            renderer.prompt_ids([Message("system", "s"), *HELLO])

    def test_hiding_the_clock_changes_no_white_space(self):
        template = "\n  {% if true %}\n  x{% endif %}\n" + QWEN
        tokenizer = make_tokenizer(template)
        expected = tokenizer.apply_chat_template([m._asdict() for m in HELLO], tokenize=False)
        assert Renderer(tokenizer)._render(HELLO, add_generation_prompt=False) == expected

    def test_template_that_fails(self):
        template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + QWEN
        with pytest.raises(ConversationError, match="template fails: no system turn") as refused:
            Renderer(make_tokenizer(template)).prompt_ids([Message("system", "s"), *HELLO])
        assert refused.value.public.endswith("refuses a conversation of these roles: system, user")
        template = template.replace("raise_exception('no system turn')", "1 // 0")
        with pytest.raises(DataError, match="template fails: integer division") as failed:
            Renderer(make_tokenizer(template)).prompt_ids([Message("system", "s"), *HELLO])
        assert isinstance(failed.value, ConversationError) and failed.value.public == ""

    def test_template_with_a_syntax_error(self):
        with pytest.raises(DataError, match="template fails"):
            Renderer(make_tokenizer("{% for %}"))

    def test_two_bos_tokens(self):
        with pytest.raises(DataError, match="two beginning-of-sequence tokens"):
            Renderer(make_tokenizer("{{ bos_token }}{{ bos_token }}" + QWEN)).prompt_ids(HELLO)

    def test_prompt_that_changes_once_answered(self, tmp_path: Path):
        file = tmp_path / "shifty.jinja"
        file.write_text("{{ messages | length }}" + QWEN)
        with pytest.raises(DataError, match="not the beginning of the conversation") as error:
            Renderer(make_tokenizer(None), chat_template=str(file)).response_ids(HELLO, "hi")
        assert error.value.where == str(file)

    def test_no_end_of_sequence_token(self):
        tokenizer = make_tokenizer(QWEN)
        tokenizer.eos_token = None
        with pytest.raises(DataError, match="no end-of-sequence token"):
            Renderer(tokenizer)


class TestLoading:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        make_tokenizer(QWEN).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    @pytest.mark.parametrize("model_type", [None, "llama", "qwen2"])
    def test_custom_pre_tokenizer_survives(self, folder: Path, model_type: str | None):
        if model_type:
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        text = "one 22 three's\n\n x"
        expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
        tokenizer = load_tokenizer(folder)
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert tokenizer.decode(expected) == text
        assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|eot|>", QWEN)

    def test_special_tokens_of_a_class_are_not_added(self, tmp_path: Path):
        raw = Tokenizer(
            models.BPE({letter: id for id, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
        )
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))  # whose class has <|endoftext|>
        assert chat.vocab_size(load_tokenizer(tmp_path)) == 257

    def test_word_level_beside_a_llama_class(self, tmp_path: Path):
        raw = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "cat": 2, "dog": 3}, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
        config = tmp_path / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        assert load_tokenizer(tmp_path).encode("dog cat bird", add_special_tokens=False) == [3, 2, 0]

    def test_gaps_between_ids(self, folder: Path):
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        words = content["model"]["vocab"]
        words["0"], words["1"] = 270, 272  # bytes whose ids were 21 and 22 or so, of 262 ids in all
        file.write_text(json.dumps(content))
        tokenizer = load_tokenizer(folder)
        assert len(tokenizer) == 262
        assert chat.vocab_size(tokenizer) == 273
        assert chat.gaps(tokenizer) == (
            *sorted(set(range(262)) - set(tokenizer.get_vocab().values())),
            *(262, 263, 264, 265, 266, 267, 268, 269, 271),
        )
        assert (chat.vocab_size(make_tokenizer(QWEN)), chat.gaps(make_tokenizer(QWEN))) == (262, ())

    def test_folder_without_a_tokenizer(self, tmp_path: Path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        with pytest.raises(DataError, match="has no tokenizer.*tokenizer.json"):
            load_tokenizer(tmp_path)

    def test_no_folder(self, tmp_path: Path):
        with pytest.raises(DataError, match="the tokenizer cannot be loaded"):
            load_tokenizer(tmp_path / "none")

    def test_damaged_file(self, folder: Path):
        (folder / "tokenizer.json").write_text("{")
        with pytest.raises(DataError, match="the tokenizer cannot be loaded"):
            load_tokenizer(folder)

    def test_fingerprint(self, folder: Path):
        renderer = Renderer(make_tokenizer(QWEN))
        copy = shutil.copytree(folder, folder.parent / "copy")
        assert Renderer(load_tokenizer(copy)).fingerprint == renderer.fingerprint
        others = [
            Renderer(make_tokenizer(QWEN + " ")),
            Renderer(make_tokenizer(QWEN, eos="<eos>")),
            Renderer(make_tokenizer(QWEN), date="today"),
            Renderer(make_tokenizer(QWEN, extra="<new>")),
        ]
        assert len({one.fingerprint for one in [renderer, *others]}) == 5


class TestSameVocabulary:
    def test_same(self):
        a, b = make_tokenizer(QWEN), make_tokenizer(None)
        b.pad_token = "<eos>"  # packed ids hold no padding
        assert chat.same_vocabulary(a, b)
        chat.require_same_tokenizer(a, b)

    def test_an_entry_that_only_pads_is_no_difference(self):
        a, b, c = make_tokenizer(QWEN), make_tokenizer(QWEN), make_tokenizer(QWEN)
        b.add_special_tokens({"pad_token": "<|pad|>"})  # as an exported reward model may have
        c.add_special_tokens({"pad_token": "<|blank|>"})
        assert chat.same_vocabulary(a, b) and chat.same_vocabulary(b, a)
        assert not chat.same_vocabulary(b, c)
        b.pad_token = "<pad>"
        assert not chat.same_vocabulary(a, b)

    def test_other_entries(self):
        a, b = make_tokenizer(QWEN), make_tokenizer(QWEN, extra="<new>")
        assert not chat.same_vocabulary(a, b)
        message = r"policy \(262 entries\) and judge \(263 entries\).*id 6 is '!' in policy and '<new>' in judge"
        with pytest.raises(DataError, match=message):
            chat.require_same_tokenizer(a, b, name_b="judge")

    def test_missing_entry(self):
        a, b = make_tokenizer(QWEN), make_tokenizer(QWEN)
        b.add_tokens(["<more>"])
        with pytest.raises(DataError, match="id 262 is missing in policy and '<more>' in reward"):
            chat.require_same_tokenizer(a, b)

    def test_other_end_token(self):
        a, b = make_tokenizer(QWEN), make_tokenizer(QWEN, eos="<eos>")
        with pytest.raises(DataError, match=r"\[0, 5\] in policy and \[0, 1\] in reward"):
            chat.require_same_tokenizer(a, b)
