"""Questions and answers to train on, and problems to solve.

Both are rows of the hub or of local files. Training: MetaMathQA's columns (``query``, ``response``), GSM8K's
(``question``, ``answer``), MATH's (``problem``, ``solution``), or any two. Scoring: GSM8K's (``question``, ``answer``
with the number behind ``####``) and MATH-500's (``problem``, ``answer`` in LaTeX).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorapre_dist.config import ConfigError
from lorapre_dist.training.data.batches import BatchPlan
from lorapre_dist.training.data.cache_files import build_once
from lorapre_dist.training.data.documents import PULL_ROWS, open_rows
from lorapre_dist.training.data.reading import Reader, private
from lorapre_dist.training.data.sequences import TrainingData
from lorapre_dist.training.data.tokenizer import fingerprint, load_tokenizer
from lorapre_dist.training.finetune import answers
from lorapre_dist.training.finetune.examples import Examples, ExampleStream, write_examples
from lorapre_dist.training.finetune.settings import FinetuneSettings, score_name

# Question and text to learn, by data set: MetaMathQA, GSM8K, MATH.
TRAINING_COLUMNS = (("query", "response"), ("question", "answer"), ("problem", "solution"))


@dataclass(frozen=True)
class Problem:
    """A question as the model is asked it, in tokens, and the answer that is right."""

    question: str
    prompt: list[int]
    answer: str


@dataclass(frozen=True)
class FinetuneData(TrainingData):
    """What fine-tuning reads.

    Attributes:
        examples: how many there are to train on.
        dropped: examples whose question alone is too long.
        problems: to be solved, by data set.
    """

    examples: int
    dropped: int
    problems: dict[str, list[Problem]]


def prepare_data(settings: FinetuneSettings, plan: BatchPlan) -> FinetuneData:
    """Load the tokenizer, tokenise the examples (once, cached) and read the problems. Issues no collective.

    Raises:
        ConfigError: anything wrong with the tokenizer or a data set, or nothing to train on or to score.
    """
    tokenizer = _tokenizer(settings)
    problems = {score_name(name): _problems(name, settings, tokenizer) for name in settings.score}
    examples = Examples.empty()
    key = f"score-{fingerprint(tokenizer)}"
    if settings.max_steps != 0:
        key, examples = _examples(settings, tokenizer)
    stream = ExampleStream(examples, plan, settings.seed, settings.max_examples)
    # Of those that are trained on: which ones are chosen depends on the seed alone.
    key = f"{key}-{len(stream.chosen)}"
    return FinetuneData(stream, len(tokenizer), tokenizer, key, len(stream.chosen), examples.dropped, problems)


def _tokenizer(settings: FinetuneSettings) -> PreTrainedTokenizerBase:
    if settings.tokenizer is not None:
        return load_tokenizer(settings.tokenizer, why="which ends a response")
    try:
        return load_tokenizer(str(settings.model), option="--model", why="which ends a response")
    except ConfigError as error:
        raise ConfigError(f"{error}; name a tokenizer with --tokenizer") from error


def _examples(settings: FinetuneSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[str, Examples]:
    """The tokenised examples, and a key that changes when any of them does."""
    rows = open_rows(settings.dataset, settings.dataset_config, settings.dataset_split)
    columns = _training_columns(settings, _first_row("--dataset", settings.dataset, rows.stream))
    facts = json.dumps([rows.facts, columns, settings.prompt_template, settings.seq_len, fingerprint(tokenizer)])
    key = hashlib.blake2b(facts.encode(), digest_size=12).hexdigest()

    def pairs() -> Iterator[tuple[str, str]]:
        for query, response in _texts("--dataset", settings.dataset, rows.only(columns), columns):
            yield settings.prompt_template.replace("{query}", query), response

    def build(folder: Path) -> None:
        write_examples(folder, pairs(), tokenizer, settings.seq_len)

    examples = Examples.read(build_once(Path(settings.data_cache) / "examples" / key, build))
    if len(examples) == 0 and examples.dropped:
        raise ConfigError(
            f"--seq_len {settings.seq_len}: the question alone is longer in all {examples.dropped:,} examples of "
            f"{settings.dataset}; raise it"
        )
    if len(examples) == 0:
        raise ConfigError(f"--dataset {settings.dataset}: holds no question with a response")
    return key, examples


def _training_columns(settings: FinetuneSettings, first: dict[str, Any]) -> tuple[str, str]:
    there = ", ".join(first)
    for option in ("query_column", "response_column"):
        value = getattr(settings, option)
        if value is not None and value not in first:
            raise ConfigError(f"--{option} {value}: {settings.dataset} has the columns {there}")
    known = next((pair for pair in TRAINING_COLUMNS if pair[0] in first and pair[1] in first), (None, None))
    query, response = settings.query_column or known[0], settings.response_column or known[1]
    if query is None or response is None:
        raise ConfigError(
            f"--dataset {settings.dataset}: has the columns {there}; say with --query_column and --response_column "
            "which to learn from"
        )
    return query, response


def _problems(name: str, settings: FinetuneSettings, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    rows = open_rows(name, None, settings.score_split, "--score")
    first = _first_row("--score", name, rows.stream)
    question = next((column for column in ("question", "problem") if column in first), None)
    if question is None or "answer" not in first:
        raise ConfigError(
            f"--score {name}: has the columns {', '.join(first)}; needs question and answer (as GSM8K), or problem and "
            "answer (as MATH-500)"
        )
    found = []
    columns = (question, "answer")
    for text, answer in _texts("--score", name, rows.only(columns), columns):
        if question == "question":
            if "####" not in answer:
                raise ConfigError(f"--score {name}: the answer {answer[-40:]!r} holds no '#### ' with the number")
            answer = answer.rpartition("####")[2].strip()
        prompt = settings.prompt_template.replace("{query}", text)
        found.append(Problem(text, tokenizer(prompt)["input_ids"], answer))
        if len(found) == settings.score_problems:
            break
    if not found:
        raise ConfigError(f"--score {name}: holds no question with an answer")
    hopeless = next((p for p in found if not answers.equal(p.answer, p.answer)), None)
    if hopeless is not None:
        raise ConfigError(f"--score {name}: the answer {hopeless.answer!r} to {hopeless.question[:40]!r} says nothing")
    return found


def _first_row(option: str, name: str, rows: Any) -> dict[str, Any]:
    first = Reader(name, private(rows), option=option).read(1)
    if not first:
        raise ConfigError(f"{option} {name}: is empty")
    return first[0]


def _texts(option: str, name: str, rows: Any, columns: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Two columns of every row, stripped; rows in which one is empty are left out."""
    reader = Reader(name, private(rows), option=option)
    while not reader.ended:
        for row in reader.read(PULL_ROWS):
            for column in columns:
                if not isinstance(row.get(column), (str, type(None))):
                    kind = type(row[column]).__name__
                    raise ConfigError(f"{option} {name}: column {column!r} holds {kind}, not text")
            first, second = ((row.get(column) or "").strip() for column in columns)
            if first and second:
                yield first, second
