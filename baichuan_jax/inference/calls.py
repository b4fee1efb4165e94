"""Requests of OpenAI's HTTP API, checked: JSON objects in, requests for the engine out.

Everything a client can ask wrong ends here, as an `ApiError` that names the parameter. Beyond
OpenAI's parameters there are `top_k`, `repetition_penalty`, `ignore_eos`, and `truncate_history`
for chats. What a client leaves out comes from the model's generation_config.json.

Legend: V vocabulary.
"""

import contextlib
import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from baichuan_jax import chat
from baichuan_jax.inference.load import Defaults, LanguageModel
from baichuan_jax.inference.protocol import ApiError, Fields, shown, wrong_type
from baichuan_jax.inference.request import Request
from baichuan_jax.inference.sampling import Sampling

MAX_CHOICES = 8  # n
MAX_PROMPTS = 128  # of one request
MAX_STOPS = 16  # OpenAI takes 4, but some tasks of lm-eval have more
MAX_STOP_CHARACTERS = 1_000
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
_ANY_SIZE = 2**31


@dataclasses.dataclass(frozen=True)
class Call:
    """A checked request.

    Attributes:
      chat: chat or plain completion.
      model: the model's name, for the answer.
      requests: one per choice: the `choices` of the first prompt, then of the second, ...
      choices: n.
      stream, include_usage: the form of the answer.
      logprobs: log-probabilities are wanted.
      echo: per prompt, the text to repeat before the output; None: nothing is repeated.
      dropped_rounds: what `truncate_history` cost; None where it was not asked for.
    """

    chat: bool
    model: str
    requests: list[Request]
    choices: int = 1
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    echo: list[str] | None = None
    dropped_rounds: int | None = None


def chat_call(body: Mapping[str, Any], model: LanguageModel) -> Call:
    """Reads a request to /v1/chat/completions.

    Raises:
      ApiError: 400 or 404, naming the parameter.
    """
    fields = Fields(body)
    fields.model(model.name)
    messages = _messages(fields.take("messages"))
    wanted = _max_tokens(fields, "max_tokens", low=1)
    newer = _max_tokens(fields, "max_completion_tokens", low=1)
    if wanted is not None and newer is not None:
        raise ApiError(400, "Give max_completion_tokens or max_tokens, not both.", "max_tokens")
    wanted = newer if wanted is None else wanted
    truncate = fields.boolean("truncate_history")
    logprobs = fields.boolean("logprobs")
    top_logprobs = fields.integer("top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    if top_logprobs and not logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true.", "top_logprobs")
    shared = _shared(fields, model, model.chat_defaults)
    fields.done()

    prompt = _chat_prompt(messages, model, wanted, truncate)
    request = Request(
        prompt=prompt.ids,
        max_new_tokens=_room(len(prompt.ids), wanted, model, model.chat_defaults, "messages"),
        stop=shared.stop,
        ignore_eos=shared.ignore_eos,
        top_logprobs=top_logprobs,
        # A chat that ends with the assistant's words is continued, not answered.
        continues=messages[-1]["role"] == "assistant" and bool(messages[-1]["content"]),
    )
    return Call(
        chat=True,
        model=model.name,
        requests=_with_seeds(request, shared),
        choices=shared.choices,
        stream=shared.stream,
        include_usage=shared.include_usage,
        logprobs=logprobs,
        dropped_rounds=prompt.dropped_rounds if truncate else None,
    )


def completion_call(body: Mapping[str, Any], model: LanguageModel) -> Call:
    """Reads a request to /v1/completions.

    Raises:
      ApiError: 400 or 404, naming the parameter.
    """
    fields = Fields(body)
    fields.model(model.name)
    prompts = _prompts(fields.take("prompt"), model)
    echo = fields.boolean("echo")
    wanted = _max_tokens(fields, "max_tokens", low=0)
    if wanted == 0 and not echo:
        message = "max_tokens=0 only scores the prompt: it needs echo=true."
        raise ApiError(400, message, "max_tokens", "invalid_value")
    logprobs = fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
    shared = _shared(fields, model, model.defaults)
    fields.done()

    requests = []
    for _, ids in prompts:
        room = _room(len(ids), wanted, model, model.defaults, "prompt")
        request = Request(
            prompt=ids,
            max_new_tokens=room,
            stop=shared.stop,
            # Who scores a prompt and one token more, as lm-eval does, counts on that token.
            ignore_eos=shared.ignore_eos or (echo and logprobs is not None and room == 1),
            top_logprobs=logprobs or 0,
            score_from=0 if echo and logprobs is not None else None,
        )
        requests += _with_seeds(request, shared)
    return Call(
        chat=False,
        model=model.name,
        requests=requests,
        choices=shared.choices,
        stream=shared.stream,
        include_usage=shared.include_usage,
        logprobs=logprobs is not None,
        echo=[text for text, _ in prompts] if echo else None,
    )


