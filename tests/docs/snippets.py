"""The code of a page, run top to bottom in a folder of its own.

- ``{code-block} LANGUAGE`` with ``:caption: NAME`` is a file, written under that name;
- ``python`` runs, all blocks of a page in one process and namespace;
- ``bash`` runs, as a user would, with the files that stand before it;
- ``console``, ``text`` and the rest are shown alone.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.launch.conftest import environment, free_port

REPO = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(`{3,})(\{code-block\} )?(\w+)\n((?:.*\n)*?)\1$", re.MULTILINE)
CAPTION = re.compile(r"\A:caption: (\S+)\n\n")


@dataclass(frozen=True)
class Snippet:
    """A fenced block: its language, the file it is (None: it is run), the line it begins in, and its text."""

    language: str
    file: str | None
    line: int
    text: str


def snippets(page: Path) -> list[Snippet]:
    """The blocks of a page that are files or are run, in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        _, directive, language, body = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        caption = CAPTION.match(body) if directive else None
        if caption:
            found.append(Snippet(language, caption[1], line, body[caption.end() :]))
        elif language in ("python", "bash"):
            found.append(Snippet(language, None, line, body))
    return found


def run(page: Path, folder: Path, timeout: float) -> str:
    """Run a page in ``folder``, its Python blocks in one process after its shell blocks; what it printed."""
    python, said = "", ""
    for snippet in snippets(page):
        if snippet.file is not None:
            (folder / snippet.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / snippet.file).write_text(snippet.text, encoding="utf-8")
        elif snippet.language == "python":
            python += "\n" * (snippet.line - python.count("\n")) + snippet.text  # tracebacks name the page's lines
        else:
            said += _run(page, folder, ["bash", "-euo", "pipefail", "-c", _on_a_free_port(snippet.text)], timeout)
    if python:
        (folder / f"{page.stem}_page.py").write_text(python, encoding="utf-8")
        said += _run(page, folder, [sys.executable, f"{page.stem}_page.py"], timeout)
    return said


def _on_a_free_port(command: str) -> str:
    """The deepspeed launcher's own port is the same for all that run on a machine."""
    return re.sub(r"^deepspeed ", f"deepspeed --master_port {free_port()} ", command, flags=re.MULTILINE)


def _run(page: Path, folder: Path, command: list[str], timeout: float) -> str:
    kept = environment()
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    # Of a session of its own, so that a launcher that hangs is ended with its ranks.
    to = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=kept, start_new_session=True, **to)
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        said += f"\n[ended after {timeout:.0f} s]"
    assert process.returncode == 0, f"{page}: {command[-1]}\n{said}"
    return said
