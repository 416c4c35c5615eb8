"""Builds the token stores, the tokenizer and the labels of a run, unless they are in `data.cache` already."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from opt_parallel.config.data import BadRecordsPolicy, DataConfig, SourceConfig
from opt_parallel.config.model import Labels, ProblemType, require
from opt_parallel.config.run import Run
from opt_parallel.config.task import TaskConfig
from opt_parallel.data.encode.chat import chat_template
from opt_parallel.data.encode.classify import check_label, find_labels
from opt_parallel.data.encode.numbering import numbering_of, prove
from opt_parallel.data.encode.pretrain import TextEncoder
from opt_parallel.data.encode.tokenizer import check_padding, check_tokenizer, load_tokenizer, of_opt, train_tokenizer
from opt_parallel.data.kinds import KINDS
from opt_parallel.data.store.build import fill
from opt_parallel.data.store.cache import build_once, build_together, cached, fingerprint
from opt_parallel.data.store.recipe import Recipe
from opt_parallel.data.store.sameness import content_of
from opt_parallel.data.store.selection import HeldOut
from opt_parallel.data.store.statistics import finish_store, line_of
from opt_parallel.data.store.store import TokenStore
from opt_parallel.data.text.python_text import python_documents, split, write_split
from opt_parallel.data.text.records import LEFT_OUT, BadRecord, BadRecords, Record, sift
from opt_parallel.data.text.sources import Corpus
from opt_parallel.huggingface.tokenizer import LoadedTokenizer, other_ids, read_tokenizer, write_tokenizer
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import say
from opt_parallel.storage.claims import Claims

LABELS = "labels.json"
SAMPLED, LONGEST_SAMPLE = 64, 4096  # documents of a corpus that show that its ids are translated, and their length
TOKENIZER_BYTES = 10**9  # maximum bytes of text that a tokenizer is trained on


@dataclass(frozen=True)
class PreparedSource:
    """A source of the training data and its token store.

    Checkpoints refer to the source's text by one of the identifiers `known_as`. The first identifier depends on the
    content of the text, and the second depends on its files, as in earlier versions. `stream` describes how a streamed
    source is encoded, and is None for other sources."""

    name: str
    weight: Fraction
    store: Path
    known_as: tuple[str, ...]
    stream: Recipe | None = None


@dataclass(frozen=True)
class Prepared:
    """The token stores of a run, the folder of its tokenizer, and the labels of a classifier.

    transformers can load the tokenizer from its folder."""

    train: list[PreparedSource]
    validation: Path | None
    tokenizer: Path
    labels: Labels | None = None

    @property
    def text(self) -> dict[str, str]:
        """An identifier of each source's text and of its encoding to tokens, by the source's name."""
        return {source.name: source.known_as[0] for source in self.train}


def corpora(data: DataConfig) -> list[Corpus]:
    """The corpora for training, followed by the corpora for validation. Raises: `UserError`."""
    sources = [("data.train", source) for source in data.train_sources]
    sources += [("data.validation", source) for source in data.validation_sources]
    return [_corpus(data, key, source) for key, source in sources]


def prepare(run: Run, tokenizer_before: Path | None = None) -> Prepared:
    """Build the missing token stores of `run`. The token stores of streams are filled later, during training.

    `tokenizer_before` is the tokenizer of the checkpoint that the run resumes from. This tokenizer is used if the run
    does not name a tokenizer. Raises: `UserError`, the same on every rank."""
    require(bool(run.data.train_sources), "data.train is not set: name a file, a folder, a glob or a hub id")
    train = [_known(run.data, "data.train", source) for source in run.data.train_sources]
    validation = [_known(run.data, "data.validation", source) for source in run.data.validation_sources]
    shared = {path for corpus in train for path in corpus.files} & {path for each in validation for path in each.files}
    if shared:
        say(f"note: {min(shared)} is in both data.train and data.validation, which flatters the validation loss")
    _report_left_out([*train, *validation])
    folder = prepare_tokenizer(run, train, tokenizer_before)
    loaded = read_tokenizer(str(folder))
    train = [_numbered(run, *pair, loaded) for pair in zip(run.data.train_sources, train, strict=True)]
    validation = [_numbered(run, *pair, loaded) for pair in zip(run.data.validation_sources, validation, strict=True)]
    tokenizer, labels = loaded.tokenizer, prepare_labels(run.task, run.data, train)
    stores = []
    for source, corpus in zip(run.data.train_sources, train, strict=True):
        recipe, weight = _recipe(run, corpus, tokenizer, labels, chosen=False), Fraction(source.weight)
        keys = (recipe.cache_key(), recipe.identity())
        if source.stream:
            known_as = tuple(f"stream-{fingerprint(each)}" for each in keys)
            stores.append(
                PreparedSource(source.name, weight, cached(run.data.cache, "stream", *keys), known_as, recipe)
            )
        else:
            known_as = tuple(f"store-{fingerprint([each])}" for each in keys)
            store = prepare_store(run.data, "data.train", [recipe], tokenizer)
            stores.append(PreparedSource(source.name, weight, store, known_as))
    validation_text = train if run.holds_out else validation
    held_out = [_recipe(run, corpus, tokenizer, labels, chosen=True) for corpus in validation_text]
    key = "data.held_out" if run.holds_out else "data.validation"
    return Prepared(
        train=stores,
        validation=prepare_store(run.data, key, held_out, tokenizer) if held_out else None,
        tokenizer=folder,
        labels=labels,
    )


def prepare_validation(run: Run) -> Prepared:
    """Build only the token store of `data.validation`, for evaluation without training.

    Raises: `UserError`, the same on every rank."""
    require(bool(run.data.validation_sources), "data.validation is not set: name a file, a folder, a glob or a hub id")
    corpora = [_known(run.data, "data.validation", source) for source in run.data.validation_sources]
    _report_left_out(corpora)
    folder = prepare_tokenizer(run, corpora)
    loaded = read_tokenizer(str(folder))
    corpora = [_numbered(run, *pair, loaded) for pair in zip(run.data.validation_sources, corpora, strict=True)]
    tokenizer, labels = loaded.tokenizer, prepare_labels(run.task, run.data, corpora)
    recipes = [_recipe(run, corpus, tokenizer, labels, chosen=True) for corpus in corpora]
    return Prepared([], prepare_store(run.data, "data.validation", recipes, tokenizer), folder, labels)


def _recipe(run: Run, corpus: Corpus, tokenizer: Tokenizer, labels: Labels | None, chosen: bool) -> Recipe:
    """How to encode a corpus. If `chosen`, only the documents held out for validation are encoded."""
    held_out = HeldOut(run.seed, run.data.held_out, chosen) if run.holds_out else None
    same = corpus.text if run.task.name.plain_text else None
    encoder = KINDS[run.task.name].encoder(run, tokenizer, corpus.text, labels)
    if isinstance(encoder, TextEncoder):
        encoder.table = corpus.ids.table
    return Recipe(corpus, encoder, same, held_out, run.data.deduplicate)


def _numbered(run: Run, source: SourceConfig, corpus: Corpus, ours: LoadedTokenizer) -> Corpus:
    """The corpus with the id that ends its documents and, if `ids_of` is set, the table that maps its ids to those of
    `data.tokenizer`.

    Raises: UserError, also if the task does not read token ids."""
    end = run.model.eos_token_id
    require(
        run.task.name.plain_text or not (corpus.has_ids or source.ids_of),
        f"{corpus.key}: {corpus.names} has token ids, which task={run.task.name.value} does not read: name records "
        "with text, or set task=pretrain",
    )
    require(
        not (corpus.has_ids and corpus.text.template),
        f"{corpus.key}: {corpus.names} has token ids, and data.template={corpus.text.template!r} needs text: set "
        "data.template=null",
    )
    if source.ids_of is None:
        return replace(corpus, ids=replace(corpus.ids, end=end))
    numbering = numbering_of(source.ids_of, read_tokenizer(source.ids_of, "data.ids_of="), ours, end)
    corpus = replace(corpus, ids=replace(corpus.ids, end=numbering.end))
    records = islice((item for _, item in corpus.streamed()), SAMPLED) if source.stream else corpus.spread(SAMPLED)
    given = [corpus.text.ids_of(record) for record in records if isinstance(record, Record)]
    some = [ids[:LONGEST_SAMPLE] for ids in given if ids is not None]
    if not some:
        return corpus  # a source of text
    compared = prove(numbering, ours.tokenizer, some, f"{corpus.key}: {corpus.names}")
    say(
        f"{corpus.key}: ids of {source.ids_of} are translated to those of data.tokenizer; of {compared:,} documents, "
        "both tokenizers decode the same text and encode it to the same tokens"
    )
    return replace(corpus, ids=replace(corpus.ids, table=numbering.table))


def prepare_labels(task: TaskConfig, data: DataConfig, corpora: list[Corpus]) -> Labels | None:
    """The labels of a classifier, or None for other tasks. Without `task.labels`, names are read from `corpora`."""
    if not task.name.classifies:
        return None
    if task.labels is not None and task.problem_type is not None:
        return Labels(tuple(task.labels), task.problem_type)

    def fill_in(folder: Path) -> None:
        declared = [name for corpus in corpora for name in corpus.class_names(task.label_field)]
        items, bad = (item for corpus in corpora for item in corpus.items()), BadRecords()
        try:
            found = find_labels(task, sift(items, lambda record: check_label(record, task.label_field), bad), declared)
        except UserError as error:
            if not bad.count or data.bad_records is BadRecordsPolicy.error:
                raise (bad.refusal() if bad.count else error) from error
            raise UserError(f"{error}; {bad.count:,} of {bad.seen:,} records are bad: {bad.first[0]}") from error
        if bad.count and data.bad_records is BadRecordsPolicy.error:
            raise bad.refusal()
        assert found.problem_type is not None
        content = {"names": found.names, "problem_type": found.problem_type.value}
        (folder / LABELS).write_text(json.dumps(content), encoding="utf-8")

    asked = [task.label_field, task.labels and list(task.labels), task.problem_type and task.problem_type.value]
    asked += ["named classes"] if any(corpus.has_class_columns for corpus in corpora) else []
    asked += [LEFT_OUT] if data.bad_records is BadRecordsPolicy.skip else []
    cache_key = [corpus.cache_key() for corpus in corpora]
    former_key = [corpus.identity() for corpus in corpora]
    folder = build_once(cached(data.cache, "labels", [cache_key, asked], [former_key, asked]), fill_in)
    try:
        found = json.loads((folder / LABELS).read_text(encoding="utf-8"))
        return Labels(tuple(map(str, found["names"])), ProblemType(found["problem_type"]))
    except (OSError, ValueError, KeyError, TypeError) as error:  # files of earlier versions have no checksum
        raise UserError(
            f"{folder / LABELS} cannot be read ({error}): remove {folder}, and the next start builds it again"
        ) from error


def _report_left_out(corpora: list[Corpus]) -> None:
    for corpus in corpora:
        if corpus.left_out:
            say(f"note: {corpus.key}: some files were found but not read: {corpus.left_out}")


def _corpus(data: DataConfig, key: str, source: SourceConfig) -> Corpus:
    paths = _with_python_text(data.cache, list(source.path))
    skip = data.bad_records is BadRecordsPolicy.skip
    text = (source.text_field, source.template)
    return Corpus.find(key, paths, *text, source.subset, source.split, skip, source.dtype)


def _known(data: DataConfig, key: str, source: SourceConfig) -> Corpus:
    """The corpus of a source, with checksums of its content."""
    corpus = _corpus(data, key, source)
    return replace(corpus, content=content_of(data.cache, corpus, source.stream))


def _with_python_text(cache: str, entries: list[str]) -> list[str]:
    """Replace the entries `python:train` and `python:validation` by files with the documentation of this Python."""
    if not {"python:train", "python:validation"} & set(entries):
        return entries

    def fill_in(folder: Path) -> None:
        train, validation, _ = split(python_documents())
        write_split(folder, train, validation)

    folder = build_once(cached(cache, "python-text", [sys.version]), fill_in)
    return [str(folder / f"{entry[7:]}.jsonl") if entry.startswith("python:") else entry for entry in entries]


def prepare_tokenizer(run: Run, train: list[Corpus], before: Path | None = None) -> Path:
    """The folder with the run's tokenizer.

    The folder contains a copy of the tokenizer that `run` names, or else of the resumed checkpoint's tokenizer
    `before`, or else a tokenizer trained on `train`. If the training data starts with a chat, the tokenizer gets this
    package's chat template."""
    name = run.data.tokenizer or (str(before) if before else None)
    if name is not None:
        brought = read_tokenizer(name)
        check_tokenizer(brought.tokenizer, name, run.model, brought.ids.get("eos_token_id"))
        check_padding(brought.tokenizer, run.model)
        brought = brought.of_model(run.model)
        if run.task.name.has_chats and any(map(partial(_begins_with_chat, run.task), train)):
            template = chat_template(brought.tokenizer, run.model.eos_token_id)
            if brought.chat_template not in (None, template):
                say(f"warning: the chat template of data.tokenizer={name} is not used: chats are written as documented "
                    "in docs/finetuning.md, and the run's tokenizer gets that template")  # fmt: skip
            brought = replace(brought, chat_template=template)
        return build_once(
            cached(run.data.cache, "tokenizer", brought.identity()), lambda folder: write_tokenizer(brought, folder)
        )
    for corpus in train:
        require(
            not corpus.has_ids,
            f"data.tokenizer=null: {corpus.names} has token ids: set data.tokenizer to the tokenizer of these ids",
        )
    require(
        run.task.name.plain_text,
        f"task={run.task.name.value} needs a tokenizer: start from a checkpoint, init_from=…, or set data.tokenizer",
    )
    for corpus, source in zip(train, run.data.train_sources, strict=True):
        require(
            not (source.stream and corpus.hub),
            f"data.tokenizer=null: {corpus.names} is a stream, on which no tokenizer can be trained: name a "
            "tokenizer, or train one with opt-parallel tokenizer",
        )
    weights = [Fraction(source.weight) for source in run.data.train_sources]

    def fill_in(folder: Path) -> None:
        try:
            trained = of_opt(train_tokenizer(in_proportion(train, weights), run.model.vocab_size))
            write_tokenizer(trained.of_model(run.model), folder)
        except BadRecord as error:
            bad = BadRecords()
            for corpus in train:
                bad.seek(corpus.items(), corpus.text.of)
            raise bad.refusal() from error

    cache_key, former_key = (
        [
            [[text, corpus.text.template] for text, corpus in zip(texts, train, strict=True)],
            [str(weight) for weight in weights],
            run.model.vocab_size,
            *other_ids(run.model),
        ]
        for texts in ([corpus.cache_key() for corpus in train], [corpus.identity() for corpus in train])
    )
    folder = build_once(cached(run.data.cache, "tokenizer", cache_key, former_key), fill_in)
    check_tokenizer(load_tokenizer(str(folder)), "null (trained on data.train)", run.model)
    return folder


