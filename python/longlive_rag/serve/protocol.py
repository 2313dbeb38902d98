"""The messages of the WebSocket: what a client may say, checked word by word, and the same as a JSON schema."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from longlive_rag.serve.scene import CAMERAS

LONGEST_MESSAGE = 8192  # bytes
LONGEST_PROMPT = 1000  # characters


@dataclass(frozen=True)
class Field:
    """A value in a command."""

    kind: str
    """As JSON Schema calls it."""
    required: bool = False
    choices: tuple[str, ...] = ()
    least: float = 0
    most: float = 2**53
    """Of a number; of a text and of a list, its length."""


COMMANDS: dict[str, dict[str, Field]] = {
    "prompt": {
        "text": Field("string", most=LONGEST_PROMPT, least=1),
        "camera": Field("string", choices=CAMERAS, most=16),
    },
    "pause": {},
    "resume": {},
    "new": {"seed": Field("integer", most=2**31 - 1), "policies": Field("array", least=1, most=3)},
    "save": {},
    "watching": {"video": Field("integer", required=True, least=1), "seconds": Field("number", required=True)},
}
_PYTHON: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "array": (list,),
}


class BadMessage(ValueError):
    """The message is no command; says in plain words why."""

    def __init__(self, reason: str, number: int | None = None) -> None:
        super().__init__(reason)
        self.number = number


def parse(text: str) -> dict[str, Any]:
    """The command in a message: `type`, `id` (None if it has none) and its fields.

    Raises:
        BadMessage: it is none.
    """
    if len(text.encode("utf-8", "surrogatepass")) > LONGEST_MESSAGE:
        raise BadMessage(f"A message may have {LONGEST_MESSAGE} bytes at most.")
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise BadMessage("A message must be JSON.") from None
    if not isinstance(message, dict):
        raise BadMessage("A message must be a JSON object.")
    number = message.pop("id", None)
    if number is not None and (type(number) is not int or not 0 <= number < 2**53):
        raise BadMessage("id must be a whole number.")
    kind = message.pop("type", None)
    if not isinstance(kind, str) or kind not in COMMANDS:
        raise BadMessage(f"type must be one of {', '.join(COMMANDS)}.", number)
    fields = COMMANDS[kind]
    for name in message:
        if name not in fields:
            raise BadMessage(f"A message of type {kind} has no {str(name)[:40]!r}.", number)
    for name, field in fields.items():
        if name in message:
            _check(name, message[name], field, number)
        elif field.required:
            raise BadMessage(f"A message of type {kind} needs {name}.", number)
    if kind == "prompt" and not message:
        raise BadMessage("A message of type prompt needs text or camera.", number)
    return {"type": kind, "id": number, **message}


def schema() -> dict[str, Any]:
    """The same as JSON Schema (2020-12)."""
    commands = []
    for kind, fields in COMMANDS.items():
        properties: dict[str, Any] = {"type": {"const": kind}, "id": {"type": "integer", "minimum": 0}}
        for name, field in fields.items():
            properties[name] = _property(field)
        required = ["type", *(name for name, field in fields.items() if field.required)]
        commands.append(
            {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What a client may send to the WebSocket of longlive-rag serve",
        "oneOf": commands,
    }


def _check(name: str, value: Any, field: Field, number: int | None) -> None:
    if not isinstance(value, _PYTHON[field.kind]) or isinstance(value, bool):
        raise BadMessage(f"{name} must be of type {field.kind}.", number)
    if field.choices and value not in field.choices:
        raise BadMessage(f"{name} must be one of {', '.join(field.choices)}.", number)
    if isinstance(value, (str, list)):
        if not field.least <= len(value) <= field.most:
            unit = "characters" if isinstance(value, str) else "entries"
            raise BadMessage(f"{name} may have {field.least:.0f} to {field.most:.0f} {unit}.", number)
        if isinstance(value, list) and not all(isinstance(each, str) and len(each) <= 64 for each in value):
            raise BadMessage(f"{name} must be a list of names.", number)
    elif isinstance(value, (int, float)) and not (math.isfinite(value) and field.least <= value <= field.most):
        raise BadMessage(f"{name} must be from {field.least:.0f} to {field.most:.0f}.", number)


def _property(field: Field) -> dict[str, Any]:
    if field.choices:
        return {"enum": list(field.choices)}
    if field.kind == "string":
        return {"type": "string", "minLength": int(field.least), "maxLength": int(field.most)}
    if field.kind == "array":
        items = {"type": "string", "maxLength": 64}
        return {"type": "array", "items": items, "minItems": int(field.least), "maxItems": int(field.most)}
    return {"type": field.kind, "minimum": field.least, "maximum": field.most}
