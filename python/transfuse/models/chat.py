"""Chat templates: a conversation as the text that a model was trained to continue."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from transfuse.errors import ArgumentError, CheckpointError, MissingDependencyError


def render(template: str, messages: list[Any], add_generation_prompt: bool, special: dict[str, str]) -> str:
    """Run a chat template, which comes with a checkpoint and is not trusted, in jinja's sandbox.

    Raises:
        CheckpointError: the template is broken. ArgumentError: it refuses these messages.
        MissingDependencyError: jinja2 is not installed.

    >>> template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    >>> render(template, [{"content": "hi"}], True, {"eos": "."})
    'hi.'
    """
    try:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingDependencyError("chat templates need the package jinja2: pip install jinja2") from error

    def refuse(message: str) -> None:
        raise ArgumentError(f"chat template: {message}")

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    tokens = {f"{role}_token": token for role, token in special.items()}
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **tokens
        )
    except (TemplateError, TypeError, KeyError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise CheckpointError(f"chat template: {type(error).__name__}: {error}") from error
