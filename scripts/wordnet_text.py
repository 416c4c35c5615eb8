"""Write three data sets from the database files of WordNet 3.0, which the Debian package wordnet-base contains.

    python scripts/wordnet_text.py --output data/wordnet [--source /usr/share/wordnet]

text-*.jsonl is for pretraining and holds an article for each synset, with its words and their gloss. pairs-*.jsonl
holds prompts and completions. A prompt is the article of a noun, and the completion is its hypernym. labels-*.jsonl
holds glosses, labelled with the category of their synset. WordNet calls a category a lexicographer file.

A gloss and its near-duplicates are held out in all three data sets or in none. docs/real-text.md uses these data sets.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_parallel.config.model import require
from opt_parallel.config.options import parsed
from opt_parallel.data.text.python_text import split
from opt_parallel.runtime.errors import UserError, reporting
from opt_parallel.storage.atomic import new_file

SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
# The categories in the order of lexnames(5WN) in WordNet's manual.
CATEGORIES = [
    *(f"adj.{name}" for name in ("all", "pert")), "adv.all", *(f"noun.{name}" for name in (
        "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling",
        "food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process",
        "quantity", "relation", "shape", "state", "substance", "time",
    )), *(f"verb.{name}" for name in (
        "body", "change", "cognition", "communication", "competition", "consumption", "contact", "creation", "emotion",
        "motion", "perception", "possession", "social", "stative", "weather",
    )), "adj.ppl",
]  # fmt: skip


@dataclass(frozen=True)
class Synset:
    """A set of synonyms. `kind_of` is the offset of its first hypernym in the same file, or None if it has no
    hypernym."""

    speech: str
    offset: str
    category: str
    words: list[str]
    kind_of: str | None
    gloss: str

    @property
    def article(self) -> str:
        return f"{', '.join(self.words)} ({self.speech}): {self.gloss}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the six files")
    parser.add_argument("--source", type=Path, default=Path("/usr/share/wordnet"), help="folder with data.noun, …")
    arguments = parsed(parser)
    synsets = list(read_synsets(arguments.source))
    train, validation, removed = split(synset.gloss for synset in synsets)
    for name, glosses in (("train", set(train)), ("validation", set(validation))):
        chosen = [synset for synset in synsets if synset.gloss in glosses]
        first = {synset.offset: synset.words[0] for synset in synsets if synset.speech == "noun"}
        nouns = [synset for synset in chosen if synset.speech == "noun" and synset.kind_of in first]
        write(arguments.output / f"text-{name}.jsonl", ({"text": synset.article} for synset in chosen))
        write(arguments.output / f"pairs-{name}.jsonl", (
            {"prompt": f"{synset.article}\nIt is a kind of", "completion": f" {first[str(synset.kind_of)]}"}
            for synset in nouns
        ))  # fmt: skip
        write(arguments.output / f"labels-{name}.jsonl", (
            {"text": synset.gloss, "label": synset.category} for synset in chosen
        ))  # fmt: skip
        print(f"{name}: {len(chosen):,} synsets, {sum(len(each.article) for each in chosen):,} characters, "
              f"{len(nouns):,} nouns that are a kind of something")  # fmt: skip
    print(f"{removed:,} glosses left out of both splits as near-duplicates of training text")
    return 0


def read_synsets(folder: Path) -> Iterator[Synset]:
    """All synsets of the four database files, whose format is in wndb(5WN) of WordNet's manual. Raises: UserError."""
    for name, speech in SPEECH.items():
        path = folder / f"data.{name}"
        require(path.is_file(), f"--source {folder} has no data.{name}: install wordnet-base, or name its folder")
        try:
            file = path.open(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--source: {path} cannot be read ({error.strerror}): install WordNet 3.0") from error
        with file:
            for number, line in enumerate(file, start=1):
                if line.startswith("  "):  # a line of the licence
                    continue
                try:
                    yield read_synset(line, speech)
                except (ValueError, IndexError) as error:
                    raise UserError(f"{path}, line {number} is not a synset ({error}): install WordNet 3.0") from error


def read_synset(line: str, speech: str) -> Synset:
    """The synset in a line `offset category type count (word id)… count (symbol offset type words)… | gloss`, in which
    the first count is hexadecimal."""
    fields, _, gloss = line.partition(" | ")
    offset, category, _, count, *rest = fields.split(" ")
    words = [word.partition("(")[0].replace("_", " ") for word in rest[0 : 2 * int(count, 16) : 2]]
    pointers = rest[2 * int(count, 16) + 1 :]
    hypernyms = [pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] == "@"]
    return Synset(speech, offset, CATEGORIES[int(category)], words, hypernyms[0] if hypernyms else None, gloss.strip())


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
    except OSError as error:
        raise UserError(f"--output {path.parent} cannot be written ({error}): choose another folder") from error


if __name__ == "__main__":
    with reporting():
        sys.exit(main())
