"""The server with the `openai` client, over a real socket: answers are what the engine says."""

import dataclasses
import json

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from baichuan_jax import chat
from baichuan_jax.inference import calls
from baichuan_jax.inference.request import Request
from baichuan_jax.inference.sampling import Sampling
from tests.inference import serving

QUESTION = [{"role": "user", "content": "今天天气很好"}]
PROMPT = "The quick brown fox 今天"


@pytest.fixture(scope="module")
def model():
    return serving.tiny_model()


@pytest.fixture(scope="module")
def server(model):
    with serving.running(model) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai", reason="needs the `openai` client")
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def run(model, prompt, **fields):
    """What the engine says by itself; the server's thread sleeps while nothing is asked."""
    ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    return model.engine.generate([Request(ids, **fields)])[0]


def chat_ids(model, messages):
    return chat.chat_prompt(messages, model.tokenizer, model.format, 10_000).ids


def test_models(client):
    import openai

    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "baichuan_jax"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("else/where")


def test_a_chat_reply_is_the_engines(client, model):
    expected = run(model, chat_ids(model, QUESTION), max_new_tokens=24, continues=False)
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=24)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text != ""
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == len(expected.request.prompt)
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(expected.tokens)
    parts = [{"type": "text", "text": "今天"}, {"type": "text", "text": "天气很好"}]
    same = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], max_completion_tokens=24
    )
    assert same.choices[0].message.content == expected.text


def test_a_stream_adds_up_to_the_answer(client):
    asked = {"model": "tiny", "messages": QUESTION, "max_tokens": 40, "n": 2}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    stream = client.chat.completions.create(
        **asked, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == (
        whole.usage.completion_tokens
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant"
        assert len(own) > 3  # more than beginning, all the text, end
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == choice.finish_reason
        scored = [token for part in own if part.logprobs for token in part.logprobs.content]
        assert [token.token for token in scored] == [
            token.token for token in choice.logprobs.content
        ]


def test_a_stream_without_usage_has_none(client):
    stream = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=3, stream=True
    )
    assert all(chunk.usage is None and chunk.choices for chunk in stream)


def test_chat_logprobs(client, model):
    expected = run(
        model, chat_ids(model, QUESTION), max_new_tokens=24, top_logprobs=3, continues=False
    )
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=24, logprobs=True, top_logprobs=3
    )
    tokens = answer.choices[0].logprobs.content
    assert [token.logprob for token in tokens] == pytest.approx(expected.logprobs, abs=1e-5)
    assert [len(token.top_logprobs) for token in tokens] == [3] * len(tokens)
    assert all(token.token == token.top_logprobs[0].token for token in tokens)  # greedy
    data = b"".join(bytes(token.bytes) for token in tokens)
    assert data == b"".join(map(model.tokenizer.id_bytes, expected.tokens))
    plain = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=24, logprobs=True
    )
    assert all(token.top_logprobs == [] for token in plain.choices[0].logprobs.content)


def test_a_reply_that_has_begun_goes_on(client, model):
    messages = [*QUESTION, {"role": "assistant", "content": "The quick"}]
    expected = run(model, chat_ids(model, messages), max_new_tokens=8)
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    assert answer.choices[0].message.content == expected.text


def test_prompts_of_every_form(client, model):
    ids = model.tokenizer.encode(PROMPT)
    expected = run(model, PROMPT, max_new_tokens=9).text

    def texts(prompt, **fields):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, **fields)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    assert texts(PROMPT) == texts(ids) == [expected]
    other = run(model, "x", max_new_tokens=9).text
    assert texts([PROMPT, "x"]) == texts([ids, model.tokenizer.encode("x")]) == [expected, other]
    assert texts([PROMPT, "x"], n=2) == [expected, expected, other, other]


def test_completions_stream(client):
    whole = client.completions.create(
        model="tiny", prompt=[PROMPT, "x"], max_tokens=30, echo=True, logprobs=1
    )
    chunks = list(
        client.completions.create(
            model="tiny", prompt=[PROMPT, "x"], max_tokens=30, echo=True, logprobs=1, stream=True
        )
    )
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        assert own[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "text_offset", "token_logprobs"):
            parts = [item for part in own for item in getattr(part.logprobs, name)]
            assert parts == getattr(choice.logprobs, name)


def test_echo_scores_the_prompt(client, model):
    expected = run(model, PROMPT, max_new_tokens=6, top_logprobs=2, score_from=0)
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=6, echo=True, logprobs=2
    )
    (choice,) = answer.choices
    scores = choice.logprobs
    assert choice.text == PROMPT + expected.text
    assert scores.token_logprobs[0] is scores.top_logprobs[0] is None
    assert scores.token_logprobs[1:] == pytest.approx(
        expected.prompt_logprobs + expected.logprobs, abs=1e-5
    )
    for token, offset, logprob, top in zip(
        scores.tokens,
        scores.text_offset,
        scores.token_logprobs,
        scores.top_logprobs,
        strict=True,
    ):
        if not token.startswith(("bytes:", "token_id:")):
            assert choice.text[offset:].startswith(token)
        assert logprob is None or (top[token] == logprob and 2 <= len(top) <= 3)
    only = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=0
    )
    assert only.choices[0].text == PROMPT
    assert only.choices[0].logprobs.token_logprobs == pytest.approx(
        [None, *expected.prompt_logprobs], abs=1e-5
    )
    assert only.usage.completion_tokens == 0
    plain = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, echo=True)
    assert plain.choices[0].text == choice.text and plain.choices[0].logprobs is None


