"""Run a training program many times from one process that has the heavy imports behind it.

Reads one JSON list of command lines from the file named first, forks a child for each (so each has its own exit
code, stderr and process group), and writes ``[{"code", "stderr", "seconds"}]`` to the file named second. The third
argument is the program's module.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path


def run(argv: list[str], environment: dict[str, str], program: str) -> dict[str, object]:
    started = time.time()
    with tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            os.dup2(stderr.fileno(), 2)
            os.environ.update(environment)
            code = 70
            try:
                code = importlib.import_module(program).main(argv)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        stderr.seek(0)
        text = stderr.read().decode()
    return {"code": os.waitstatus_to_exitcode(status), "stderr": text, "seconds": time.time() - started}


def main() -> None:
    for module in ("engines.engines", "run.loop"):  # the heavy imports, once
        importlib.import_module(f"lorapre_dist.training.{module}")

    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([run(job["argv"], job.get("env", {}), sys.argv[3]) for job in jobs]))


if __name__ == "__main__":
    main()
