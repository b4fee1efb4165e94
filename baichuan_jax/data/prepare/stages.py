"""The list of the stages, in the paper's order, and how each is run."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging
from etils import epath

from baichuan_jax import tokenizer
from baichuan_jax.data import packing, sources
from baichuan_jax.data.prepare import (
    clean,
    decontaminate,
    documents,
    exact,
    ingest,
    language,
    linear_training,
    local,
    mixture,
    perplexity,
    privacy,
    quality,
    safety,
    semantic,
    sentences,
    spans,
    tokens,
)
from baichuan_jax.data.prepare.config import OPTIONAL, PrepareConfig
from baichuan_jax.data.prepare.corpus import Corpus, whole
from baichuan_jax.data.prepare.engine import Engine

VERSION = 1  # of the stages: raised when one of them comes to give other results
LoadModel = Callable[[str], Any]  # a run's folder -> a `LanguageModel`
Report = dict[str, Any]
_READING = ("text_field", "language_field", "tfds_data_dir")  # of examples, as of the corpus


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of the pipeline.

    Attributes:
      settings: all that decides its result, beside the stages before it; JSON can hold it.
      run: (the corpus before it, an engine) -> what the report tells of it.
    """

    name: str
    settings: Any
    run: Callable[[Corpus, Engine], Report]

    @property
    def attributes(self) -> bool:
        """Whether what it makes is attributes of documents."""
        return self.name not in ("ingest", "pack")

    @property
    def folder(self) -> str:
        """Of what it makes, inside the working folder."""
        return {"ingest": "documents", "pack": "shards"}.get(self.name, f"attributes/{self.name}")


def stages(
    config: PrepareConfig, workdir: epath.Path, load_model: LoadModel | None = None
) -> list[Stage]:
    """The stages that this config asks for, in their order.

    A stage that has nothing to go by (no evaluation set, no examples, no model) is left out, as
    those of `config.skip` are.

    Args:
      workdir: of the pipeline.
      load_model: (a run's folder) -> its `LanguageModel`.

    Raises:
      ValueError: names a field that is wrong, or a file that it names and that is not there.
    """
    _check(config)
    skip = {name.strip() for name in config.skip.split(",")}
    found: list[Stage] = []

    def add(name: str, settings: Any, run: Callable[[Corpus, Engine], Report]) -> None:
        if name not in skip:
            found.append(Stage(name, settings, run))

    def of_documents(name: str, function: local.Local, *more: Any) -> None:
        settings = getattr(config, name)
        function = functools.partial(function, config=settings)
        run = functools.partial(local.run, function)
        add(name, [settings, *more], lambda corpus, engine: run(corpus, name, engine))

    def of_the_corpus(name: str, module: Any, *more: Any) -> None:
        settings = getattr(config, name)
        add(
            name,
            [settings, *more],
            lambda corpus, engine: module.run(corpus, name, engine, settings),
        )

    read = functools.partial(_ingest, config)
    reading = [config.ingest.options, config.ingest.shard_bytes]  # not how many rows may be bad
    files = sources.stamp(config.sources, config.ingest.tfds_data_dir)
    add("ingest", [VERSION, config.sources, files, reading], read)
    of_documents("language", language.language)
    of_the_corpus("exact", exact)
    of_documents("clean", clean.clean)
    of_documents("privacy", privacy.mask)
    of_documents("sentences", sentences.sentences, stamp(config.sentences.classifier))
    of_the_corpus("spans", spans)
    of_the_corpus("documents", documents)
    if config.decontaminate.against:
        content = decontaminate.fingerprint(config.decontaminate)
        of_the_corpus("decontaminate", decontaminate, content)
    examples = [config.safety.unsafe, config.safety.safe]
    files = [_stamp(examples, config), stamp(config.safety.lists), stamp(config.safety.classifier)]
    unraised = dataclasses.replace(config.safety, positive="")  # that is for the mix
    settings = [unraised, files, config.seed]
    add("safety", settings, functools.partial(_safety, config, workdir))
    embedding = functools.partial(_clusters, config, load_model)
    add("clusters", [config.clusters, stamp(config.embedding_model), config.seed], embedding)
    examples = [config.quality.positive, config.quality.negative]
    if any(examples) or config.quality.classifier:
        files = [_stamp(examples, config), stamp(config.quality.classifier)]
        settings = [config.quality, files, config.seed]
        add("quality", settings, functools.partial(_quality, config, workdir))
    if config.perplexity_model:
        scoring = functools.partial(_perplexity, config, load_model)
        add("perplexity", [config.perplexity, stamp(config.perplexity_model)], scoring)
    # Before the mixture, so that other weights do not tokenise again.
    trained = [config.vocab_size, config.tokens.eval_fraction]
    settings = stamp(config.tokenizer) if config.tokenizer else trained
    add("tokens", settings, functools.partial(_tokens, config, workdir))
    drawing = functools.partial(_mixture, config)
    add("mixture", [config.mixture, config.seed], drawing)
    settings = [config.tokens, config.mixture, config.safety.positive]
    add("pack", settings, functools.partial(_pack, config, workdir))
    return found