def test_lm_eval_finds_one_token_after_the_prompt(server, model):
    """Its scores are token_logprobs[context:-1], so that an end of text must not be left out."""
    ids = model.tokenizer.encode(PROMPT)
    ends = {"logit_bias": {str(model.tokenizer.eos_id): 100}}  # the model would end here
    asked = {"prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    asked |= {"model": "tiny", "temperature": 0, **ends}
    status, _, answer = serving.ask(server, "POST", "/v1/completions", asked)
    assert status == 200
    scores = answer["choices"][0]["logprobs"]
    assert len(scores["token_logprobs"]) == len(ids) + 1
    expected = run(model, ids, max_new_tokens=0, score_from=3, top_logprobs=1)
    assert scores["token_logprobs"][3:-1] == pytest.approx(expected.prompt_logprobs, abs=1e-5)
    pairs = list(zip(scores["token_logprobs"], scores["top_logprobs"], strict=True))
    assert [logprob == max(top.values()) for logprob, top in pairs[3:-1]] == [
        token == top[0][0] for token, top in zip(ids[3:], expected.prompt_top, strict=True)
    ]


def test_seeds_of_choices(client, model):
    def texts(**fields):
        answer = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=12, temperature=1.0, **fields
        )
        return [choice.text for choice in answer.choices]

    three = texts(n=3, seed=5)
    assert len(set(three)) == 3
    assert three == [texts(seed=seed)[0] for seed in (5, 6, 7)]
    sampling = Sampling(temperature=1.0, seed=6)
    assert run(model, PROMPT, max_new_tokens=12, sampling=sampling).text == three[1]
    assert texts() != texts()  # without a seed, a new one each time
    assert texts(seed=-1) == texts(seed=-1)


def test_stop_strings(client, model):
    text = run(model, PROMPT, max_new_tokens=40).text
    stop, earlier = text[len(text) // 2 :][:3], text[len(text) // 3 :][:2]
    for stops in (stop, ["never there", stop], [stop, earlier, "never there"]):
        found = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops)]
        expected = text[: min(start for start in found if start >= 0)]
        for stream in (False, True):
            answer = client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=40, stop=stops, logprobs=0, stream=stream
            )
            parts = [chunk.choices[0] for chunk in answer] if stream else answer.choices
            assert "".join(part.text for part in parts) == expected != ""
            assert parts[-1].finish_reason == "stop"
            offsets = [start for part in parts for start in part.logprobs.text_offset]
            assert offsets[0] == 0 and max(offsets) < len(expected)  # none of the stop string


def test_sampling_fields_reach_the_engine(client, model):
    wanted = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "temperature": 0.7, "top_p": 0.9}
    extra = {"top_k": 40, "repetition_penalty": 1.2}
    sampling = Sampling(**wanted, **extra, logit_bias={200: 3.0, 300: -100.0}, seed=3)
    expected = run(model, PROMPT, max_new_tokens=30, sampling=sampling, ignore_eos=True)
    answer = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=30,
        seed=3,
        logit_bias={"200": 3, "300": -100},
        **wanted,
        extra_body={**extra, "ignore_eos": True},
    )
    assert answer.choices[0].text == expected.text
    assert answer.usage.completion_tokens == 30


def test_cached_tokens_are_told(client):
    prompt = "机器学习模型需要大量的训练数据。" * 3 + "x"
    for _ in range(2):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    assert answer.usage.prompt_tokens_details.cached_tokens >= 16
    long = QUESTION[0]["content"] * 20
    for n in (1, 2):
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": long}], max_tokens=1, n=n
        )
        assert answer.usage.prompt_tokens < 150  # counted once
    assert answer.usage.prompt_tokens_details.cached_tokens >= 16


def test_long_chats_are_refused_or_cut_with_notice(client, model):
    import openai

    messages = []
    for i in range(20):
        messages.append({"role": "user", "content": f"{i} The quick brown fox jumps"})
        messages.append({"role": "assistant", "content": "over the lazy dog 今天天气很好"})
    messages = [{"role": "system", "content": "Training data"}, *messages, *QUESTION]
    size = len(chat_ids(model, messages))
    assert size > 256
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=100)
    assert caught.value.code == "context_length_exceeded"
    assert "256" in str(caught.value) and str(size) in str(caught.value)

    kept = chat.chat_prompt(messages, model.tokenizer, model.format, 156)
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=100, extra_body={"truncate_history": True}
    )
    assert answer.dropped_rounds == kept.dropped_rounds > 0
    assert answer.usage.prompt_tokens == len(kept.ids) <= 156
    expected = run(model, kept.ids, max_new_tokens=100, continues=False)
    assert answer.choices[0].message.content == expected.text
    stream = client.chat.completions.create(
        model="tiny", messages=messages, stream=True, extra_body={"truncate_history": True}
    )
    assert {chunk.dropped_rounds for chunk in stream} == {
        chat.chat_prompt(messages, model.tokenizer, model.format, 192).dropped_rounds
    }
    whole = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=1, extra_body={"truncate_history": True}
    )
    assert whole.dropped_rounds == 0
    with pytest.raises(openai.BadRequestError) as caught:  # the last round alone is too long
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "好人" * 300}],
            extra_body={"truncate_history": True},
        )
    assert caught.value.code == "context_length_exceeded"


