"""``lorapre tokenize``: any corpus that training can read, as files of token ids (:mod:`.tokenized` has their form).

The unit of work is one shard of the corpus, which one process reads from beginning to end and writes as parts of
some hundred megabytes. With each finished part a small file under ``.work/`` keeps what is in it and where in the shard
the next one begins. So a run that was killed goes on behind the last finished part of every shard, and the
result does not depend on kills or on the number of processes.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from lorapre_dist.checkpoint.folder import MANIFEST, describe, write_atomically
from lorapre_dist.config import ConfigError
from lorapre_dist.training.data.documents import stream_of
from lorapre_dist.training.data.sequences import evaluation_source, find_tokenizer, open_corpus
from lorapre_dist.training.data.splits import Split, streaming_split
from lorapre_dist.training.data.token_parts import Job, Portion, Writer, count_of, token_type
from lorapre_dist.training.data.tokenized import FORMAT, KIND, PARTS, TOKENIZER, WORK, TokenFolder, is_tokenized
from lorapre_dist.training.data.tokenizer import Encoder, load_tokenizer

PLAN = "plan.json"
VOCABULARY = 32000


def tokenize(job: Job, progress: bool = True) -> TokenFolder:
    """Write ``job.out``, or finish what a killed run has begun there; what is finished already is only checked.

    Raises:
        ConfigError: something wrong with the corpus or the tokenizer, the folder is of another job or in use, or
            cannot be written (a full disk); what was finished stays.
    """
    folder = job.folder
    if folder.exists() and not (folder.is_dir() and (is_tokenized(folder) or not any(folder.iterdir()))):
        raise ConfigError(f"{folder}: holds something else; name a new folder")
    try:
        (folder / WORK).mkdir(parents=True, exist_ok=True)
        with FileLock(folder / WORK / "lock", timeout=0):
            return _write(job, progress)
    except Timeout:
        raise ConfigError(f"{folder}: another 'lorapre tokenize' is at work there") from None
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written: {error.strerror or error}; what is finished stays, "
            "and the same command goes on from there"
        ) from error


def _write(job: Job, progress: bool) -> TokenFolder:
    folder = job.folder
    portions = _portions(job)
    plan = _plan(job, portions)
    if (folder / MANIFEST).is_file():
        shutil.rmtree(folder / WORK)
        found = TokenFolder.open(folder)
        _compare(folder, found.content["plan"], plan)
        return found
    if (folder / WORK / PLAN).is_file():
        _compare(folder, json.loads((folder / WORK / PLAN).read_text(encoding="utf-8")), plan)
    write_atomically(folder / WORK / PLAN, json.dumps(plan))
    for left in folder.glob(".*.tmp"):
        left.unlink()
    parts: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for portion in portions:
        for part, written in _tokenize_portion(job, portion, progress).items():
            parts[part] += written
    return _finish(job, plan, parts)


# what is to be done ---------------------------------------------------------------------------------------------------


def _portions(job: Job) -> list[Portion]:
    source = open_corpus(job, job.dataset, job.dataset_split)
    evaluation = evaluation_source(job, source)
    if evaluation is None:
        return [Portion(source, "train", streaming_split(job.eval_fraction), job.max_tokens)]
    return [
        Portion(source, "train", Split(), job.max_tokens),
        Portion(evaluation, "held_out", Split(), job.eval_tokens),
    ]


def _plan(job: Job, portions: list[Portion]) -> dict[str, Any]:
    """What decides every byte of the result; also writes the tokenizer into the folder."""
    folder = job.folder / TOKENIZER
    portion = portions[0]
    if not any((job.folder / name).is_file() for name in (MANIFEST, f"{WORK}/{PLAN}")):
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it had said what it is
    given = None
    if job.tokenizer is not None or not folder.is_dir():
        given = find_tokenizer(job, portion.source, portion.split, Path(job.data_cache), VOCABULARY)
    if not folder.is_dir():
        _save_tokenizer(given, folder, job.folder / WORK / TOKENIZER)
    # What is used is what was saved: the two must cut text alike.
    encoder = Encoder(load_tokenizer(str(folder)))
    return {
        "dataset": job.dataset,
        "text": [c.source.fingerprint for c in portions],
        "tokenizer": encoder.fingerprint,
        "given_tokenizer": None if job.tokenizer is None else Encoder(given).fingerprint,
        "given_vocab_size": job.vocab_size,
        "vocab_size": len(encoder.tokenizer),
        "end_of_text": encoder.end,
        "held_out": f"{portion.split.threshold:x}",
        "max_tokens": job.max_tokens,
        "eval_tokens": job.eval_tokens,
        "part_tokens": job.part_tokens,
    }


def _save_tokenizer(tokenizer: Any, folder: Path, temporary: Path) -> None:
    try:
        tokenizer.save_pretrained(str(temporary))
    except Exception as error:  # tokenizers raises a bare Exception where the disk is full
        raise OSError(f"tokenizer: {error}") from error
    temporary.rename(folder)


def _compare(folder: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if there.get(name) != value:
            raise ConfigError(
                f"{folder}: was begun with another {name} ({there.get(name)!r}, now {value!r}); name a new folder"
            )


# the work -------------------------------------------------------------------------------------------------------------


def _tokenize_portion(job: Job, portion: Portion, progress: bool) -> dict[str, list[dict[str, Any]]]:
    """Every shard, or as many in order as the limit needs; the files that belong to each part, in order."""
    shards = int(stream_of(portion.source).num_shards)
    done: dict[int, list[dict[str, Any]]] = {}
    bar = tqdm(
        total=portion.limit,
        desc=portion.part,
        unit="tok",
        unit_scale=True,
        disable=not progress,
        # In a log file every refresh is a line.
        mininterval=1.0 if sys.stderr.isatty() else 15.0,
        dynamic_ncols=True,
    )

    def enough() -> bool:
        first = next((i for i in range(shards) if i not in done), shards)
        total = sum(count_of(entry, portion.part) for i in range(first) for entry in done[i])
        bar.set_postfix_str(f"{len(done)}/{shards} shards", refresh=False)
        return portion.limit is not None and total >= portion.limit

    with bar, contextlib.closing(_shards(job, portion, shards, done, bar)) as work:
        for _ in work:
            if enough():
                break
    entries, total = [], 0
    for shard in sorted(done):
        for entry in done[shard]:
            if portion.limit is None or total < portion.limit:
                entries.append(entry)
                total += count_of(entry, portion.part)
    return {part: [entry[part] for entry in entries if entry.get(part)] for part in PARTS}


def _shards(job: Job, portion: Portion, shards: int, done: dict[int, list[dict[str, Any]]], bar: Any) -> Iterator[None]:
    """Do one shard after the other, or ``job.workers`` at a time; a yield now and then."""
    if job.workers == 1:
        writer = Writer(job, portion, count=bar.update)
        for shard in range(shards):
            done[shard] = writer.shard(shard)
            yield
        return
    context = multiprocessing.get_context("spawn")
    stop, counter = context.Event(), context.Value("Q", 0)
    # Each process would use every core for its tokenizer.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    settings = (job, portion.part, stop, counter, os.getpid())
    with ProcessPoolExecutor(min(job.workers, shards), context, _Worker.begin, settings) as pool:
        waiting: dict[Future[list[dict[str, Any]]], int] = {pool.submit(_Worker.shard, i): i for i in range(shards)}
        try:
            while waiting:
                for future in wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    done[waiting.pop(future)] = future.result()
                bar.update(counter.value - bar.n)
                yield
        except BrokenProcessPool:
            raise ConfigError(
                f"{job.out}: a process of --workers was killed (memory?); the same command goes on from what is there"
            ) from None
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """What a process of ``--workers`` holds."""

    settings: tuple[Any, ...]
    writer: Writer | None = None

    @classmethod
    def begin(cls, *settings: Any) -> None:
        cls.settings = settings
        threading.Thread(target=cls._watch, args=(settings[-1],), daemon=True).start()

    @staticmethod
    def _watch(parent: int) -> None:
        # A parent that was killed cannot say so, and the queue that it filled stays open in its other children.
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    @classmethod
    def shard(cls, number: int) -> list[dict[str, Any]]:
        job, part, stop, counter, _ = cls.settings

        def count(tokens: int) -> None:
            with counter.get_lock():
                counter.value += tokens

        if cls.writer is None:
            portion = next(p for p in _portions(job) if p.part == part)
            cls.writer = Writer(job, portion, stop.is_set, count)
        return cls.writer.shard(number)


def _finish(job: Job, plan: dict[str, Any], parts: dict[str, list[dict[str, Any]]]) -> TokenFolder:
    """Remove parts that the limit does not need, and write the manifest."""
    folder = job.folder
    if not parts["train"]:
        raise ConfigError(f"--dataset {job.dataset}: holds no text to train on")
    wanted = {entry["name"]: entry for entries in parts.values() for entry in entries}
    for path in folder.glob("*.bin"):
        if path.name not in wanted:
            path.unlink()
    files = {name: {"bytes": e["bytes"], "blake2b": e["blake2b"]} for name, e in sorted(wanted.items())}
    files |= {f"{TOKENIZER}/{p.name}": describe(p) for p in sorted((folder / TOKENIZER).iterdir())}
    totals = {
        part: {key: sum(entry[key] for entry in entries) for key in ("tokens", "documents")}
        for part, entries in parts.items()
    }
    content = {
        "format": FORMAT,
        "kind": KIND,
        **{key: plan[key] for key in ("dataset", "tokenizer", "vocab_size", "end_of_text")},
        "dtype": token_type(plan["vocab_size"]).name,
        **totals,
        "plan": plan,
        "files": files,
    }
    write_atomically(folder / MANIFEST, json.dumps(content, indent=1))
    shutil.rmtree(folder / WORK)
    return TokenFolder.open(folder)
