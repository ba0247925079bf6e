"""Errors of this package, one for each person who can act on them.

    ObcacheError
    ├── ConfigError    (ValueError)    the operator: a flag or Engine argument; the server does not start
    ├── HostError      (RuntimeError)  the operator: this SGLang, model or server option cannot be served; it does not start
    └── RequestError   (ValueError)    the client: one request; SGLang answers ValueError with HTTP 400
        └── ContextNotFound            the client: no such context in this namespace; HTTP 404

Messages say what was given, what is allowed and what to do.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException


def shown(value: object) -> str:
    """A client's value of any kind and size, in at most 200 characters and three dots, for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits or levels
        return f"<{type(value).__name__}>"
    return text if len(text) <= 200 else text[:200] + "..."


class ObcacheError(Exception):
    """Base of all errors raised by obcache_sglang, except the client's, which imports nothing of ours."""


class ConfigError(ObcacheError, ValueError):
    """A start-up setting is wrong."""


class HostError(ObcacheError, RuntimeError):
    """The SGLang, model or server option at hand cannot be served with compression."""


class RequestError(ObcacheError, ValueError, HTTPException):
    """One request is wrong. status_code: what HTTP clients get.

    A ValueError, as SGLang raises for wrong requests; and an HTTPException, since some endpoints (Ollama's) let a ValueError out as a 500.
    """

    def __init__(self, message: str, status_code: int = 400) -> None:
        HTTPException.__init__(self, status_code, message)

    def __str__(self) -> str:  # not HTTPException's, which begins with the status
        return self.detail


class ContextNotFound(RequestError):
    """No context of this id exists under the given cache salt."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status_code=404)


class InvalidValue(ObcacheError, ValueError):
    """One setting has a value that is not allowed. Whoever knows where the value came from turns it into one of the errors above.

    name: the setting; value: as given; reason: continues the sentence "NAME=VALUE ...".
    """

    def __init__(self, name: str, value: object, reason: str) -> None:
        super().__init__(f"{name}={shown(value)} {reason}")
        self.name = name
        self.value = value
        self.reason = reason
