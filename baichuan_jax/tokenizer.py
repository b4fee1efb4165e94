"""The tokenizer of §2.3: SentencePiece BPE, to train and to use.

`Tokenizer` reads any SentencePiece file, ours or the released Baichuan 2 one.
`train` makes a vocabulary by the paper's rules, `compression_rate` measures one
(Table 2).

V is the size of the vocabulary in the shapes below.
"""

import collections
import dataclasses
import functools
import hashlib
import heapq
import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece

# SentencePiece writes a space as U+2581, so it reads the character itself as a space.
_SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"

# The released file declares these as user-defined pieces, which would match user text.
_SPECIAL = re.compile(r"<reserved_\d+>|<SEP>|<CLS>")

# Newline is a piece of its own, so a line is all that training has to see at once. The trainer
# skips a whole sentence that holds U+2585, and takes U+2581 for a space.
_LINE_END = re.compile("[\n\N{LOWER FIVE EIGHTHS BLOCK}" + _SPACE_MARK + "]")
_MAX_LINE_BYTES = 4_096

_BATCH = 1_024  # documents encoded at one time by `compression_rate`


class Tokenizer:
    """Text to token ids and back.

    Special tokens (`<s>`, `</s>`, `<reserved_N>`, `<SEP>`, `<CLS>`) only ever come from code, by
    `special`: the same characters in a text are encoded as text. They decode to nothing.

    `decode(encode(text)) == text` for every text without lone surrogates, U+2581 included, if
    the file has byte fallback and neither normalises nor removes white space, as ours and both
    released ones.

    Attributes:
      fingerprint: SHA-256 of the file, in hexadecimal.
      vocab_size: V.
      unk_id, bos_id, eos_id: ids of `<unk>`, `<s>` and `</s>`.
      pad_id: id of the padding piece; `unk_id` where the file has none, as in Baichuan.
    """

    def __init__(self, path: epath.PathLike):
        """Reads a SentencePiece .model file, local or remote.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is not a SentencePiece model.
        """
        path = epath.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"Tokenizer {path} is not a file; give a SentencePiece .model.")
        data = path.read_bytes()
        self.fingerprint = hashlib.sha256(data).hexdigest()
        try:
            model = sentencepiece_model_pb2.ModelProto.FromString(data)
            if not model.pieces:
                raise ValueError("it has no pieces")
            for piece in model.pieces:
                if piece.type == _Piece.USER_DEFINED and _SPECIAL.fullmatch(piece.piece):
                    piece.type = _Piece.CONTROL
            self._processor = _processor(model)
        except Exception as error:  # protobuf and SentencePiece have no error in common
            raise ValueError(
                f"{path} ({len(data)} bytes) is not a SentencePiece model: {error}"
            ) from error
        self._special_ids = {
            piece.piece: i for i, piece in enumerate(model.pieces) if piece.type == _Piece.CONTROL
        }
        self.vocab_size = self._processor.vocab_size()
        self.unk_id = self._processor.unk_id()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        self.pad_id = max(self._processor.pad_id(), self.unk_id)
        self._space_mark_ids = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()
        ]
        self._continuation = self._processor
        if model.normalizer_spec.add_dummy_prefix:  # Baichuan 1
            model.normalizer_spec.add_dummy_prefix = False
            self._continuation = _processor(model)

    def special(self, name: str) -> int:
        """The id of a special token, for instance `<reserved_106>`.

        Raises:
          ValueError: the file has no special token of that name.
        """
        if name not in self._special_ids:
            names = list(self._special_ids)
            raise ValueError(
                f"The tokenizer has no special token {name!r}; it has {len(names)}:"
                f" {', '.join(names[:4])}, ... {names[-1]}."
            )
        return self._special_ids[name]

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [V]: the UTF-8 bytes that each id decodes to; 0 for special tokens and `<unk>`.

        Their sum over `encode(text)` is the length of the text in UTF-8 (one more where the
        file adds a dummy prefix, as Baichuan 1), which turns nats per token into bits per byte.
        """
        lengths_V = np.array([len(self.id_bytes(i)) for i in range(self.vocab_size)], np.int32)
        lengths_V[self.unk_id] = 0
        return lengths_V

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special token is added or found in it.

        Raises:
          ValueError: the text has a lone surrogate, which is no character.
        """
        _refuse_surrogates(text, "The text")
        first, *rest = text.split(_SPACE_MARK)
        ids = self._processor.encode(first)
        for part in rest:
            ids += self._space_mark_ids + self._continuation.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, by as many threads as there are cores.

        Raises:
          ValueError: a text has a lone surrogate; names the text by its index.
        """
        for i, text in enumerate(texts):
            _refuse_surrogates(text, f"Text {i} of the batch")
        ids = self._processor.encode(list(texts), num_threads=-1)
        return [
            self.encode(text) if _SPACE_MARK in text else row
            for text, row in zip(texts, ids, strict=True)
        ]

    def decode(self, ids: Iterable[int], continues: bool = False) -> str:
        """The text of token ids.

        Special tokens give nothing, `<unk>` gives ' ⁇ ', each byte that is not part of a UTF-8
        character gives U+FFFD.

        Args:
          continues: the text goes on from another one. Then its first space is kept, which is
            the dummy prefix of a text of its own where the file adds one (Baichuan 1).

        Raises:
          ValueError: an id is not in the vocabulary.
        """
        ids = [self._checked(i, f" at position {position}") for position, i in enumerate(ids)]
        return (self._continuation if continues else self._processor).decode(ids)

    def id_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for inside a text; b'' for special tokens.

        Raises:
          ValueError: the id is not in the vocabulary.
        """
        id = self._checked(id)
        piece = self._processor.id_to_piece(id)
        if self._processor.is_byte(id):
            return bytes.fromhex(piece[3:5])  # <0xE4>
        if self._processor.is_control(id) or self._processor.is_unknown(id):
            return self._processor.decode([id]).encode()
        return piece.replace(_SPACE_MARK, " ").encode()

    def _checked(self, id: int, where: str = "") -> int:
        if not 0 <= id < self.vocab_size:
            raise ValueError(
                f"Id {id}{where} is not in the vocabulary: ids are 0 to {self.vocab_size - 1}."
            )
        return int(id)  # it may be NumPy's


