"""Many prompts at one time: from a file, through the engine, into a file."""

import dataclasses
import json
from collections.abc import Iterator, Sequence

from etils import epath

from baichuan_jax.inference.engine import Engine
from baichuan_jax.inference.load import LanguageModel
from baichuan_jax.inference.request import Output, Request
from baichuan_jax.inference.sampling import Sampling
from baichuan_jax.training.metrics import Progress


@dataclasses.dataclass(frozen=True)
class Job:
    """A text to continue; `sample` counts the samples of one prompt from 0."""

    prompt: str
    sample: int
    request: Request


def read_prompts(path: epath.PathLike) -> list[str]:
    """The prompts of a file: its lines, or the field 'prompt' of each row of a .jsonl.

    Raises:
      OSError: the file cannot be read.
      ValueError: names the file and the line that has no prompt.
    """
    path = epath.Path(path)
    try:
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8.") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            raise ValueError(f"{path}:{number}: the line is empty; a prompt is needed.")
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
            if not (isinstance(row, dict) and isinstance(row.get("prompt"), str)):
                raise ValueError(
                    f"{path}:{number}: a row must be an object with a string 'prompt', not"
                    f" {line[:80]}"
                )
            line = row["prompt"]
        prompts.append(line)
    return prompts


def jobs(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
    stop: tuple[str, ...] = (),
) -> list[Job]:
    """What to ask of the engine; samples of a prompt stand side by side.

    Args:
      samples: of each prompt; sample i has the seed `sampling.seed + i`.
      sampling: None: the model's own.
      max_new_tokens: None: the model's own, or what the context leaves.

    Raises:
      ValueError: a prompt has no token or a lone surrogate; names it by its index.
    """
    sampling = model.defaults.sampling if sampling is None else sampling
    made = []
    for i, prompt in enumerate(prompts):
        try:
            ids = model.tokenizer.encode(prompt)
        except ValueError as error:
            raise ValueError(f"Prompt {i}: {error}") from error
        if not ids:
            raise ValueError(f"Prompt {i} is empty: there is nothing to continue.")
        limit = max_new_tokens
        if limit is None:
            limit = model.limit(len(ids), model.defaults.max_new_tokens)
        for sample in range(samples):
            drawn = dataclasses.replace(sampling, seed=sampling.seed + sample)
            made.append(Job(prompt, sample, Request(ids, limit, drawn, stop=stop)))
    return made


def run(engine: Engine, jobs: Sequence[Job]) -> Iterator[tuple[Job, Output]]:
    """Runs all jobs together; gives each in its order, as soon as all before it have ended.

    Raises:
      ValueError: a request is wrong, known before any runs; names the prompt by its first
        characters, and the field.
    """
    outputs: list[Output] = []
    try:
        for job in jobs:
            try:
                outputs.append(engine.submit(job.request))
            except ValueError as error:
                raise ValueError(f"Prompt {job.prompt[:40]!r}: {error}") from error
        for job, output in zip(jobs, outputs, strict=True):
            while output.finish_reason is None:
                engine.step()
            yield job, output
    finally:  # after an error, or when nobody wants the rest
        for output in outputs:
            if output.finish_reason is None:
                engine.cancel(output)


def write(
    engine: Engine, jobs: Sequence[Job], path: epath.PathLike, logprobs: bool = False
) -> None:
    """Runs all jobs and writes a JSON object a line, in their order; the file is whole or absent.

    A line has `prompt`, `sample`, `text`, `tokens` (their number), `finish_reason`, and, with
    `logprobs`, `token_ids` and `logprobs` of the text.

    Raises:
      OSError: the file cannot be written; known before any job runs.
      ValueError: as `run`.
    """
    path = epath.Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the file to write.")
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = 0
    try:
        with (
            temporary.open("w", encoding="utf-8") as file,
            Progress("generate", len(jobs), unit="texts") as progress,
        ):
            progress.update(0)
            for done, (job, output) in enumerate(run(engine, jobs), start=1):
                row = {
                    "prompt": job.prompt,
                    "sample": job.sample,
                    "text": output.text,
                    "tokens": len(output.tokens),
                    "finish_reason": output.finish_reason,
                }
                if logprobs:
                    row |= {"token_ids": output.tokens, "logprobs": output.logprobs}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                tokens += len(output.tokens)
                progress.update(done, tokens=tokens)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
