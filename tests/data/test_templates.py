"""Templates that would take all time or memory, and published ones, which must not notice that they are watched."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from align.data import templates
from align.data.templates import TemplateLimitError

PUBLISHED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
TALK = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "What is\n 2 + 2?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": " 6 "},
]
MARKS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def outcome(render) -> str:
    try:
        return render()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("file", PUBLISHED[1::6], ids=lambda file: file.stem)
def test_published_templates_write_what_transformers_writes(file: Path):
    source = file.read_text()
    for talk in (TALK, TALK[:2], TALK[1:], [{"role": "user", "content": "x" * 20_000}], TALK[1:3] * 20):
        for prompt in (True, False):
            keys = {**MARKS, "add_generation_prompt": prompt}
            plain = outcome(lambda t=talk, k=keys: render_jinja_template([t], chat_template=source, **k)[0][0])
            assert outcome(lambda t=talk, k=keys: templates.render(source, t, **k)) == plain


def grown(step: str, end: str = "", start: str = "'a'") -> str:
    return f"{{% set n = namespace(x={start}) %}}{{% for i in range(60) %}}{step}{{% endfor %}}{end}"


def loops(body: str) -> str:
    return f"{{% for i in range(99999) %}}{{% for j in range(99999) %}}{body}{{% endfor %}}{{% endfor %}}"


HOSTILE = [
    "{{ 'a' * 10**10 }}",
    "{{ [0] * 10**10 }}",
    "{{ 2 ** 1000000000 }}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.encode().zfill(10**10) }}",
    "{{ '\t'.expandtabs(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '%10000000000d'|format(1) }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=10**10) }}",
    "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "{{ ('a' * 9999)|replace('a', 'b' * 9999) }}",
    "{{ ('a' * 9999).translate({97: 'b' * 9999}) }}",
    "{{ ('a' * 9999).join(['b'] * 9999) }}",
    "{{ (['b'] * 9999)|join('a' * 9999) }}",
    "{{ ('a\n' * 9999)|indent(9999) }}",
    "{{ ('a ' * 9999)|wordwrap(1, wrapstring='b' * 9999) }}",
    "{{ [[1]]|tojson(indent=10**10) }}",
    "{{ [1]|batch(10**10, 1)|list }}",
    "{{ (1).to_bytes(10**10, 'big') }}",
    "{{ range(99999)|map('center', 9999)|list }}",
    grown("{% set n.x = n.x ~ n.x %}"),
    grown("{% set n.x = n.x + n.x %}"),
    grown("{% set n.x = n.x + n.x %}", start="['a']"),
    grown("{% set n.x = [n.x, n.x] %}", "{{ n.x }}"),
    grown("{% set n.x = {'a': n.x, 'b': n.x} %}", "{{ n.x|tojson }}"),
    grown("{% set n.x = dict(a=n.x, b=n.x) %}", "{{ n.x == n.x }}"),
    grown("{% set n.x = namespace(a=n.x, b=n.x) %}", "{{ n.x }}"),
    grown("{% set n.x = namespace(a=n.x, b=n.x) %}", "{{ '{}'.format(n.x) }}"),
    grown("{% set n.x = namespace(a=n.x, b=n.x) %}", "{{ [n.x]|string }}"),
    grown("{% set n.x = '%s%s' % (n.x, n.x) %}"),
    grown("{% set n.x = '{0}{0}'.format(n.x) %}"),
    grown("{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"),
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    loops(""),
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    f"{{% set y %}}{loops('word')}{{% endset %}}",
    loops("{% if 'b' in 'a' * 9999 %}{% endif %}"),
    "{% for i in range(99999) %}{{ range(99999)|max }}{% endfor %}",
    "{{ 'word' * 30000 }}",
    "a" * 300_000,
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_a_template_that_takes_too_much_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(templates, "STEPS", 50_000)  # 2,000,000 take the same way for longer
    begun = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(TemplateLimitError):
            templates.render(source, [{"role": "user", "content": "hi"}])
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert time.process_time() - begun < 5


def test_the_bounds_grow_with_the_conversation():
    talk = [{"role": "user", "content": "a" * 10_000}]
    assert len(templates.render("{{ messages[0].content * 30 }}", talk)) == 300_000
    with pytest.raises(TemplateLimitError, match="longer than 420128 characters"):  # 100,000 + 32 * 10,004
        templates.render("{{ messages[0].content * 43 }}", talk)