@dataclasses.dataclass
class SourceCount:
    """What `train` read of one source, and what it used."""

    documents: int = 0
    bytes: int = 0  # UTF-8
    cut_lines: int = 0  # lines longer than 4,096 bytes: no piece is learned across the cuts
    used_bytes: int = 0  # after weighting and sampling


def train(
    documents: Iterable[tuple[str, str]],
    path: epath.PathLike,
    *,
    vocab_size: int,
    weights: Mapping[str, float] | None = None,
    reserved_tokens: int = 128,
    max_bytes: int = 2**28,
) -> dict[str, SourceCount]:
    """Trains a vocabulary by the rules of §2.3 and writes it as a SentencePiece .model file.

    BPE with byte fallback; single digits; no normalisation, dummy prefix or removal of white
    space; pieces of white space alone; character coverage 0.9999; pieces of up to 32
    characters. Ids are, in this order: `<unk>`, `<s>`, `</s>`, `<reserved_0>`, ..., newline,
    tab, 256 bytes, merges, characters. The same documents give the same file, byte for byte.

    Args:
      documents: (text, source) pairs, read once.
      path: the file to write, all at once when training has ended.
      vocab_size: number of ids, all of the above included.
      weights: how often each line of a source counts (the paper up-samples code and papers);
        1 for a source without a weight, and 0.5 for half of its lines, always the same ones.
      reserved_tokens: how many `<reserved_N>`; the chat format of Baichuan 2 uses 106 and 107.
      max_bytes: a larger corpus (after weighting) is sampled line by line, uniformly and always
        alike, down to this size. SentencePiece needs about 30 bytes of memory for each.

    Returns:
      What was read and used of each source.

    Raises:
      ValueError: the corpus is empty, too small or too varied for the vocabulary; a weight is
        negative or names no source; a document has a lone surrogate.
      OSError: `path` cannot be written; known before the first document is read.
    """
    path = epath.Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the file to write.")
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(b"")  # an unwritable folder shows here, not after hours of training
    try:
        lines, counts = _sample(documents, dict(weights or {}), max_bytes)
        temporary.write_bytes(_train_model(lines, vocab_size, reserved_tokens))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return counts


