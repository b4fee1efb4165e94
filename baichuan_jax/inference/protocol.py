"""What OpenAI's HTTP API has in all its requests: JSON objects, their members, and errors."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

# What OpenAI knows and has no effect here.
_HARMLESS = {
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls"),
    *("safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
}
# What OpenAI knows and this family lacks, with the values that ask for nothing.
_UNSUPPORTED: dict[str, Sequence[Any]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "moderation": (),
    "suffix": ("",),
    "best_of": (1,),
}


class ApiError(Exception):
    """An answer in OpenAI's error shape.

    Attributes:
      status: the HTTP status.
      headers: of the answer, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
      ApiError: 400, for what is not UTF-8, JSON (NaN and Infinity are not), or an object.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not valid UTF-8: {error}.") from error
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        message = f"A string of the body has a lone surrogate, {error.object[error.start]!r}."
        raise ApiError(400, message) from error
    except RecursionError as error:
        raise ApiError(400, "The JSON of the body is nested too deeply.") from error
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object, such as {...}.")
    return value


class Fields:
    """The members of a JSON object, each read once; null counts as absent.

    Every reader raises an `ApiError` of status 400 that names the member.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self._left = dict(values)
        self._prefix = prefix

    def take(self, name: str) -> Any:
        return self._left.pop(name, None)

    def boolean(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise wrong_type(self._prefix + name, "true or false", value)
        return bool(value)

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(self._prefix + name, "an integer", value)
        return self._within(name, value, low, high)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(self._prefix + name, "a number", value)
        return float(self._within(name, value, low, high))

    def model(self, served: str) -> None:
        """Refuses a request for another model than the one served."""
        name = self.take("model")
        if name is not None and not isinstance(name, str):
            raise wrong_type("model", "a string", name)
        if name not in (None, served):
            raise unknown_model(name, served)

    def done(self) -> None:
        """Refuses what nobody has taken."""
        for name, value in self._left.items():
            full = self._prefix + name
            if value is None or name in _HARMLESS or value in _UNSUPPORTED.get(name, ()):
                continue
            if name in _UNSUPPORTED:
                message = f"{full} is not supported by this server."
                raise ApiError(400, message, full, "unsupported_parameter")
            raise ApiError(400, f"Unknown parameter: {shown(full)}.", full, "unknown_parameter")

    def _within(self, name, value, low, high):
        if not low <= value <= high:  # NaN is not, either
            name = self._prefix + name
            message = f"{name} must be from {low} to {high}, not {shown(value)}."
            raise ApiError(400, message, name, "invalid_value")
        return value


def unknown_model(name: str, served: str) -> ApiError:
    """The error for a model that is not served here."""
    message = f"The model {shown(name)} does not exist; this server has {served!r}."
    return ApiError(404, message, "model", "model_not_found")


def wrong_type(name: str, right: str, value: Any) -> ApiError:
    """The error for a member that is not `right`, or is missing (None)."""
    if value is None:
        return ApiError(400, f"{name} must be {right}.", name, "missing_required_parameter")
    message = f"{name} must be {right}, not {shown(value)}."
    return ApiError(400, message, name, "invalid_type")


def shown(value: Any) -> str:
    """A value as a message shows it: at most 60 characters."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")
