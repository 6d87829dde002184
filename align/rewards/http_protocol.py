"""JSON protocol of the reward service, after OpenAI's API; see docs/reward_service.md.

Both sides parse strictly: whatever deviates from the protocol is refused, because a score that belongs to another
response is worse than none.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from align.data.chat import Dialogue, Message

REWARDS, MODELS, HEALTH, METRICS = "/v1/rewards", "/v1/models", "/health", "/metrics"
OPENAPI = "/openapi.json"
LARGEST = 3.4028234663852886e38
"""The largest float32: scores are held in float32."""
ROLES = ("system", "user", "assistant")


class HTTPError(Exception):
    """An error status of the service. ``param`` names the place in the request, as ``input[3].messages``."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after_s: int | None = None):
        super().__init__(status, message, param, retry_after_s)  # all of them, so that it can be pickled
        self.status, self.message, self.param, self.retry_after_s = status, message, param, retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind, code = _ERRORS.get(self.status, ("server_error", "internal_error"))
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": code}}


_ERRORS = {
    400: ("invalid_request_error", "bad_request"),
    401: ("authentication_error", "invalid_token"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "body_too_slow"),
    413: ("invalid_request_error", "too_large"),
    415: ("invalid_request_error", "not_json"),
    429: ("rate_limit_error", "queue_full"),
    503: ("server_error", "not_ready"),
    504: ("server_error", "timeout"),
}


class ScoreRequest(NamedTuple):
    """A parsed request."""

    model: str | None
    dialogues: list[Dialogue]


def request_body(dialogues: Sequence[Dialogue]) -> bytes:
    """Body of a request for scores."""
    return json.dumps({"input": [{"messages": _messages(dialogue)} for dialogue in dialogues]}).encode()


def canonical(dialogue: Dialogue) -> bytes:
    """Bytes that are equal if and only if the conversations are."""
    return json.dumps([list(message.values()) for message in _messages(dialogue)], separators=(",", ":")).encode()


def _messages(dialogue: Dialogue) -> list[dict[str, str]]:
    return [message._asdict() for message in (*dialogue.context, Message("assistant", dialogue.response))]


def read_request(body: bytes, max_conversations: int) -> ScoreRequest:
    """Raises `HTTPError`: 400 with what is wrong and where, 413 for more than ``max_conversations``."""
    fields = _mapping(_parse(body), "", {"model", "input"})
    model, conversations = fields.get("model"), fields.get("input")
    if model is not None and not isinstance(model, str):
        raise HTTPError(400, f"model must be text, not {_shown(model)}", "model")
    if not isinstance(conversations, list) or not conversations:
        raise HTTPError(400, f"input must be a list of conversations, not {_shown(conversations)}", "input")
    if len(conversations) > max_conversations:
        message = f"{len(conversations)} conversations in one request; the limit is {max_conversations}"
        raise HTTPError(413, message, "input")
    return ScoreRequest(model, [_dialogue(item, f"input[{i}]") for i, item in enumerate(conversations)])


def _dialogue(value: Any, where: str) -> Dialogue:
    messages = _mapping(value, where, {"messages"}).get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise HTTPError(400, f"messages must be a list of two or more, not {_shown(messages)}", f"{where}.messages")
    *context, response = [_message(item, f"{where}.messages[{i}]") for i, item in enumerate(messages)]
    if response.role != "assistant":
        message = f"the last message is the response, so its role must be assistant, not {response.role}"
        raise HTTPError(400, message, f"{where}.messages[{len(context)}].role")
    return Dialogue(tuple(context), response.content)


def _message(value: Any, where: str) -> Message:
    fields = _mapping(value, where, {"role", "content"})
    role, content = fields.get("role"), fields.get("content")
    if role not in ROLES:
        raise HTTPError(400, f"role must be one of {', '.join(ROLES)}, not {_shown(role)}", f"{where}.role")
    if not isinstance(content, str):
        raise HTTPError(400, f"content must be text, not {_shown(content)}", f"{where}.content")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise HTTPError(400, "content contains an unpaired surrogate, which is not a character", f"{where}.content")
    return Message(role, content)


def _mapping(value: Any, where: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise HTTPError(400, f"{where or 'the body'} must be an object, not {_shown(value)}", where or None)
    if unknown := sorted(value.keys() - keys):
        message = f"unknown key {_shown(unknown[0])}; keys: {', '.join(sorted(keys))}"
        raise HTTPError(400, message, where or None)
    return value


def _shown(value: Any) -> str:
    """A value shortened for a message: it may be a whole conversation, or nested too deeply for `json.dumps`."""
    if isinstance(value, (list, dict)) and value:
        return f"a list of {len(value)}" if isinstance(value, list) else f"an object with {len(value)} keys"
    text = "nothing" if value is None else json.dumps(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise HTTPError(400, f"the body is not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        duplicate = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"duplicate key {_shown(duplicate)} in an object")
    return fields


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def answer_body(
    model: str, scores: Sequence[float], attributes: Sequence[Mapping[str, float]] | None
) -> dict[str, Any]:
    """The JSON of scores; null for a score that is not finite."""
    data: list[dict[str, Any]] = [
        {"object": "reward", "index": index, "score": _number(score)} for index, score in enumerate(scores)
    ]
    for item, values in zip(data, attributes or (), strict=bool(attributes)):
        item["attributes"] = {name: _number(value) for name, value in values.items()}
    return {"object": "list", "model": model, "data": data}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_answer(body: bytes, count: int) -> list[float]:
    """Scores of ``count`` conversations in order, NaN for null.

    Raises ValueError unless each index from 0 to ``count`` - 1 occurs once, with null or a finite number.
    """
    try:
        data = json.loads(body, parse_constant=_refuse_constant)["data"]
        scores = {_index(item["index"]): _score(item["score"]) for item in data}
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the form of an answer: {error!r}") from error
    if len(data) != count or scores.keys() != set(range(count)):
        raise ValueError(f"{count} conversations were sent, but it has {len(data)} scores with indices {[*scores]}")
    return [scores[index] for index in range(count)]


def _index(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"an index must be an integer, not {_shown(value)}")
    return value


def _score(value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float) or abs(value) > LARGEST:
        raise ValueError(f"a score must be a float32 number or null, not {_shown(value)}")
    return float(value)


def error_text(body: bytes) -> str:
    """The error text of an answer, on one line, at most 500 characters."""
    try:
        text = json.loads(body)["error"]["message"]
    except (ValueError, RecursionError, KeyError, TypeError):
        text = body[:1000].decode(errors="replace")
    return " ".join(str(text).split())[:500]