def text_ids(body: Mapping[str, Any], model: LanguageModel) -> list[int]:
    """Reads a request to /tokenize: the ids of a `prompt`, or of a chat's `messages`.

    Raises:
      ApiError: 400 or 404, naming the parameter.
    """
    fields = Fields(body)
    fields.model(model.name)
    fields.boolean("add_special_tokens")  # taken for lm-eval's sake; the family adds none
    prompt, messages = fields.take("prompt"), fields.take("messages")
    fields.done()
    if (prompt is None) == (messages is None):
        raise ApiError(400, "Give either prompt or messages.", "prompt")
    if messages is not None:
        return _chat_ids(_messages(messages), model, _ANY_SIZE).ids
    if not isinstance(prompt, str):
        raise wrong_type("prompt", "a string", prompt)
    return model.tokenizer.encode(prompt)


def ids_text(body: Mapping[str, Any], model: LanguageModel) -> str:
    """Reads a request to /detokenize: the text of `tokens`.

    Raises:
      ApiError: 400 or 404, naming the parameter.
    """
    fields = Fields(body)
    fields.model(model.name)
    tokens = fields.take("tokens")
    fields.done()
    if not isinstance(tokens, list):
        raise wrong_type("tokens", "a list of token ids", tokens)
    return model.tokenizer.decode(_token_ids(tokens, "tokens", model))


@dataclasses.dataclass(frozen=True)
class _Shared:
    """What both kinds of completion have."""

    sampling: Sampling
    stop: tuple[str, ...]
    ignore_eos: bool
    choices: int
    stream: bool
    include_usage: bool


def _shared(fields: Fields, model: LanguageModel, given: Defaults) -> _Shared:
    defaults, V = given.sampling, model.engine.vocab_size
    seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
    sampling = dataclasses.replace(
        defaults,
        temperature=fields.number("temperature", defaults.temperature, 0, 2),
        top_k=fields.integer("top_k", defaults.top_k, 0, V),
        top_p=fields.number("top_p", defaults.top_p, 1e-6, 1),
        repetition_penalty=fields.number(
            "repetition_penalty", defaults.repetition_penalty, 0.01, 10
        ),
        presence_penalty=fields.number("presence_penalty", defaults.presence_penalty, -2, 2),
        frequency_penalty=fields.number("frequency_penalty", defaults.frequency_penalty, -2, 2),
        logit_bias=_logit_bias(fields.take("logit_bias"), V) or defaults.logit_bias,
        seed=secrets.randbits(31) if seed is None else seed,
    )
    stream = fields.boolean("stream")
    options = fields.take("stream_options")
    if options is not None and not stream:
        raise ApiError(400, "stream_options needs stream=true.", "stream_options")
    if options is not None and not isinstance(options, dict):
        raise wrong_type("stream_options", "an object", options)
    options = Fields(options or {}, "stream_options.")
    include_usage = options.boolean("include_usage")
    options.boolean("include_obfuscation")  # there is none, whatever is asked
    options.done()
    return _Shared(
        sampling=sampling,
        stop=_stop(fields.take("stop")),
        ignore_eos=fields.boolean("ignore_eos"),
        choices=fields.integer("n", 1, 1, MAX_CHOICES),
        stream=stream,
        include_usage=include_usage,
    )


def _with_seeds(request: Request, shared: _Shared) -> list[Request]:
    first = shared.sampling
    samplings = [dataclasses.replace(first, seed=first.seed + i) for i in range(shared.choices)]
    return [dataclasses.replace(request, sampling=sampling) for sampling in samplings]


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise wrong_type("messages", "a list of at least one message", value)
    messages = []
    for i, message in enumerate(value):
        name = f"messages[{i}]"
        if not isinstance(message, dict):
            raise wrong_type(name, "an object with role and content", message)
        fields = Fields(message, f"{name}.")
        fields.take("name")
        fields.take("refusal")  # OpenAI's client sends an answer back with all its members
        fields.take("annotations")
        role = fields.take("role")
        if role == "developer":  # OpenAI's newer word for it
            role = "system"
        if role not in ("system", "user", "assistant"):
            message = f"{name}.role must be system, user or assistant, not {shown(role)}."
            raise ApiError(400, message, f"{name}.role", "invalid_value")
        content = _content(fields.take("content"), f"{name}.content")
        for member in ("tool_calls", "function_call", "audio"):
            if fields.take(member):
                message = f"{name}.{member} is not supported by this server."
                raise ApiError(400, message, f"{name}.{member}", "unsupported_parameter")
        fields.done()
        messages.append({"role": role, "content": content})
    return messages


