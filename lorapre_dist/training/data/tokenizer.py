"""A tokenizer from a folder or the hub, else a byte-level BPE trained once on the corpus and cached."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorapre_dist.config import ConfigError
from lorapre_dist.training.data.cache_files import build_once
from lorapre_dist.training.data.reading import first_line
from lorapre_dist.training.run.ranks import saying

END_OF_TEXT = "<|endoftext|>"
# Enough text for 32,000 merges; more changes little and takes minutes.
TRAINING_CHARACTERS = 50_000_000


def load_tokenizer(
    name: str, option: str = "--tokenizer", why: str = "which separates documents"
) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder ``name`` or of the hub model ``name``.

    Raises:
        ConfigError: none there, or it has no end-of-sequence token (``why`` says what it is for); names ``option``.
    """
    try:
        with saying(f"for the hub: tokenizer {name}"):
            tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises many kinds
        what = "cannot be loaded" if option == "--tokenizer" else "its tokenizer cannot be loaded"
        raise ConfigError(f"{option} {name}: {what}: {first_line(error)}") from error
    if not tokenizer or not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(f"{option} {name}: holds no tokenizer")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{option} {name}: has no end-of-sequence token, {why}")
    return tokenizer


def trained_tokenizer(
    texts: Callable[[], Iterable[str]], key: str, vocab_size: int, cache: Path
) -> PreTrainedTokenizerBase:
    """A byte-level BPE of ``vocab_size`` tokens trained on ``texts()``, or the one cached under ``key``.

    Raises:
        ConfigError: the corpus is empty.
    """

    def build(folder: Path) -> None:
        train_bpe(texts(), vocab_size).save_pretrained(str(folder))

    folder = build_once(cache / "tokenizers" / f"bpe{vocab_size}-{key}", build)
    return load_tokenizer(str(folder))


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the first 50 million characters of ``texts``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_limited(texts), trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _limited(texts: Iterable[str]) -> Iterator[str]:
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if seen >= TRAINING_CHARACTERS:
            return
    if not seen:
        raise ConfigError("the corpus holds no text")


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes when any text could be cut differently."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    facts = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(f"{facts}:{tokenizer.eos_token_id}".encode(), digest_size=8).hexdigest()


class Encoder:
    """Turns documents into token ids, each document followed by the end-of-sequence token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        self.fingerprint = fingerprint(tokenizer)
        # Documents are cut into sequences afterwards: a warning about their length is noise.
        logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [[*ids, self.end] for ids in encoded]