def in_proportion(corpora: list[Corpus], weights: Sequence[Fraction] = (Fraction(1),)) -> Iterator[str]:
    """Text of all corpora in proportion to their weights, at most `TOKENIZER_BYTES` in total."""
    sizes = [sum(unit.size for unit in corpus.units()) for corpus in corpora]
    for corpus, size in zip(corpora, sizes, strict=True):
        require(size > 0, f"{corpus.key}: there is no text in {corpus.names}: name files that contain text")
    most = min(Fraction(size) / weight for size, weight in zip(sizes, weights, strict=True))
    most = min(most, TOKENIZER_BYTES / sum(weights, Fraction(0)))
    for corpus, weight, size in zip(corpora, weights, sizes, strict=True):
        share = float(most * weight / size)
        yield from corpus.sampled(share) if share < 1 else corpus.documents()


def prepare_store(data: DataConfig, key: str, recipes: list[Recipe], tokenizer: Tokenizer | None) -> Path:
    """Build the token store of the corpora in `recipes`, unless the cache has it, and return the folder of the store.

    Raises: UserError."""

    def fill_in(folder: Path, claims: Claims) -> None:
        metas = fill(folder, recipes, data.workers, claims)
        tokens = sum(meta.part.tokens for meta in metas)
        documents = "; ".join(each.corpus.names for each in recipes)
        if key == "data.held_out":
            require(
                tokens > 0,
                f"data.held_out={data.held_out} of {documents} selects no document: raise it, or set it to 0",
            )
        bad = next((f"; left out: {line}" for meta in metas for line in meta.bad), "")
        require(tokens > 0, f"{key}: there is no text in {documents}: name files that contain text{bad}")
        finish_store(folder, recipes[0].encoder.columns, metas, tokenizer)
        for line in TokenStore(folder).manifest["statistics"]["bad_records"]:
            say(f"left out: {line}")

    cache_key, former_key = [each.cache_key() for each in recipes], [each.identity() for each in recipes]
    places = [str(path) for each in recipes if each.corpus.has_ids for path in each.corpus.files]
    cache_key += [places] if places else []  # the store of moved files of ids is built again, which takes seconds
    # The folder is not checked now, because a token store checks each block when it is read.
    folder = build_together(cached(data.cache, "store", cache_key, former_key), fill_in, checked=False)
    say(line_of(key, TokenStore(folder)))
    return folder


def _begins_with_chat(task: TaskConfig, corpus: Corpus) -> bool:
    first = next(replace(corpus, skip_bad=True).records(), None)
    return first is not None and first.fields.get(task.messages_field) is not None