def _sample(
    documents: Iterable[tuple[str, str]], weights: dict[str, float], max_bytes: int
) -> tuple[list[str], dict[str, SourceCount]]:
    for source, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"Weight {source}={weight} must be 0 or more.")
    counts: dict[str, SourceCount] = collections.defaultdict(SourceCount)
    # The lines of lowest priority are a uniform sample, whatever periods the corpus has.
    sample: list[tuple[float, int, str, str]] = []  # a heap, highest priority first
    sample_bytes, numbers = 0, itertools.count()
    for text, source in documents:
        count = counts[source]
        _refuse_surrogates(text, f"Document {count.documents} of source {source!r}")
        count.documents += 1
        count.bytes += len(text.encode())
        whole, fraction = divmod(weights.get(source, 1.0), 1.0)
        for line in _LINE_END.split(text):
            parts = list(_cut(line))
            count.cut_lines += len(parts) > 1
            for part in filter(None, parts):
                number = next(numbers)
                copies = int(whole) + (fraction > 0 and _uniform(number, "weight") < fraction)
                for copy in range(copies):
                    heapq.heappush(sample, (-_uniform(number, copy), number, part, source))
                sample_bytes += copies * len(part.encode())
                while sample_bytes > max_bytes:
                    sample_bytes -= len(heapq.heappop(sample)[2].encode())
    if unknown := weights.keys() - counts.keys():
        raise ValueError(
            f"Weights name unknown sources {sorted(unknown)}; the corpus has {sorted(counts)}."
        )
    if not sample:
        raise ValueError(
            f"There is no text to train on in sources {sorted(counts)} with weights {weights} and"
            f" max_bytes={max_bytes}."
        )
    for _, _, line, source in sample:
        counts[source].used_bytes += len(line.encode())
    return [line for _, _, line, _ in sorted(sample, key=lambda entry: entry[1])], dict(counts)


def _uniform(*key: object) -> float:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _cut(line: str) -> Iterator[str]:
    data, start = line.encode(), 0
    while len(data) - start > _MAX_LINE_BYTES:
        end = data.rfind(b" ", start + 1, start + _MAX_LINE_BYTES)
        if end < 0:
            end = start + _MAX_LINE_BYTES
            while data[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
        yield data[start:end].decode()
        start = end
    yield data[start:].decode()


def _train_model(lines: Iterable[str], vocab_size: int, reserved_tokens: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9999,
            max_sentencepiece_length=32,
            max_sentence_length=_MAX_LINE_BYTES,
            control_symbols=[f"<reserved_{i}>" for i in range(reserved_tokens)],
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            train_extremely_large_corpus=True,
            minloglevel=2,  # it logs its whole configuration otherwise
        )
    except RuntimeError as error:
        if found := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", str(error)):
            raise ValueError(
                f"vocab_size={vocab_size} is too large for this corpus, which has merges for"
                f" {found[1]}: give more text or a smaller vocab_size."
            ) from error
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise ValueError(
                f"vocab_size={vocab_size} is too small: the reserved tokens, the bytes and the"
                f" characters of this corpus alone are {found[1]}."
            ) from error
        raise
    return model.getvalue()


@dataclasses.dataclass
class Compression:
    """How many tokens a text became."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0  # Unicode code points
    bytes: int = 0  # UTF-8

    @property
    def tokens_per_character(self) -> float:
        """The unit of Table 2, as far as can be told; lower is better.

        The paper does not state it. Tokens per byte cannot exceed 1 with byte fallback, and
        LLaMA 2 has 1.037 there.
        """
        return self.tokens / max(self.characters, 1)

    @property
    def tokens_per_byte(self) -> float:
        """Fair between languages: a Chinese character has three bytes, an English one."""
        return self.tokens / max(self.bytes, 1)


def compression_rate(
    tokenizer: Tokenizer, documents: Iterable[tuple[str, str]]
) -> dict[str, Compression]:
    """Table 2: what a tokenizer makes of (text, language) pairs, by language and, last, 'all'.

    Raises:
      ValueError: there is no document, or one has a lone surrogate.
    """
    rates: dict[str, Compression] = collections.defaultdict(Compression)
    total = Compression()
    documents = iter(documents)
    while batch := list(itertools.islice(documents, _BATCH)):
        rows = tokenizer.encode_batch([text for text, _ in batch])
        for (text, language), ids in zip(batch, rows, strict=True):
            for rate in (rates[language], total):
                rate.documents += 1
                rate.tokens += len(ids)
                rate.characters += len(text)
                rate.bytes += len(text.encode())
    if not rates:
        raise ValueError("There is no document to measure the compression rate on.")
    return {**rates, "all": total}


def _processor(
    model: sentencepiece_model_pb2.ModelProto,
) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def _refuse_surrogates(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has a lone surrogate, {text[error.start]!r}, at position {error.start}: it"
            " is not valid Unicode."
        ) from error
