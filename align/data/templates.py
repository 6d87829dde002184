"""Chat templates whose time and memory are bounded.

Jinja's sandbox protects the machine but bounds neither memory nor time: ``{{ 'a' * 10**10 }}`` and nested loops run.
Here each step of a template is charged to a budget that grows with the conversation, and the size of each value is
bounded; that bound grows with the conversation too. The environment and the rendered text are those of transformers.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, Undefined, nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

MAX_SOURCE = 262_144
"""Characters of a template."""
STEPS, STEPS_PER_CHARACTER = 2_000_000, 16
"""Steps allowed for one rendering, plus steps per character of the conversation; a step takes about a microsecond."""
ROOM, ROOM_PER_CHARACTER = 100_000, 32
"""Characters (or numbers, or items) that one value may hold, including the rendered text, plus the allowance per
character of the conversation."""
SECONDS = 60.0
"""Time limit of one rendering, on any machine."""
COPIED = 64
"""Characters copied in one step."""
MAX_BITS = 4096
"""Most bits of an integer."""
CONTAINERS = {
    *("abs", "attr", "batch", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last"),
    *("length", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "round", "select"),
    *("selectattr", "slice", "sort", "sum", "unique"),
}
"""Filters that do not write their arguments as text."""
_METER: ContextVar[_Meter] = ContextVar("meter")


class TemplateLimitError(Exception):
    """The template takes too many steps or creates a value that is too large."""


class _Meter:
    """Remaining budget of one rendering."""

    def __init__(self, size: int):
        self.left = STEPS + STEPS_PER_CHARACTER * size
        self.room = ROOM + ROOM_PER_CHARACTER * size
        self._deadline, self._until_look = time.monotonic() + SECONDS, 1000
        self._weights: dict[
            int, tuple[Any, int]
        ] = {}  # keeps the values alive, so that no other object reuses their id

    def spend(self, steps: int) -> None:
        self.left -= steps
        self._until_look -= 1
        if self._until_look <= 0:
            self._until_look = 1000
            if time.monotonic() > self._deadline:
                raise TemplateLimitError(f"it takes more than {SECONDS:g} s")
        if self.left < 0:
            raise TemplateLimitError("it takes too many steps")

    def require(self, weight: int) -> None:
        if weight > self.room:
            raise TemplateLimitError(f"it makes a value longer than {self.room} characters")

    def weigh(self, value: Any) -> int:
        """Total characters, numbers and items of a value, including nested values. Values are immutable, so weights are
        cached."""
        if isinstance(value, (str, bytes)):
            return len(value)
        if isinstance(value, int):
            return 1 + value.bit_length() // 3
        if isinstance(value, Namespace):
            raise TemplateLimitError("it writes a namespace")
        if not isinstance(value, Sized) or not isinstance(value, Iterable) or isinstance(value, (range, Undefined)):
            return 1
        if id(value) not in self._weights:
            parts = [part for pair in value.items() for part in pair] if isinstance(value, Mapping) else value
            weight = 1
            for part in parts:
                weight += self.weigh(part)
                self.require(weight)
            self._weights[id(value)] = value, weight
        return self._weights[id(value)][1]

    def pay(self, value: Any) -> Any:
        """Check the weight of a new value and charge its length. Returns the value."""
        if isinstance(value, (str, bytes)):
            self.require(len(value))
            self.spend(1 + len(value) // COPIED)
        elif isinstance(value, (list, tuple, dict, set)):
            self.require(self.weigh(value))
            self.spend(1 + len(value) // 8)
        else:
            self.spend(1)
        return value

    def write(self, value: Any) -> int:
        """Check and charge the whole weight of a value that is written as text. Returns the weight."""
        weight = self.weigh(value)
        self.require(weight)
        self.spend(1 + weight // (COPIED if isinstance(value, str) else 8))
        return weight

    def items(self, values: Any) -> Any:
        """Convert an iterator to a list and charge each item; return other values unchanged."""
        if not isinstance(values, Iterator):
            return values
        items, weight = [], 0
        for value in values:
            weight += self.weigh(value)
            self.require(weight)
            self.spend(1)
            items.append(value)
        return items


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment with a meter."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_SOURCE:
            raise TemplateLimitError(f"it is longer than {MAX_SOURCE} characters")
        tree = _Metering().visit(super()._parse(source, name, filename))
        return tree.set_environment(self).set_lineno(1)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = _METER.get()
        if operator == "*":
            _check_product(meter, left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > MAX_BITS:
                raise TemplateLimitError("it makes a number too large")
        elif operator == "%" and isinstance(left, (str, bytes)):
            _check_percent(meter, left, right)
        return meter.pay(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (str, bytes, int)):
            args = tuple(meter.items(argument) for argument in args)
            _check_method(meter, owner, name, [*args, *kwargs.values()])
        return meter.pay(super().call(__context, __obj, *args, **kwargs))


def _check_product(meter: _Meter, left: Any, right: Any) -> None:
    for many, count in ((left, right), (right, left)):
        if isinstance(many, (str, bytes, list, tuple)) and isinstance(count, int):
            meter.require(meter.weigh(many) * max(0, count))
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_BITS:
        raise TemplateLimitError("it makes a number too large")


def _check_percent(meter: _Meter, text: str | bytes, values: Any) -> None:
    shown = text.decode("latin-1") if isinstance(text, bytes) else text
    if re.search(r"%[^a-zA-Z%]*(?:\d{5}|\*)", re.sub(r"%\([^)]*\)", "%", shown)):
        raise TemplateLimitError("it pads text to a width of more than 9999, or to one that it computes")
    fields = shown.count("%") if isinstance(values, dict) else 1
    meter.require(len(shown) + fields * meter.write(values))


def _check_method(meter: _Meter, owner: Any, name: str, values: list[Any]) -> None:
    """Refuse a call of a method of text, bytes or a number whose result would be too large."""
    for value in values:
        if isinstance(value, int):
            meter.require(abs(value))
    weights = [meter.weigh(value) for value in values]
    if isinstance(owner, int):
        return
    if name == "replace" and len(values) > 1:
        meter.require(_replaced(owner, values[0], weights[1]))
    elif name == "join" and values and isinstance(values[0], Sized):
        meter.require(weights[0] + len(owner) * len(values[0]))
    elif name == "expandtabs":
        meter.require(len(owner) * (1 + max([8, *(value for value in values if isinstance(value, int))])))
    elif name == "translate":
        meter.require((1 + len(owner)) * (1 + max(weights, default=0)))
    elif name in ("format", "format_map"):
        if re.search(r"\d{5}|:[^{}]*\{", owner):
            raise TemplateLimitError("it pads text to a width of more than 9999, or to one that it computes")
        meter.require(len(owner) + owner.count("{") * max(weights, default=0))
    meter.spend(1 + len(owner) // COPIED)


def _replaced(text: Any, old: Any, length: int) -> int:
    """Characters of ``text`` once ``old`` is replaced by so many."""
    return len(text) + text.count(old) * length if isinstance(old, type(text)) else 0


def _filtered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter of transformers' environment so that it charges its work to the meter."""
    wants = getattr(function, "jinja_pass_arg", None)

    @wraps(function)
    def filtered(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        if name in CONTAINERS:
            meter.spend(1 + (len(value) // 8 if isinstance(value, Sized) and not isinstance(value, Undefined) else 0))
            for argument in [*args, *kwargs.values()]:
                meter.require(abs(argument) if isinstance(argument, int) and name in ("batch", "slice") else 0)
                if name == "sum" and isinstance(argument, (list, tuple)):
                    raise TemplateLimitError("it adds up lists")
        else:
            value = meter.items(value)
            _check_filter(meter, name, value, [*args, *kwargs.values()])
        given = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        first = () if wants is None else (given[wants.name],)
        return meter.pay(function(*first, value, *args, **kwargs))

    return pass_context(filtered)


def _check_filter(meter: _Meter, name: str, value: Any, others: list[Any]) -> None:
    """Raise for a filter call whose text would be too long."""
    weight = meter.write(value)
    most = max(
        [
            0,
            *(argument if isinstance(argument, int) else meter.weigh(argument) for argument in others),
        ]
    )
    if name == "replace" and len(others) > 1:
        weight = _replaced(str(value), others[0], meter.weigh(others[1]))
    elif name == "join":
        weight += len(value) * meter.weigh(others[0]) if others and isinstance(value, Sized) else 0
    elif name == "center":
        weight += most
    elif name == "indent":
        weight += (1 + str(value).count("\n")) * most
    elif name in ("wordwrap", "urlize", "xmlattr"):
        weight *= 1 + max([0, *(meter.weigh(argument) for argument in others if isinstance(argument, str))])
    elif name in ("tojson", "pprint") and not isinstance(value, str):
        weight *= 1 + _depth(value) * most
    elif name == "format":
        _check_percent(meter, str(value), tuple(others))
    meter.require(weight)


def _depth(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return max((1 + _depth(part) for part in parts), default=0)


class _Metering(NodeTransformer):
    """Insert a charge into each loop and macro, before each output and around each container."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Charge each iteration, and each item that the loop's condition skips."""
        self._body(node)
        if node.test is not None:
            node.test = nodes.And(_filter("_spend", nodes.Const(1)), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        """Charge each call."""
        return self._body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        """Charge each call of its caller."""
        return self._body(node)

    def _body(self, node: Any) -> nodes.Node:
        length = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter("_spend", nodes.Const(1 + length // COPIED))))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """``a ~ b``."""
        self.generic_visit(node)
        return _filter("_concat", nodes.List(node.nodes))

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        """``{{ ... }}``"""
        self.generic_visit(node)
        plain = (nodes.TemplateData, nodes.Const)
        node.nodes = [part if isinstance(part, plain) else _filter("_write", part) for part in node.nodes]
        return node

    def visit_List(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Node:
        """Charge a container that is not constant."""
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or all(_constant(part) for part in node.iter_child_nodes()):
            return node
        return _filter("_pay", node)

    visit_Dict = visit_Tuple = visit_List


def _constant(node: nodes.Node) -> bool:
    parts = list(node.iter_child_nodes())
    return all(map(_constant, parts)) if parts else isinstance(node, (nodes.Const, nodes.List, nodes.Tuple, nodes.Dict))


def _filter(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


@pass_context
def _spend(_: Any, steps: int) -> bool:
    _METER.get().spend(steps)
    return True


@pass_context
def _write(_: Any, value: Any) -> Any:
    _METER.get().write(value)
    return value


@pass_context
def _pay(_: Any, value: Any) -> Any:
    return _METER.get().pay(value)


@pass_context
def _concat(_: Any, values: list[Any]) -> str:
    meter = _METER.get()
    meter.require(sum(meter.write(value) for value in values))
    return "".join(map(str, values))


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    # transformers has no public name for its environment, and `Template.render` cannot be bounded.
    theirs = chat_template_utils._compile_jinja_template("").environment
    extensions = [type(extension) for extension in theirs.extensions.values()]
    ours = _Environment(trim_blocks=theirs.trim_blocks, lstrip_blocks=theirs.lstrip_blocks, extensions=extensions)
    ours.globals = {name: value for name, value in theirs.globals.items() if name != "lipsum"}
    ours.filters = {name: _filtered(name, function) for name, function in theirs.filters.items()}
    ours.filters |= {"_spend": _spend, "_write": _write, "_pay": _pay, "_concat": _concat}
    ours.tests = theirs.tests
    return ours


@lru_cache(maxsize=64)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


def render(source: str, messages: list[dict[str, str]], **variables: Any) -> str:
    """Render ``messages`` with the template ``source``, with the same result as ``tokenizer.apply_chat_template``.

    Raises `TemplateLimitError`, and any exception that the template's expressions raise.
    """
    template = _compiled(source)
    meter = _Meter(sum(len(text) for message in messages for text in message.values()))
    token = _METER.set(meter)
    try:
        parts, length = [], 0
        for part in template.generate(messages=messages, tools=None, documents=None, **variables):
            parts.append(part)
            length += len(part)
            meter.require(length)
        return "".join(parts)
    finally:
        _METER.reset(token)
