"""What a reward service and its clients say to each other: JSON in the manner of OpenAI's API. See
docs/reward_service.md.

Both sides read strictly. What is not exactly as described is refused and never guessed, for a score that belongs to
another response is worse than none.
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
"""The largest number of float32, in which scores are held."""
ROLES = ("system", "user", "assistant")


class Refused(Exception):
    """A request that is answered with an error. ``param`` names the place in it, as ``input[3].messages``."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after_s: int | None = None):
        super().__init__(status, message, param, retry_after_s)  # all of them, so that it passes between processes
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


class Asked(NamedTuple):
    """A request that was read."""

    model: str | None
    dialogues: list[Dialogue]


def request(dialogues: Sequence[Dialogue]) -> bytes:
    """Body of a request for scores."""
    return json.dumps({"input": [{"messages": _messages(one)} for one in dialogues]}).encode()


def canonical(dialogue: Dialogue) -> bytes:
    """Bytes that are equal for equal conversations and for no others."""
    return json.dumps([list(message.values()) for message in _messages(dialogue)], separators=(",", ":")).encode()


def _messages(dialogue: Dialogue) -> list[dict[str, str]]:
    return [message._asdict() for message in (*dialogue.context, Message("assistant", dialogue.response))]


def read_request(body: bytes, max_conversations: int) -> Asked:
    """Raises `Refused`: 400 with what is wrong and where, 413 for more than ``max_conversations``."""
    found = _mapping(_parsed(body), "", {"model", "input"})
    model, conversations = found.get("model"), found.get("input")
    if model is not None and not isinstance(model, str):
        raise Refused(400, f"model is text, not {_shown(model)}", "model")
    if not isinstance(conversations, list) or not conversations:
        raise Refused(400, f"input is a list of conversations, not {_shown(conversations)}", "input")
    if len(conversations) > max_conversations:
        message = f"{len(conversations)} conversations in one request, at most {max_conversations} are taken"
        raise Refused(413, message, "input")
    return Asked(model, [_dialogue(one, f"input[{index}]") for index, one in enumerate(conversations)])


def _dialogue(found: Any, where: str) -> Dialogue:
    messages = _mapping(found, where, {"messages"}).get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise Refused(400, f"messages is a list of two and more, not {_shown(messages)}", f"{where}.messages")
    read = [_message(one, f"{where}.messages[{index}]") for index, one in enumerate(messages)]
    if read[-1].role != "assistant":
        message = f"the last message is the response, so its role is assistant, not {read[-1].role}"
        raise Refused(400, message, f"{where}.messages[{len(read) - 1}].role")
    return Dialogue(tuple(read[:-1]), read[-1].content)


def _message(found: Any, where: str) -> Message:
    fields = _mapping(found, where, {"role", "content"})
    role, content = fields.get("role"), fields.get("content")
    if role not in ROLES:
        raise Refused(400, f"role is one of {', '.join(ROLES)}, not {_shown(role)}", f"{where}.role")
    if not isinstance(content, str):
        raise Refused(400, f"content is text, not {_shown(content)}", f"{where}.content")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise Refused(400, "content holds half of a surrogate pair, which is no character", f"{where}.content")
    return Message(role, content)


def _mapping(found: Any, where: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise Refused(400, f"{where or 'the body'} is an object, not {_shown(found)}", where or None)
    if unknown := sorted(found.keys() - known):
        message = f"unknown key {_shown(unknown[0])}; known: {', '.join(sorted(known))}"
        raise Refused(400, message, where or None)
    return found


def _shown(value: Any) -> str:
    """A value in a message, short: it may be all of a conversation, or nested as deep as `json.dumps` cannot follow."""
    if isinstance(value, (list, dict)) and value:
        return f"a list of {len(value)}" if isinstance(value, list) else f"an object with {len(value)} keys"
    text = "nothing" if value is None else json.dumps(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=_no_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {_shown(twice)} is given twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def answer(model: str, scores: Sequence[float], attributes: Sequence[Mapping[str, float]] | None) -> dict[str, Any]:
    """The JSON of scores; null where one is not finite."""
    data: list[dict[str, Any]] = [
        {"object": "reward", "index": index, "score": _number(score)} for index, score in enumerate(scores)
    ]
    for item, values in zip(data, attributes or (), strict=bool(attributes)):
        item["attributes"] = {name: _number(value) for name, value in values.items()}
    return {"object": "list", "model": model, "data": data}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_answer(body: bytes, count: int) -> list[float]:
    """Scores of ``count`` conversations in their order, NaN where there is none.

    Raises ValueError unless each index from 0 to ``count`` - 1 comes exactly once, with null or a finite number.
    """
    try:
        data = json.loads(body, parse_constant=_no_constant)["data"]
        scores = {_index(item["index"]): _score(item["score"]) for item in data}
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"it has not the form of an answer: {error!r}") from error
    if len(data) != count or scores.keys() != set(range(count)):
        raise ValueError(f"{count} conversations were asked, and it holds {len(data)} scores with indices {[*scores]}")
    return [scores[index] for index in range(count)]


def _index(found: Any) -> int:
    if type(found) is not int:
        raise ValueError(f"an index is a whole number, not {_shown(found)}")
    return found


def _score(found: Any) -> float:
    if found is None:
        return math.nan
    if type(found) not in (int, float) or abs(found) > LARGEST:
        raise ValueError(f"a score is a number of float32 or null, not {_shown(found)}")
    return float(found)


def message_of(body: bytes) -> str:
    """What an answer with an error says, on one line and cut to a length that a message can hold."""
    try:
        text = json.loads(body)["error"]["message"]
    except (ValueError, RecursionError, KeyError, TypeError):
        text = body[:1000].decode(errors="replace")
    return " ".join(str(text).split())[:500]