def _stamp(examples: list[str], config: PrepareConfig) -> list[str]:
    return [sources.stamp(given, config.ingest.tfds_data_dir) for given in examples if given]


def stamp(given: str) -> list[tuple[str, int, float]]:
    """Paths, sizes and times of the files that a field names: `NAME=PATH,…` or `PATH,…`."""
    files = []
    for part in sources.split(given):
        path = epath.Path(part.partition("=")[2] or part).expanduser()
        if path.is_dir():
            files += [folder / name for folder, _, names in path.walk() for name in names]
        elif path.exists():
            files.append(path)
        else:  # a pattern, or what is not there, which its stage will say
            files += path.parent.glob(path.name) if path.parent.is_dir() else []
    stats = [(str(file), file.stat()) for file in sorted(files)]
    return [(file, stat.length, stat.mtime) for file, stat in stats]


def _check(config: PrepareConfig) -> None:
    for name in sources.split(config.skip):
        if name not in OPTIONAL:
            raise ValueError(f"config.skip: {name!r} is none of {', '.join(OPTIONAL)}.")
    if not sources.split(config.sources):
        raise ValueError("No text is named: set config.sources=NAME=PATH,…")
    names = {origin.source for origin in sources.origins(config.sources)}  # each is there
    if "" not in names:  # that of the embedded corpus, which has several
        safety.factors(config.safety.positive, sorted(names))
        mixture.check_sources(config.mixture, sorted(names))
    if not 0 < config.max_source_loss <= 1:
        raise ValueError(f"config.max_source_loss={config.max_source_loss} must be in (0, 1].")
    for settings in vars(config).values():
        if hasattr(settings, "check"):
            settings.check()
    for name in ("embedding_model", "perplexity_model"):
        folder = getattr(config, name)
        if folder and not (epath.Path(folder).expanduser() / "config.json").exists():
            raise ValueError(f"config.{name}={folder} is no folder of a run.")
    examples = [config.safety.unsafe, config.safety.safe]
    for given in (*examples, config.quality.positive, config.quality.negative):
        sources.origins(given)
    if config.tokenizer:
        tokenizer.Tokenizer(epath.Path(config.tokenizer).expanduser())


def _ingest(config: PrepareConfig, corpus: Corpus, engine: Engine) -> Report:
    told = ingest.run(
        *(corpus.directory, config.sources, config.ingest, engine),
        max_source_loss=config.max_source_loss,
    )
    if told["bad_rows"]:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in told["reasons"].items())
        logging.warning(
            "%s rows were rejected (%s): rejects.jsonl", f"{told['bad_rows']:,}", reasons
        )
    return told


