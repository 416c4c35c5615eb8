"""Compute baselines on the data of scripts/wordnet_text.py, and the accuracy of generated answers.

    python scripts/wordnet_baselines.py --data data/wordnet [--answers answers.jsonl]

The baselines for labels are the most frequent label, and logistic regression on a bag of words. The baseline for pairs
is the most frequent completion. `--answers` names the output of generate.py for pairs-validation.jsonl.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from opt_parallel.config.model import ProblemType
from opt_parallel.config.options import parsed
from opt_parallel.report.scores import figures, tally
from opt_parallel.runtime.errors import UserError, reporting

SEEN = 2  # a feature is a word that occurs in at least this many training glosses
EPOCHS, BATCH, RATE = 6, 256, 5e-3
SINGLE = ProblemType.single_label_classification


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that scripts/wordnet_text.py filled")
    parser.add_argument("--answers", type=Path, help="answers of the fine-tuned model, written by generate.py")
    arguments = parsed(parser)
    answers = [] if arguments.answers is None else read(arguments.answers, "--answers")
    torch.manual_seed(1)
    train, held_out = (read(arguments.data / f"labels-{name}.jsonl") for name in ("train", "validation"))
    names = sorted({row["label"] for row in train})
    truth = np.array([names.index(row["label"]) for row in held_out])
    commonest = Counter(row["label"] for row in train).most_common(1)[0][0]
    always = np.eye(len(names))[[names.index(commonest)] * len(held_out)]
    print("labels, if every answer is the most frequent one:", described(figures(tally(always, truth, SINGLE), SINGLE)))
    scores = bag_of_words(train, held_out, names)
    print("labels, bag of words:", described(figures(tally(scores, truth, SINGLE), SINGLE)))

    pairs, asked = (read(arguments.data / f"pairs-{name}.jsonl") for name in ("train", "validation"))
    completion = Counter(row["completion"] for row in pairs).most_common(1)[0][0]
    right = np.mean([row["completion"] == completion for row in asked])
    print(f"pairs, if every answer is the most frequent one: {right:.1%} right")
    if answers:
        expected = {row["prompt"]: row["completion"] for row in asked}
        equal = [row["text"] == expected[row["prompt"]] for row in answers]
        print(f"pairs, fine-tuned model: {np.mean(equal):.1%} of {len(equal):,} answers are right")
    return 0


def bag_of_words(train: list[dict[str, str]], held_out: list[dict[str, str]], names: list[str]) -> np.ndarray:
    """Scores (held-out glosses, labels) of multinomial logistic regression trained with Adam. The scores are those of
    the best epoch on every twentieth training gloss, which is not used for training."""
    seen = Counter(word for row in train for word in words_of(row["text"]))
    number = {word: index for index, word in enumerate(sorted(word for word, n in seen.items() if n >= SEEN))}
    model = nn.EmbeddingBag(len(number) + 1, len(names), mode="sum", padding_idx=len(number))  # maps words to scores
    nn.init.zeros_(model.weight)
    bias = nn.Parameter(torch.zeros(len(names)))
    optimizer = torch.optim.Adam([*model.parameters(), bias], lr=RATE)

    def features(rows: list[dict[str, str]]) -> tuple[Tensor, Tensor]:
        """The word indices of all glosses, concatenated, and the offset of each gloss."""
        bags = [[number[word] for word in words_of(row["text"]) if word in number] for row in rows]
        starts = np.cumsum([0, *map(len, bags)])[:-1]
        return torch.tensor([word for bag in bags for word in bag], dtype=torch.long), torch.from_numpy(starts)

    labels = torch.tensor([names.index(row["label"]) for row in train])
    kept = [index for index in range(len(train)) if index % 20]
    tuning, best, scores = list(range(0, len(train), 20)), 0.0, np.zeros(0)
    for _ in range(EPOCHS):
        order = torch.randperm(len(kept)).tolist()
        for first in range(0, len(order), BATCH):
            chosen = [kept[index] for index in order[first : first + BATCH]]
            loss = nn.functional.cross_entropy(
                model(*features([train[index] for index in chosen])) + bias, labels[chosen]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            found = (model(*features([train[index] for index in tuning])) + bias).argmax(1)
            right = float((found == labels[tuning]).float().mean())
            if right > best:
                best, scores = right, (model(*features(held_out)) + bias).numpy()
    return scores


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def described(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items())


def read(path: Path, option: str = "--data") -> list[dict[str, str]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: {path} cannot be read ({error}): run scripts/wordnet_text.py") from error


if __name__ == "__main__":
    with reporting():
        sys.exit(main())
