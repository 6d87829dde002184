"""The OpenAPI 3.1 description of the reward service, served at ``/openapi.json``."""

from __future__ import annotations

from typing import Any

from align.config import RewardServiceConfig
from align.rewards import http_protocol

ERRORS = {
    "400": "not JSON, not of this schema, or a conversation that the reward model cannot read",
    "401": "no token, or a wrong one",
    "404": "the model is not served here",
    "408": "the body did not arrive in time",
    "413": "too many bytes or conversations",
    "415": "the body is not application/json",
    "429": "too many conversations are waiting",
    "500": "the reward model failed",
    "503": "no replica answers",
    "504": "not scored within request_timeout_s",
}
TEXT = {"type": "string"}
TEXT_OR_NULL = {"type": ["string", "null"]}
NUMBER_OR_NULL = {"type": ["number", "null"]}


def description(config: RewardServiceConfig, token: bool) -> dict[str, Any]:
    """The document, with the limits of ``config``. ``token``: the service requires a token."""
    model = _object({"id": TEXT, "object": {"const": "model"}, "owned_by": TEXT})
    models = _object({"object": {"const": "list"}, "data": {"type": "array", "items": model}})
    health = _object({"status": {"const": "ok"}, "replicas": {"type": "integer", "minimum": 1}})
    unauthorized = ["401"] if token else []
    rewards = {
        "operationId": "rewards",
        "requestBody": {"required": True, "content": _json(_request(config.max_conversations))},
        "responses": _responses(_json(_answer()), [code for code in ERRORS if token or code != "401"]),
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Reward service", "version": "1"},
        "paths": {
            http_protocol.REWARDS: {"post": rewards},
            http_protocol.MODELS: _get("models", _json(models), unauthorized),
            http_protocol.HEALTH: _get("health", _json(health), ["503"]),
            http_protocol.METRICS: _get("metrics", {"text/plain": {"schema": TEXT}}, unauthorized),
            http_protocol.OPENAPI: _get("openapi", _json({"type": "object"}), unauthorized),
        },
    }
    if token:
        document["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
        document["security"] = [{"token": []}]
        for method in document["paths"][http_protocol.HEALTH].values():
            method["security"] = []
    return document


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _request(max_conversations: int) -> dict[str, Any]:
    messages = {
        "type": "array",
        "items": _object({"role": {"enum": list(http_protocol.ROLES)}, "content": TEXT}),
        "minItems": 2,
        "description": "a conversation whose last message is the response, with the role assistant",
    }
    conversations = {
        "type": "array",
        "items": _object({"messages": messages}),
        "minItems": 1,
        "maxItems": max_conversations,
    }
    return _object({"model": TEXT_OR_NULL, "input": conversations}, optional=("model",))


def _answer() -> dict[str, Any]:
    fields = {
        "object": {"const": "reward"},
        "index": {"type": "integer"},
        "score": NUMBER_OR_NULL,
        "attributes": {"type": "object", "additionalProperties": NUMBER_OR_NULL},
    }
    data = {"type": "array", "items": _object(fields, optional=("attributes",))}
    return _object({"object": {"const": "list"}, "model": TEXT, "data": data})


def _responses(content: dict[str, Any], errors: list[str]) -> dict[str, Any]:
    error = _object({"message": TEXT, "type": TEXT, "param": TEXT_OR_NULL, "code": TEXT})
    refused = {code: {"description": ERRORS[code], "content": _json(_object({"error": error}))} for code in errors}
    return {"200": {"description": "the answer", "content": content}, **refused}


def _get(name: str, content: dict[str, Any], errors: list[str]) -> dict[str, Any]:
    """``GET``, and ``HEAD`` with the same headers and no body."""
    answers = _responses(content, errors)
    heads = {code: {"description": answer["description"]} for code, answer in answers.items()}
    return {
        "get": {"operationId": name, "responses": answers},
        "head": {"operationId": f"{name}_head", "responses": heads},
    }
