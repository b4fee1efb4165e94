"""Continuous batching: many requests of any length through one model, a few tokens at a time.

A fixed number of slots holds the running requests. Each visit of the scheduler (`Engine.step`)
takes queued requests into free slots, reads a chunk of a prompt into the cache, and then decodes a
few tokens of all slots in one compiled loop. Shapes never change, but for the length of the
cache, which grows and shrinks by steps, so few programs are compiled, and what happens in one
slot changes nothing in another.

A prompt is read but for its last token, which is the first one decoded: so there is one place
where tokens are drawn. The keys of a request stay in its slot after it ends, and whoever begins
with the same tokens takes them over (prefix reuse).

Legend: N slots, R prompts that are read at one time, C tokens of a chunk of them, I tokens
decoded in a visit, V vocabulary.
"""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_jax.config import BATCH_AXES, ModelConfig
from baichuan_jax.inference import cache as cache_module
from baichuan_jax.inference import programs
from baichuan_jax.inference.cache import NOWHERE
from baichuan_jax.inference.request import Output, Request
from baichuan_jax.inference.sampling import History, Sampling, Settings, begin
from baichuan_jax.inference.slot import Slot, common_length, pairs
from baichuan_jax.inference.text import TextStream
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.tokenizer import Tokenizer

_MIN_REUSE = 16  # a shorter common beginning is sooner read again than copied
_WIDE = 4  # prompts in each part of the batch that are read at one time where so many wait
_LOOK_AHEAD = 64  # queued requests that are considered at a visit
_SHRINK_AFTER = 16  # visits in a row that a shorter cache would have done