def _safety(config: PrepareConfig, workdir: epath.Path, corpus: Corpus, engine: Engine) -> Report:
    settings = config.safety
    given = (settings.unsafe, settings.safe, settings.classifier)
    file, told = _classifier("safety", ("unsafe", "safe", "classifier"), given, workdir, config)
    terms = safety.read_terms(settings)
    function = functools.partial(safety.score, config=settings, terms=terms, classifier=file)
    return told | local.run(function, corpus, "safety", engine)


def _quality(config: PrepareConfig, workdir: epath.Path, corpus: Corpus, engine: Engine) -> Report:
    settings = config.quality
    given = (settings.positive, settings.negative, settings.classifier)
    names = ("positive", "negative", "classifier")
    file, told = _classifier("quality", names, given, workdir, config)
    function = functools.partial(quality.score, config=settings, classifier=file)
    return told | local.run(function, corpus, "quality", engine)


def _classifier(
    stage: str,
    names: tuple[str, str, str],
    given: tuple[str, str, str],
    workdir: epath.Path,
    config: PrepareConfig,
) -> tuple[str, Report]:
    """The file of a stage's classifier, trained if need be; '' if it has none."""
    reading = {name: getattr(config.ingest, name) for name in _READING}
    fields = tuple(f"config.{stage}.{name}" for name in names)
    # The safety lists take traditional Han for simplified, too, and both read the same tokens.
    simplify = stage == "safety"
    model, told = linear_training.fit(
        *given, fields=fields, simplify=simplify, seed=config.seed, **reading
    )
    if model is None:
        return "", told
    file = workdir / "models" / f"{stage}.npz"
    model.save(file)
    return str(file), told


def _clusters(
    config: PrepareConfig, load_model: LoadModel | None, corpus: Corpus, engine: Engine
) -> Report:
    model = load_model(config.embedding_model) if config.embedding_model else None
    return semantic.run(
        *(corpus, "clusters", engine, config.clusters), seed=config.seed, model=model
    )


def _perplexity(
    config: PrepareConfig, load_model: LoadModel, corpus: Corpus, engine: Engine
) -> Report:
    model = load_model(config.perplexity_model)
    return perplexity.run(corpus, "perplexity", model, config.perplexity)


def _tokens(config: PrepareConfig, workdir: epath.Path, corpus: Corpus, engine: Engine) -> Report:
    file = workdir / "tokenizer.model"
    if config.tokenizer:
        with whole(file) as partial:
            partial.write_bytes(epath.Path(config.tokenizer).expanduser().read_bytes())
    else:
        logging.info("A tokenizer of %s tokens is trained.", f"{config.vocab_size:,}")
        try:
            with whole(file) as partial:
                tokenizer.train(_texts(corpus, config), partial, vocab_size=config.vocab_size)
        except ValueError as error:
            raise ValueError(f"config.vocab_size={config.vocab_size}: {error}") from None
    return tokens.run(corpus, "tokens", engine, file)


def _texts(corpus: Corpus, config: PrepareConfig) -> Iterator[tuple[str, str]]:
    """The kept documents that will not be held out, and their sources."""
    for shard in range(corpus.num_shards()):
        found = corpus.read(shard, "text", "source")
        for text, source in zip(found["text"], found["source"], strict=True):
            text = text.as_py()
            if not packing.held_out(packing.text_hash(text), config.tokens.eval_fraction):
                yield text, source.as_py()


def _mixture(config: PrepareConfig, corpus: Corpus, engine: Engine) -> Report:
    return mixture.run(corpus, "mixture", engine, config.mixture, config.seed)


def _pack(config: PrepareConfig, workdir: epath.Path, corpus: Corpus, engine: Engine) -> Report:
    known = tokenizer.Tokenizer(workdir / "tokenizer.model")
    return tokens.pack(
        *(corpus, workdir / "shards", engine, config.tokens, config.mixture, known),
        factors=safety.factors(config.safety.positive),
    )
