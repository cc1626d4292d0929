"""From settings to training sequences and held-out sequences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from lorapre_dist.config import ConfigError
from lorapre_dist.training.data.batches import BatchPlan
from lorapre_dist.training.data.documents import Source, open_source
from lorapre_dist.training.data.splits import Split, finite_split, streaming_split
from lorapre_dist.training.data.streaming import ShardStream
from lorapre_dist.training.data.tokenized import TOKENIZER, TokenFolder, is_tokenized
from lorapre_dist.training.data.tokenizer import Encoder, load_tokenizer, trained_tokenizer
from lorapre_dist.training.data.tokens import Tokens, TokenStream, token_file
from lorapre_dist.training.run.settings import Settings


class Stream(Protocol):
    """Training data, batch after batch, with a position that can be saved."""

    def next_batch(self) -> Any:
        """This rank's part of the next global batch; in pre-training ``(per_rank, seq_len)``, int64."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at ``state``."""


@dataclass(frozen=True)
class TrainingData:
    """What every training program reads.

    Attributes:
        train: batches to train on.
        vocab_size: number of token ids.
        tokenizer: what made them.
        fingerprint: of the text, the split and the tokenizer; a resumed run must have the same.
    """

    train: Stream
    vocab_size: int
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str


@dataclass(frozen=True)
class Data(TrainingData):
    """What pre-training reads.

    Attributes:
        held_out: sequences to evaluate on, ``(n, seq_len)``, the same on every rank.
    """

    held_out: np.ndarray


class Corpus(Protocol):
    """The settings that say what text there is; shared with ``lorapre tokenize``."""

    dataset: str
    dataset_config: str | None
    dataset_split: str
    eval_dataset: str | None
    eval_split: str
    text_column: str | None
    read_attempts: int
    streaming: bool
    tokenizer: str | None
    vocab_size: int | None


def prepare_data(settings: Settings, plan: BatchPlan, vocab_size: int) -> Data:
    """Open the corpus, hold out a part, train or load the tokenizer and tokenise. Issues no collective.

    Raises:
        ConfigError: anything wrong with the corpus or the tokenizer, or too little text for one batch.
    """
    cache = Path(settings.data_cache)
    if is_tokenized(Path(settings.dataset)):
        return _tokenized_data(settings, plan, cache)
    source = open_corpus(settings, settings.dataset, settings.dataset_split)
    evaluation = evaluation_source(settings, source)
    split = _split(settings, source, evaluation, cache)
    encoder = Encoder(find_tokenizer(settings, source, split, cache, vocab_size))
    key = f"{source.fingerprint}-{split.threshold:x}-{encoder.fingerprint}"
    train: Stream
    if source.finite:
        tokens = token_file(cache / "tokens" / key, lambda: _training_texts(source, split), encoder)
        tail = int(split.tail * len(tokens))
        train = TokenStream(tokens[: len(tokens) - tail], settings.seq_len, plan, settings.seed)
        held_out = tokens[len(tokens) - tail :] if tail else None
    else:
        train = ShardStream(
            source,
            encoder,
            settings.seq_len,
            plan,
            lambda text: not split.held_out(text),
            buffer=settings.shuffle_buffer,
            seed=settings.seed,
        )
        held_out = None
    if held_out is None:
        held_out = _held_out_tokens(settings, source, evaluation, split, encoder, key, cache)
    held = _sequences(settings, held_out)
    return Data(train, len(encoder.tokenizer), encoder.tokenizer, f"{key}-{split.tail}", held)


