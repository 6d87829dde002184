"""What is wrong with a request for scores, and where."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from align.rewards import http_protocol
from align.rewards.http_protocol import HTTPError


def conversation(response: str = "abc", **message: Any) -> dict[str, Any]:
    last = {"role": "assistant", "content": response, **message}
    return {"messages": [{"role": "user", "content": "q"}, last]}


BAD = {
    b"{": ("the body is not JSON", None),
    b"\xff": ("the body is not JSON", None),
    b"[" * 100_000: ("the body is not JSON", None),
    b'{"input": NaN}': ("NaN is not a JSON number", None),
    b"[]": ("the body must be an object, not []", None),
    b"{}": ("input must be a list of conversations, not nothing", "input"),
    b'{"input": []}': ("input must be a list of conversations, not []", "input"),
    b'{"inputs": []}': ('unknown key "inputs"', None),
    b'{"model": 3, "input": [1]}': ("model must be text, not 3", "model"),
    b'{"input": [], "input": []}': ('duplicate key "input" in an object', None),
    b'{"input": {"a": 1}}': ("input must be a list of conversations, not an object with 1 keys", "input"),
    b'{"input": ["x"]}': ('input[0] must be an object, not "x"', "input[0]"),
    b'{"input": [{"messages": []}]}': ("two or more, not []", "input[0].messages"),
    b'{"input": [{"messages": [{"role": "assistant", "content": "a"}]}]}': ("two or more", "input[0].messages"),
}


LAST = "input[0].messages[1]"


BAD_MESSAGE = [
    ({"role": "user"}, "the last message is the response, so its role must be assistant, not user", f"{LAST}.role"),
    ({"role": "tool"}, "role must be one of system, user, assistant", f"{LAST}.role"),
    ({"role": ["user"]}, "role must be one of system, user, assistant", f"{LAST}.role"),
    ({"content": None}, "content must be text, not nothing", f"{LAST}.content"),
    ({"content": [{"type": "text"}]}, "content must be text", f"{LAST}.content"),
    ({"content": "\ud800"}, "unpaired surrogate", f"{LAST}.content"),
    ({"name": "x"}, 'unknown key "name"; keys: content, role', LAST),
]


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [*((body, *found) for body, found in BAD.items())]
    + [(json.dumps({"input": [conversation(**last)]}).encode(), text, param) for last, text, param in BAD_MESSAGE],
    ids=range(len(BAD) + len(BAD_MESSAGE)),
)
def test_what_is_wrong_with_a_request_and_where(body: bytes, message: str, param: str | None):
    with pytest.raises(HTTPError) as refused:
        http_protocol.read_request(body, 8)
    assert refused.value.status == 400
    assert message in refused.value.message and refused.value.param == param
    assert len(refused.value.message) < 200


def test_a_refusal_passes_between_processes():
    refused = pickle.loads(pickle.dumps(HTTPError(503, "m", "p", 5)))
    assert (refused.status, refused.message, refused.param, refused.retry_after_s) == (503, "m", "p", 5)