@dataclasses.dataclass
class Stats:
    """Counters of an engine's life; `prompt_tokens` include `cached_tokens`."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class Engine:
    """Runs requests through a model. Not thread-safe: one thread calls it.

    Args:
      model: as `inference.load.prepare` makes it: a tuple of layers, head folded.
      config: of the model.
      eos_id: the token that ends a text.
      tokenizer: needed for texts and stop strings only.
      slots: requests that run at one time; a multiple of the mesh's replica × fsdp.
      max_length: most tokens of a prompt and its output together.
      cache_dtype: of keys and values: a float dtype or int8; by default the model's.
      chunk: tokens of a prompt read at one time.
      tokens_per_visit: decoded between two looks at the queue.
      mesh: where the model lies; None: on the default device, without a mesh.
    """

    def __init__(
        self,
        model: Transformer,
        config: ModelConfig,
        *,
        eos_id: int,
        tokenizer: Tokenizer | None = None,
        slots: int = 8,
        max_length: int = 4_096,
        cache_dtype: jnp.dtype | None = None,
        chunk: int = 0,
        tokens_per_visit: int = 8,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self._mesh = mesh
        self._parts = 1 if mesh is None else int(np.prod([mesh.shape[a] for a in BATCH_AXES]))
        if slots < 1 or slots % self._parts:
            raise ValueError(
                f"slots={slots} must be a positive multiple of the mesh's replica × fsdp ="
                f" {self._parts}."
            )
        if max_length < 1 or tokens_per_visit < 1 or chunk < 0:
            raise ValueError(
                f"max_length={max_length} and tokens_per_visit={tokens_per_visit} must be"
                f" positive, chunk={chunk} not negative."
            )
        self.model, self.max_length = model, max_length
        self.vocab_size = config.vocab_size
        if tokenizer is not None:  # ids that mean nothing are neither read nor drawn
            self.vocab_size = min(self.vocab_size, tokenizer.vocab_size)
        self.num_slots, self.stats = slots, Stats()
        self._config, self._eos_id, self._tokenizer = config, eos_id, tokenizer
        self._on_cpu = jax.default_backend() == "cpu"
        self._chunk = min(chunk or (64 if self._on_cpu else 256), max_length)
        self._visit = tokens_per_visit
        self._lengths = _lengths(max_length)
        self._length, self._too_long = self._lengths[0], 0
        self._slots = [Slot(i, max_length) for i in range(slots)]
        self._queue: collections.deque[Output] = collections.deque()
        self._visits = 0
        with self._context():
            dtype = jnp.dtype(cache_dtype or model.embedding[...].dtype)
            self._cache = cache_module.create(config, slots, self._length, dtype)
            self._history = History.empty(slots, config.padded_vocab_size)

    @property
    def active(self) -> int:
        """Slots in use."""
        return sum(slot.output is not None for slot in self._slots)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._queue)

    @property
    def busy(self) -> bool:
        return bool(self._queue) or self.active > 0

    def submit(self, request: Request) -> Output:
        """Queues a request.

        Raises:
          ValueError: names the field, its value and what would be right.
        """
        request.check(self.vocab_size, self.max_length)
        if request.stop and self._tokenizer is None:
            raise ValueError(f"stop={request.stop} needs an engine with a tokenizer.")
        output = Output(request)
        if self._tokenizer is not None:
            output.stream = TextStream(self._tokenizer, request.stop, request.continues)
        self._queue.append(output)
        self.stats.requests += 1
        self.stats.prompt_tokens += len(request.prompt)
        return output

    def cancel(self, output: Output) -> None:
        """Ends a request now; nothing happens where it has ended already."""
        if output.finish_reason is not None:
            return
        if output in self._queue:
            self._queue.remove(output)
            output.finish_reason = "cancelled"
        for slot in self._slots:
            if slot.output is output:
                self._finish(slot, "cancelled")

    def forget(self) -> None:
        """Forgets the keys of ended requests, as one must when the model's weights change."""
        for slot in self._slots:
            if slot.output is None:
                slot.held = 0

    def generate(self, requests: Sequence[Request]) -> list[Output]:
        """Runs requests to their end, in whatever order, beside those that run already.

        Raises:
          ValueError: as `submit`; none of the requests runs on then, nor after Ctrl-C.
        """
        outputs: list[Output] = []
        try:
            outputs += map(self.submit, requests)
            while any(output.finish_reason is None for output in outputs):
                self.step()
        finally:
            for output in outputs:
                self.cancel(output)
        return outputs

    def step(self) -> list[Output]:
        """One visit: fill free slots, read a chunk of the prompts, decode a few tokens.

        Returns:
          The outputs that changed. Where others decode, at most as many chunks are read as they
          get tokens, which bounds how long they wait.
        """
        self._visits += 1
        with self._context():
            self._shrink()
            self._admit()
            changed = []
            for _ in range(self._visit):
                changed += self._read()
            changed += self._score_only()
            changed += self._decode()
        return list(dict.fromkeys(changed))

    def _context(self):
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    # Taking requests in.

    def _admit(self) -> None:
        """Gives free slots to queued requests, first come first served.

        A request whose beginning is just being read in another slot lets others go before it
        until it can take that over.
        """
        for output in list(itertools.islice(self._queue, _LOOK_AHEAD)):
            free = [slot for slot in self._slots if slot.output is None]
            if not free:
                return
            prompt = np.asarray(output.request.prompt, np.int32)
            useful = len(prompt) - 1
            if output.request.score_from is not None:
                useful = min(useful, max(0, output.request.score_from - 1))
            if not self._should_wait(prompt[:useful]):
                self._queue.remove(output)
                self._begin(output, prompt, *self._place(free, prompt[:useful]))

    def _should_wait(self, prompt: np.ndarray) -> bool:
        best = max(slot.common(prompt) for slot in self._slots)
        coming = [common_length(slot.prompt[:-1], prompt) for slot in self._slots if slot.reading]
        return max(coming, default=0) > best + max(self._chunk, _MIN_REUSE)

    def _place(self, free: list[Slot], prompt: np.ndarray) -> tuple[Slot, int]:
        """A slot for the prompt, and how many of its tokens are already there."""
        source = max(self._slots, key=lambda slot: slot.common(prompt))
        common = source.common(prompt)
        if common < _MIN_REUSE:
            return min(free, key=lambda slot: slot.last_used), 0
        if source in free:
            return source, common
        part = self._part(source)
        free = [slot for slot in free if self._part(slot) == part] or free
        target = min(free, key=lambda slot: slot.last_used)
        if self._part(target) != part:
            return target, 0
        sources, targets = (np.full(self._parts, n, np.int32) for n in (0, NOWHERE))
        sources[part], targets[part] = self._local(source), self._local(target)
        self._cache = cache_module.copy_slots(self._cache, sources, targets)
        return target, common

    def _begin(self, output: Output, prompt: np.ndarray, slot: Slot, cached: int) -> None:
        slot.output, slot.prompt, slot.last_used = output, prompt, self._visits
        slot.ids[:cached], slot.held = prompt[:cached], cached
        output.cached_tokens = cached
        self.stats.cached_tokens += cached
        sampling = output.request.sampling
        if sampling.changes_logits or slot.biased:
            in_prompt = np.zeros(self._config.padded_vocab_size, bool)
            in_prompt[prompt] = True
            bias = np.zeros(self._config.padded_vocab_size, np.float32)
            for token, value in sampling.logit_bias.items():
                bias[token] = value
            self._history = begin(self._history, np.int32(slot.index), in_prompt, bias)
            slot.biased = bool(sampling.logit_bias)

    def _finish(self, slot: Slot, reason: str) -> None:
        output = slot.output
        if output.stream is not None:
            output.stream.finish()
        output.finish_reason = reason
        slot.output = slot.prompt = None
        slot.last_used = self._visits

    # Reading prompts.

    def _read(self) -> list[Output]:
        """Reads one chunk of a prompt, or of several at one time where many wait."""
        reading: list[list[Slot]] = [[] for _ in range(self._parts)]
        for slot in sorted(self._slots, key=lambda slot: slot.last_used):
            if slot.reading:
                reading[self._part(slot)].append(slot)
        if not any(reading):
            return []
        self._grow()
        wide = max(map(len, reading)) >= _WIDE - 1
        rows = min(_WIDE if wide else 1, self.num_slots // self._parts)
        chosen = [slot for part in reading for slot in (part[:rows] + [None] * rows)[:rows]]
        tokens_RC = np.zeros((len(chosen), self._chunk), np.int32)
        targets_RC = np.zeros_like(tokens_RC)
        positions_RC = np.full_like(tokens_RC, NOWHERE)
        slots_R = np.zeros(len(chosen), np.int32)
        for row, slot in enumerate(chosen):
            if slot is not None:
                count = min(self._chunk, len(slot.prompt) - 1 - slot.held)
                piece = slot.prompt[slot.held : slot.held + count + 1]
                tokens_RC[row, :count], targets_RC[row, :count] = piece[:-1], piece[1:]
                positions_RC[row, :count] = np.arange(slot.held, slot.held + count)
                slots_R[row] = self._local(slot)
        running = [slot.output.request for slot in chosen if slot is not None]
        scores = any(request.score_from is not None for request in running)
        wants_top = any(request.top_logprobs for request in running)
        self._cache, scored = programs.read(
            self.model,
            self._cache,
            np.stack([tokens_RC, positions_RC, targets_RC]),
            slots_R,
            np.int32(self.vocab_size),
            np.bool(wants_top),
            score=scores,
        )
        scored = jax.device_get(scored)
        changed = []
        for row, slot in enumerate(chosen):
            if slot is None:
                continue
            count = int(np.sum(positions_RC[row] < NOWHERE))
            if slot.output.request.score_from is not None:
                slot.take_scores(count, *(x[row] for x in scored))
                changed.append(slot.output)
            slot.ids[slot.held : slot.held + count] = tokens_RC[row, :count]
            slot.held += count
        return changed

    def _score_only(self) -> list[Output]:
        """Ends requests that want no token and whose prompt is read."""
        done = [s for s in self._slots if s.decoding and s.output.request.max_new_tokens == 0]
        outputs = [slot.output for slot in done]
        for slot in done:
            self._finish(slot, "length")
        return outputs

    # Decoding.

    def _decode(self) -> list[Output]:
        """Decodes up to `tokens_per_visit` tokens of every slot whose prompt is read."""
        slots = [slot for slot in self._slots if slot.decoding]
        if not slots:
            return []
        self._grow()
        rows = self._rows(slots)
        table = np.zeros((5, len(rows)), np.int32)
        tokens_N, positions_N, remaining_N, numbers_N, stops_N = table
        positions_N[:] = NOWHERE
        for row, slot in enumerate(rows):
            if slot.decoding:
                output = slot.output
                tokens_N[row] = (output.tokens or slot.prompt)[-1]
                positions_N[row] = slot.held
                numbers_N[row] = len(output.tokens)
                remaining_N[row] = output.request.max_new_tokens - len(output.tokens)
                stops_N[row] = not output.request.ignore_eos
        greedy = Sampling()
        samplings = [slot.output.request.sampling if slot.output else greedy for slot in rows]
        everything = len(rows) == self.num_slots
        self._cache, self._history, new = programs.decode(
            self.model,
            self._cache,
            self._history,
            Settings.of(samplings),
            table,
            None if everything else np.array([slot.index for slot in rows], np.int32),
            np.int32(self._eos_id),
            np.int32(self.vocab_size),
            np.bool(any(slot.output.request.top_logprobs for slot in slots)),
            steps=self._visit,
        )
        new = jax.device_get(new)
        outputs = [slot.output for slot in slots]
        for row, slot in enumerate(rows):
            if slot.decoding:
                self._take_tokens(slot, *(x[:, row] for x in new))
        return outputs

    def _rows(self, slots: list[Slot]) -> list[Slot]:
        """The slots of the decoding batch: all of them, or on a CPU these and a few idle ones.

        There each row costs time. An accelerator waits for the weights whatever the rows, and
        one program for all is better.
        """
        size = self.num_slots
        if self._on_cpu and self._parts == 1:
            size = min(size, 1 << (len(slots) - 1).bit_length())
        if size == self.num_slots:
            return self._slots
        return (slots + [slot for slot in self._slots if not slot.decoding])[:size]

    def _take_tokens(self, slot: Slot, tokens_I, logprobs_I, top_ids, top_values) -> None:
        output, request = slot.output, slot.output.request
        for i, token in enumerate(tokens_I.tolist()):
            slot.ids[slot.held] = (output.tokens or slot.prompt)[-1]
            slot.held += 1
            if token == self._eos_id and not request.ignore_eos:
                return self._finish(slot, "stop")
            output.tokens.append(token)
            output.logprobs.append(float(logprobs_I[i]))
            output.top.append(pairs(request, top_ids[i], top_values[i]))
            self.stats.generated_tokens += 1
            if output.stream is not None:
                output.stream.add(token)
                if output.stream.stopped:
                    return self._finish(slot, "stop")
            if len(output.tokens) == request.max_new_tokens:
                return self._finish(slot, "length")

    # The cache.

    def try_longest(self) -> None:
        """Makes the cache as long as it can get, and short again.

        A server does so at its start: too little memory shows then, not with the first long text.
        """
        with self._context():
            self._set_length(self.max_length)
            self._set_length(self._fitting(max(slot.needs(self._visit) for slot in self._slots)))

    def _grow(self) -> None:
        """Makes the cache as long as the next visit needs."""
        needed = max(slot.needs(self._visit) for slot in self._slots)
        if needed > self._length:
            self._set_length(self._fitting(needed))

    def _shrink(self) -> None:
        """Makes the cache shorter when a shorter one would have done for a while."""
        length = self._fitting(max(slot.needs(self._visit) for slot in self._slots))
        self._too_long = self._too_long + 1 if length < self._length else 0
        if self._too_long > _SHRINK_AFTER:
            self._set_length(length)

    def _fitting(self, needed: int) -> int:
        return next((n for n in self._lengths if n >= needed), self.max_length)

    def _set_length(self, length: int) -> None:
        self._cache = cache_module.resize(self._cache, length)
        self._length, self._too_long = length, 0
        for slot in self._slots:
            slot.held = min(slot.held, length)

    def _part(self, slot: Slot) -> int:
        return slot.index // (self.num_slots // self._parts)

    def _local(self, slot: Slot) -> int:
        """The slot's number within its part of the batch."""
        return slot.index % (self.num_slots // self._parts)


def _lengths(max_length: int) -> list[int]:
    """Lengths that the cache may have: 128, 256, 512, … and the longest."""
    lengths, length = [], 128
    while length < max_length:
        lengths.append(length)
        length *= 2
    return [*lengths, max_length]