def _tokenized_data(settings: Settings, plan: BatchPlan, cache: Path) -> Data:
    """From a folder that ``lorapre tokenize`` wrote, which brings its tokenizer and its held-out part."""
    folder = TokenFolder.open(Path(settings.dataset))
    for name in ("vocab_size", "dataset_config", "streaming"):
        if getattr(settings, name):
            raise ConfigError(f"--{name}: {folder.path} is tokenised already; leave the option out")
    encoder = Encoder(load_tokenizer(str(folder.path / TOKENIZER)))
    if settings.tokenizer is not None:
        given = Encoder(load_tokenizer(settings.tokenizer)).fingerprint
        if given not in (folder.content["tokenizer"], folder.content["plan"]["given_tokenizer"]):
            raise ConfigError(
                f"--tokenizer {settings.tokenizer}: is not the one that {folder.path} was tokenised with, "
                "which lies in it; leave --tokenizer out"
            )
    if encoder.fingerprint != folder.content["tokenizer"]:
        raise ConfigError(f"--dataset {folder.path}: its tokenizer/ was changed after it was tokenised with it")
    train = TokenStream(folder.tokens("train"), settings.seq_len, plan, settings.seed)
    held_out: Tokens = folder.tokens("held_out")
    key = folder.fingerprint
    if settings.eval_dataset is not None:
        source = open_corpus(settings, settings.eval_dataset, settings.eval_split)
        held_out = _held_out_tokens(settings, source, source, Split(), encoder, key, cache)
    return Data(train, len(encoder.tokenizer), encoder.tokenizer, key, _sequences(settings, held_out))


def open_corpus(settings: Corpus, name: str, split: str) -> Source:
    """The source called ``name`` with the settings' column, attempts and configuration."""
    return open_source(
        name,
        config=settings.dataset_config if name == settings.dataset else None,
        split=split,
        column=settings.text_column,
        streaming=settings.streaming,
        attempts=settings.read_attempts,
    )


def evaluation_source(settings: Corpus, source: Source) -> Source | None:
    """Held-out text of its own: ``--eval_dataset``, or a hub dataset's evaluation split if it has one."""
    if settings.eval_dataset is not None:
        return open_corpus(settings, settings.eval_dataset, settings.eval_split)
    if not source.hub or settings.eval_split == settings.dataset_split:
        return None
    try:
        return open_corpus(settings, settings.dataset, settings.eval_split)
    except ConfigError as error:
        if "split" in str(error).lower():
            return None
        raise


def _split(settings: Settings, source: Source, evaluation: Source | None, cache: Path) -> Split:
    if evaluation is not None:
        return Split()
    if source.finite:
        return finite_split(source, settings.eval_fraction, cache)
    return streaming_split(settings.eval_fraction)


def _training_texts(source: Source, split: Split) -> Any:
    return (text for text in source.documents() if not split.held_out(text))


def find_tokenizer(
    settings: Corpus, source: Source, split: Split, cache: Path, vocab_size: int
) -> PreTrainedTokenizerBase:
    """``--tokenizer``, else one trained on the corpus: of ``--vocab_size`` tokens, ``vocab_size`` where not given."""
    if settings.tokenizer is not None:
        return load_tokenizer(settings.tokenizer)
    key = f"{source.fingerprint}-{split.threshold:x}"
    return trained_tokenizer(lambda: _training_texts(source, split), key, settings.vocab_size or vocab_size, cache)


def _held_out_tokens(
    settings: Settings,
    source: Source,
    evaluation: Source | None,
    split: Split,
    encoder: Encoder,
    key: str,
    cache: Path,
) -> np.ndarray:
    wanted = settings.eval_batches * settings.batch.global_batch * settings.seq_len
    if evaluation is None:
        chosen, name = source, f"{key}-held_out"
        # Reading a stream to its end for a rare document would not end.
        limit = None if source.finite else wanted or 100 * settings.seq_len * settings.batch.global_batch
    else:
        chosen, name = evaluation, f"{evaluation.fingerprint}-{encoder.fingerprint}"
        limit = None if evaluation.finite else wanted or None
    name += "" if limit is None else f"-{limit}"

    def texts() -> Any:
        return (t for t in chosen.documents() if evaluation is not None or split.held_out(t))

    return token_file(cache / "tokens" / name, texts, encoder, limit)


def _sequences(settings: Settings, tokens: Tokens) -> np.ndarray:
    count = len(tokens) // settings.seq_len
    if count == 0:
        raise ConfigError(
            f"the held-out text is too small: {len(tokens)} tokens, one sequence needs {settings.seq_len}; "
            "raise --eval_fraction (of 'lorapre tokenize', if that wrote it) or give --eval_dataset"
        )
    if settings.eval_batches:
        count = min(count, settings.eval_batches * settings.batch.global_batch)
    return tokens[: count * settings.seq_len].reshape(count, settings.seq_len)
