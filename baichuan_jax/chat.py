"""The conversation formats of the released chat models: messages in, token ids out.

  Baichuan 2:  [system] (user-id text assistant-id text)* user-id text assistant-id
  Baichuan 1:           (user-id text assistant-id text </s>)* user-id text assistant-id

There is no BOS and no separator. The role ids are `<reserved_106>` and `<reserved_107>` in
Baichuan 2, `<reserved_102>` and `<reserved_103>` in Baichuan 1: 195 and 196 in both released
files. A message's text never becomes a role id, for `Tokenizer.encode` makes no special token.

One deviation from the official code, which keeps the last tokens of what is too long and may
so lose the system prompt and half a message: here whole rounds are dropped, and it is told.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from baichuan_jax.tokenizer import Tokenizer

_ROLE_TOKENS = {1: ("<reserved_102>", "<reserved_103>"), 2: ("<reserved_106>", "<reserved_107>")}
_ROLES = ("system", "user", "assistant")

# generation_config.json of the released chat models, in Hugging Face's names.
_DEFAULTS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "user_token_id": 195,
    "assistant_token_id": 196,
    "max_new_tokens": 2048,
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 5,
    "top_p": 0.85,
}
_REPETITION_PENALTY = {1: 1.1, 2: 1.05}


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """The ids of a conversation.

    Attributes:
      version: 1 or 2, of Baichuan.
      user_id, assistant_id: begin a message of that role.
      eos_id: ends a reply; in the prompt it stands after earlier replies in version 1 only.
    """

    version: int
    user_id: int
    assistant_id: int
    eos_id: int


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model reads before it replies.

    Attributes:
      ids: token ids.
      dropped_rounds: how many of the oldest rounds (a user's message and what followed it) did
        not fit and are not in `ids`.
    """

    ids: list[int]
    dropped_rounds: int


def chat_format(tokenizer: Tokenizer, version: int) -> ChatFormat:
    """The format of Baichuan 1 or 2, with a tokenizer's ids.

    Raises:
      ValueError: another version, or the tokenizer lacks a role token.
    """
    _check_version(version)
    try:
        user_id, assistant_id = (tokenizer.special(name) for name in _ROLE_TOKENS[version])
    except ValueError as error:
        names = " and ".join(_ROLE_TOKENS[version])
        raise ValueError(f"The chat format of Baichuan {version} needs {names}. {error}") from error
    return ChatFormat(version, user_id, assistant_id, tokenizer.eos_id)


def chat_defaults(version: int) -> dict[str, int | float | bool]:
    """The released chat models' generation_config.json, for a folder that has none.

    Raises:
      ValueError: another version than 1 or 2.
    """
    _check_version(version)
    return _DEFAULTS | {"repetition_penalty": _REPETITION_PENALTY[version]}


def prompt_budget(max_length: int, max_new_tokens: int) -> int:
    """The tokens left for the prompt: all but the reply's, and at least half of the context.

    The official rule; Baichuan 2 dropped the half, with which a reply longer than the context
    leaves nothing to reply to.
    """
    return max(max_length - max_new_tokens, max_length // 2)


def chat_prompt(
    messages: Sequence[Mapping[str, str]],
    tokenizer: Tokenizer,
    format: ChatFormat,
    max_tokens: int,
) -> Prompt:
    """The prompt for the next reply.

    If the last message is the assistant's, the reply goes on from it. Where the messages do not
    fit, the oldest rounds are left out; the system message and the newest round never are.

    Args:
      messages: each with 'role' ('system', only as the first and in version 2; 'user';
        'assistant') and 'content', a string; other keys are not read.
      max_tokens: the most ids that the prompt may have.

    Raises:
      ValueError: names the message and the field at fault; or the system message and the newest
        round alone are more than `max_tokens`.
    """
    _check(messages, format)
    encoded = []
    for i, message in enumerate(messages):
        try:
            encoded.append(tokenizer.encode(message["content"]))
        except ValueError as error:
            raise ValueError(f"messages[{i}]['content']: {error}") from error
    system_ids: list[int] = []
    rounds: list[list[int]] = []
    for i, (message, ids) in enumerate(zip(messages, encoded, strict=True)):
        if message["role"] == "system":
            system_ids = ids
        elif message["role"] == "user":
            rounds.append([format.user_id, *ids])
        else:
            if not rounds:
                rounds.append([])
            rounds[-1] += [format.assistant_id, *ids]
            if format.version == 1 and i + 1 < len(messages):
                rounds[-1].append(format.eos_id)
    if messages[-1]["role"] != "assistant":
        rounds = rounds or [[]]
        rounds[-1].append(format.assistant_id)

    room = max_tokens - len(system_ids) - len(rounds[-1])
    if room < 0:
        raise ValueError(
            f"The newest round has {len(rounds[-1])} tokens and the system message"
            f" {len(system_ids)}: together more than the {max_tokens} that a prompt may have."
        )
    first = len(rounds) - 1
    while first and len(rounds[first - 1]) <= room:
        first -= 1
        room -= len(rounds[first])
    return Prompt(sum(rounds[first:], system_ids), first)


def _check(messages: Sequence[Mapping[str, str]], format: ChatFormat) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            f"messages must be a list of {{'role': ..., 'content': ...}}, not"
            f" {type(messages).__name__}."
        )
    if not messages:
        raise ValueError("messages is empty: there is nothing to reply to.")
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(
                f"{name} must be {{'role': ..., 'content': ...}}, not {type(message).__name__}."
            )
        for field in ("role", "content"):
            if field not in message:
                raise ValueError(f"{name} has no {field!r}; it has {sorted(map(str, message))}.")
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise ValueError(f"{name}['role']={role!r} must be one of {', '.join(_ROLES)}.")
        if not isinstance(content, str):
            raise ValueError(f"{name}['content'] must be a string, not {type(content).__name__}.")
        if role == "system" and format.version == 1:
            raise ValueError(
                f"{name}['role']='system': Baichuan 1 has no system message; put its text into"
                " the first user message."
            )
        if role == "system" and i:
            raise ValueError(
                f"{name}['role']='system': only the first message may be the system's."
            )


def _check_version(version: int) -> None:
    if version not in _ROLE_TOKENS:
        raise ValueError(f"version={version!r} must be 1 (Baichuan) or 2 (Baichuan 2).")