def test_defaults_are_the_models(model):
    sampling = Sampling(temperature=0.3, top_k=5, top_p=0.85, repetition_penalty=1.05)
    defaults = dataclasses.replace(model.defaults, sampling=sampling, max_new_tokens=50)
    model = dataclasses.replace(model, defaults=defaults, chat_defaults=defaults)
    (request,) = calls.chat_call({"messages": QUESTION}, model).requests
    assert dataclasses.replace(request.sampling, seed=0) == sampling
    assert request.max_new_tokens == 50
    assert not request.continues
    asked = {"messages": QUESTION, "temperature": 0, "top_k": 0, "top_p": None}
    (request,) = calls.chat_call(asked, model).requests
    assert (request.sampling.temperature, request.sampling.top_k) == (0, 0)
    assert request.sampling.top_p == 0.85  # null is nothing said
    long = {"prompt": model.tokenizer.encode("好") * 250}
    (request,) = calls.completion_call(long, model).requests
    assert request.max_new_tokens == 6  # what fits


def test_harmless_fields_are_taken(server):
    asked = {"messages": [*QUESTION], "max_tokens": 1, "user": "u", "metadata": {"a": "b"}}
    asked |= {"store": False, "tools": [], "tool_choice": "none", "service_tier": "auto"}
    asked |= {"response_format": {"type": "text"}, "parallel_tool_calls": True, "seed": None}
    status, _, answer = serving.ask(server, "POST", "/v1/chat/completions", asked)
    assert status == 200, answer
    replied = answer["choices"][0]["message"]  # a client sends it back as it came
    asked["messages"] += [replied, {"role": "user", "name": "n", "content": "好"}]
    assert serving.ask(server, "POST", "/v1/chat/completions", asked)[0] == 200


def test_tokenize_and_back(server, model):
    text = "Hello, 世界! </s> <reserved_107>"
    ids = model.tokenizer.encode(text)
    asked = {"prompt": text, "add_special_tokens": False, "model": "tiny"}
    status, _, answer = serving.ask(server, "POST", "/tokenize", asked)
    assert (status, answer) == (200, {"count": len(ids), "max_model_len": 256, "tokens": ids})
    assert serving.ask(server, "POST", "/detokenize", {"tokens": ids})[2] == {"prompt": text}
    answer = serving.ask(server, "POST", "/tokenize", {"messages": QUESTION})[2]
    assert answer["tokens"] == chat_ids(model, QUESTION)
    answer = serving.ask(server, "GET", "/tokenizer_info")[2]
    assert (answer["eos_token"], answer["eos_token_id"]) == ("</s>", model.tokenizer.eos_id)


def test_health_and_metrics(server, model):
    assert serving.ask(server, "GET", "/health")[2] == {
        "status": "ok",
        "model": "tiny",
        "active": 0,
        "waiting": 0,
    }

    def metrics():
        status, headers, text = serving.ask(server, "GET", "/metrics")
        assert status == 200 and headers["content-type"].startswith("text/plain")
        lines = [line.rsplit(" ", 1) for line in text.decode().splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in lines}

    before = metrics()
    asked = {"prompt": "今天天气", "max_tokens": 20, "ignore_eos": True}
    serving.ask(server, "POST", "/v1/completions", asked)
    serving.ask(server, "POST", "/v1/completions", {"prompt": 1})
    serving.ask(server, "GET", "/made/up")
    after = metrics()

    def grown(name):
        return after[name] - before.get(name, 0)

    counted = 'baichuan_jax_requests_total{path="/v1/completions",status="%d"}'
    assert grown(counted % 200) == grown(counted % 400) == 1
    assert grown('baichuan_jax_requests_total{path="other",status="404"}') == 1
    assert grown("baichuan_jax_generated_tokens_total") == 20
    assert grown("baichuan_jax_prompt_tokens_total") == len(model.tokenizer.encode("今天天气"))
    assert grown("baichuan_jax_time_to_first_token_seconds_count") == 1
    assert grown("baichuan_jax_time_per_output_token_seconds_count") == 1
    assert after["baichuan_jax_queue_length"] == after["baichuan_jax_active_slots"] == 0


def test_events_are_as_browsers_read_them(server):
    asked = {"messages": QUESTION, "max_tokens": 5, "stream": True}
    status, headers, data = serving.ask(server, "POST", "/v1/chat/completions", asked)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache"
    *events, last, rest = data.decode().split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events)
