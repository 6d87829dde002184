"""The description of a reward service in OpenAPI 3.1, served at ``/openapi.json``."""

from __future__ import annotations

from typing import Any

from align.config import RewardServiceConfig
from align.rewards import http_protocol

REFUSALS = {
    "400": "not JSON, not of this form, or a conversation that the reward model cannot read",
    "401": "no token, or another one",
    "404": "the model is not served here",
    "408": "the body does not come in time",
    "413": "too many bytes or conversations",
    "415": "the body is not application/json",
    "429": "too many conversations wait",
    "500": "the reward model fails",
    "503": "no replica answers",
    "504": "no scores within request_timeout_s",
}


def description(section: RewardServiceConfig, token: bool) -> dict[str, Any]:
    """The document, with the limits of ``section``; ``token``: whether the service asks for one."""
    model = _object({"id": _TEXT, "object": {"const": "model"}, "owned_by": _TEXT})
    listed = _object({"object": {"const": "list"}, "data": {"type": "array", "items": model}})
    health = _object({"status": {"const": "ok"}, "replicas": {"type": "integer", "minimum": 1}})
    rewards = {
        "operationId": "rewards",
        "requestBody": {"required": True, "content": _json(_request(section.max_conversations))},
        "responses": _responses(_json(_answer()), [code for code in REFUSALS if token or code != "401"]),
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Reward service", "version": "1"},
        "paths": {
            http_protocol.REWARDS: {"post": rewards},
            http_protocol.MODELS: _reads("models", _json(listed), ["401"] if token else []),
            http_protocol.HEALTH: _reads("health", _json(health), ["503"]),
            http_protocol.METRICS: _reads("metrics", {"text/plain": {"schema": _TEXT}}, ["401"] if token else []),
            http_protocol.OPENAPI: _reads("openapi", _json({"type": "object"}), ["401"] if token else []),
        },
    }
    if token:
        document["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
        document["security"] = [{"token": []}]
        for method in document["paths"][http_protocol.HEALTH].values():
            method["security"] = []
    return document


_TEXT = {"type": "string"}
_NUMBER = {"type": ["number", "null"]}


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _request(max_conversations: int) -> dict[str, Any]:
    message = _object({"role": {"enum": list(http_protocol.ROLES)}, "content": _TEXT})
    messages = {
        "type": "array",
        "items": message,
        "minItems": 2,
        "description": "a conversation whose last message is the response, with the role assistant",
    }
    conversations = {
        "type": "array",
        "items": _object({"messages": messages}),
        "minItems": 1,
        "maxItems": max_conversations,
    }
    return _object({"model": {"type": ["string", "null"]}, "input": conversations}, optional=("model",))


def _answer() -> dict[str, Any]:
    attributes = {"type": "object", "additionalProperties": _NUMBER}
    fields = {"object": {"const": "reward"}, "index": {"type": "integer"}, "score": _NUMBER, "attributes": attributes}
    data = {"type": "array", "items": _object(fields, optional=("attributes",))}
    return _object({"object": {"const": "list"}, "model": _TEXT, "data": data})


def _responses(content: dict[str, Any], refusals: list[str]) -> dict[str, Any]:
    error = _object({"message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}, "code": _TEXT})
    refused = {code: {"description": REFUSALS[code], "content": _json(_object({"error": error}))} for code in refusals}
    return {"200": {"description": "the answer", "content": content}, **refused}


def _reads(name: str, content: dict[str, Any], refusals: list[str]) -> dict[str, Any]:
    """``GET``, and ``HEAD`` with its headers alone."""
    answers = _responses(content, refusals)
    without = {code: {"description": one["description"]} for code, one in answers.items()}
    return {
        "get": {"operationId": name, "responses": answers},
        "head": {"operationId": f"{name}_head", "responses": without},
    }