def _content(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(name, "a string or a list of text parts", value)
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            message = f"{name}[{i}] must be a text part: the model reads nothing else."
            raise ApiError(400, message, f"{name}[{i}]", "invalid_value")
        if not isinstance(part.get("text"), str):
            raise wrong_type(f"{name}[{i}].text", "a string", part.get("text"))
        texts.append(part["text"])
    return "".join(texts)


def _chat_prompt(
    messages: list[dict[str, str]], model: LanguageModel, wanted: int | None, truncate: bool
) -> chat.Prompt:
    whole = _chat_ids(messages, model, _ANY_SIZE)
    if wanted is None:
        budget = chat.prompt_budget(model.max_length, model.chat_defaults.max_new_tokens)
    else:
        budget = model.max_length - wanted
    if not truncate or len(whole.ids) <= budget:
        return whole
    for size in (budget, model.max_length - 1):
        with contextlib.suppress(ApiError):  # not even the last round fits
            return _chat_ids(messages, model, size)
    return whole


def _chat_ids(messages: list[dict[str, str]], model: LanguageModel, budget: int) -> chat.Prompt:
    if model.format is None:
        message = f"The tokenizer of {model.name!r} has no role tokens: use /v1/completions."
        raise ApiError(400, message, "messages")
    try:
        return chat.chat_prompt(messages, model.tokenizer, model.format, budget)
    except ValueError as error:
        raise ApiError(400, str(error), "messages", "invalid_value") from error


def _room(
    prompt: int, wanted: int | None, model: LanguageModel, defaults: Defaults, param: str
) -> int:
    """How many tokens to generate."""
    room = model.max_length - prompt
    if room < (1 if wanted is None else wanted):
        message = (
            f"This model's maximum context length is {model.max_length} tokens; {param} has"
            f" {prompt} and the completion needs {1 if wanted is None else wanted}."
        )
        raise ApiError(400, message, param, "context_length_exceeded")
    return min(defaults.max_new_tokens, room) if wanted is None else wanted


def _max_tokens(fields: Fields, name: str, low: int) -> int | None:
    return fields.integer(name, None, low, _ANY_SIZE)


def _prompts(value: Any, model: LanguageModel) -> list[tuple[str, list[int]]]:
    """The texts and ids of the prompts."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_id, value))):
        value, names = [value], ["prompt"]
    elif isinstance(value, list) and value:
        names = [f"prompt[{i}]" for i in range(len(value))]
    else:
        raise wrong_type("prompt", "a string, token ids, or a list of either", value)
    if len(value) > MAX_PROMPTS:
        message = f"prompt has {len(value)} prompts; one request may have {MAX_PROMPTS}."
        raise ApiError(400, message, "prompt", "invalid_value")
    prompts = []
    for name, prompt in zip(names, value, strict=True):
        if isinstance(prompt, str):
            text, ids = prompt, model.tokenizer.encode(prompt)
        elif isinstance(prompt, list):
            ids = _token_ids(prompt, name, model)
            text = model.tokenizer.decode(ids)
        else:
            raise wrong_type(name, "a string or a list of token ids", prompt)
        if not ids:
            raise ApiError(400, f"{name} is empty; it must hold a token.", name, "invalid_value")
        prompts.append((text, ids))
    return prompts


def _token_ids(values: list[Any], name: str, model: LanguageModel) -> list[int]:
    V = model.engine.vocab_size
    for i, value in enumerate(values):
        if not _is_id(value):
            raise wrong_type(f"{name}[{i}]", "a token id", value)
        if not 0 <= value < min(V, model.tokenizer.vocab_size):
            message = f"{name}[{i}] must be an id from 0 to {V - 1}, not {shown(value)}."
            raise ApiError(400, message, name, "invalid_value")
    return values


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise wrong_type("stop", "a string or a list of strings", value)
    if len(stops) > MAX_STOPS:
        message = f"stop has {len(stops)} strings; there may be {MAX_STOPS}."
        raise ApiError(400, message, "stop", "invalid_value")
    if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        message = f"Each string of stop must have 1 to {MAX_STOP_CHARACTERS} characters."
        raise ApiError(400, message, "stop", "invalid_value")
    return tuple(stops)


def _logit_bias(value: Any, V: int) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong_type("logit_bias", "an object from token ids to numbers", value)
    if len(value) > MAX_LOGIT_BIAS:
        message = f"logit_bias has {len(value)} entries; there may be {MAX_LOGIT_BIAS}."
        raise ApiError(400, message, "logit_bias", "invalid_value")
    bias = {}
    fields = Fields(value, "logit_bias.")
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < V):
            message = f"logit_bias has the key {shown(key)}; keys are ids from 0 to {V - 1}."
            raise ApiError(400, message, "logit_bias", "invalid_value")
        bias[int(key)] = fields.number(key, 0.0, -100, 100)
    return bias
