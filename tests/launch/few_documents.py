"""The Hugging Face examples on a tenth of their text: every rank parses and tokenizes it, which is half a short run.

python tests/launch/few_documents.py PROGRAM [OPTIONS]      # a program of launch/
"""

from __future__ import annotations

import runpy
import sys
from itertools import islice
from pathlib import Path

from lorapre_dist.training.data import builtin_text


def few_documents(count: int = 40) -> None:
    """From now on the built-in text ends after ``count`` documents."""
    documents = builtin_text.documents
    builtin_text.documents = lambda: islice(documents(), count)


if __name__ == "__main__":
    few_documents()
    program = Path(__file__).resolve().parents[2] / "launch" / sys.argv[1]
    sys.argv, sys.path[0] = [str(program), *sys.argv[2:]], str(program.parent)
    runpy.run_path(str(program), run_name="__main__")
