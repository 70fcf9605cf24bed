"""What `/docs` and `/openapi.json` say of each route: its body, its answers, and its errors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from vas.serving.protocol import ChatRequest, CompletionRequest, ScoreRequest

ABOUT = (
    "A frozen language model, steered at decoding time by value models. The API is OpenAI's, plus `guidance`: "
    'which objectives a response is to follow, and how strongly, e.g. `{"objectives": {"positive": 4}}`.'
)

_ERROR = {
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["error"],
            "properties": {
                "error": {
                    "type": "object",
                    "required": ["message", "type", "param", "code"],
                    "properties": {
                        "message": {"type": "string"},
                        "type": {"type": "string"},
                        "param": {"type": ["string", "null"]},
                        "code": {"type": ["string", "null"]},
                    },
                }
            },
        }
    }
}
_MEANINGS = {
    400: "The request is malformed, or out of bounds.",
    401: "There is no API key, or an unknown one.",
    403: "The key may not do this.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "A budget of the key is used up; Retry-After says when to come again.",
    503: "Too many requests, or a model that cannot be reached; Retry-After says when to come again.",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": _MEANINGS[status], "content": _ERROR} for status in statuses}


def _body(kind: type[BaseModel], streamed: bool) -> dict[str, Any]:
    """A route that takes a body: it is checked by hand, so that its size and its errors are our own."""
    schema = _inlined(kind.model_json_schema())
    stream = {"text/event-stream": {"schema": {"type": "string"}}} if streamed else {}
    content = {"application/json": {"schema": {"type": "object"}}} | stream
    return {
        "responses": {200: {"description": "The answer.", "content": content}} | _errors(*_MEANINGS),
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    }


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without references to definitions of its own."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolve(definitions[node["$ref"].rpartition("/")[2]])
            return {key: resolve(value) for key, value in node.items()}
        return [resolve(each) for each in node] if isinstance(node, list) else node

    resolved: dict[str, Any] = resolve(schema)
    return resolved


chat = _body(ChatRequest, streamed=True)
completion = _body(CompletionRequest, streamed=True)
score = _body(ScoreRequest, streamed=False)
plain: dict[str, Any] = {"responses": _errors(401, 404)}
text: dict[str, Any] = {"responses": _errors(401)}
open_: dict[str, Any] = {}
