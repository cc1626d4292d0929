"""The front of all launchers: check, write what the launcher reads, start, pass signals on, say how it ended."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

from lorapre_dist.config import ConfigError
from lorapre_dist.config.arguments import Parser
from lorapre_dist.launcher import checks
from lorapre_dist.launcher.commands import Launch, build, ranks_file
from lorapre_dist.launcher.settings import ClusterSettings, read_settings
from lorapre_dist.training.run.interruption import EXIT_STOPPED

LAUNCHERS = tuple(checks.PROGRAMS)


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="lorapre launch",
        description="Start lorapre pretrain on several hosts. Options that are not listed here go to it, after those "
        "of the settings file. Hosts need the same Python environment, and no clone of the repository.",
        epilog="Exit code: the ranks' (0; 75: stopped by a signal, saved, start again), 2 for bad settings or a host "
        "that is not ready. SIGTERM, SIGUSR1 and Ctrl-C make all ranks finish their step, save and end; once more ends "
        "them at once.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "settings",
        help="INI file; cluster.ini, which lorapre configs --copy DIR writes, is an example with every setting "
        "explained. Relative paths in it, and in the options, are of the present folder",
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, default="pdsh", help="default: pdsh")
    parser.add_argument("--hosts", help="use only these of the hostfile, separated by commas")
    parser.add_argument("--dry_run", action="store_true", help="print the command and start nothing; asks no host")
    parser.add_argument("--check", action="store_true", help="check this host and the others, start nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the front; the exit code is the launcher's, or 2 after one line about what is wrong."""
    try:
        args, more = build_parser().parse_known_args(argv)
        settings = read_settings(os.path.abspath(args.settings), [word for word in more if word != "--"])
        _prefer_own_programs()
        hosts = {} if args.launcher == "slurm" else _chosen(checks.read_hostfile(settings.hostfile), args.hosts)
        _check_pretrain(settings, sum(hosts.values()))
        if args.dry_run:
            return _show(build(args.launcher, settings, hosts, None))
        checks.check_programs(args.launcher)
        address = checks.check_hosts(hosts, settings) if hosts else None
        launch = build(args.launcher, settings, hosts, address)
        if args.check:
            told = ", ".join(f"{host} ({slots})" for host, slots in hosts.items()) or "Slurm will choose the hosts"
            print(f"ready: {told}", flush=True)
            return 0
        return _run(args.launcher, launch, settings, hosts)
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2


def _prefer_own_programs() -> None:
    """The ``deepspeed`` and ``ninja`` beside this Python, also where its environment is not activated."""
    own, path = os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)
    if own not in path.split(os.pathsep):
        os.environ["PATH"] = f"{own}{os.pathsep}{path}"


def _chosen(hosts: dict[str, int], names: str | None) -> dict[str, int]:
    if names is None:
        return hosts
    if unknown := [name for name in names.split(",") if name not in hosts]:
        raise ConfigError(f"--hosts {names}: {unknown[0]!r} is not in the hostfile; there: {', '.join(hosts)}")
    return {host: slots for host, slots in hosts.items() if host in names.split(",")}


def _check_pretrain(settings: ClusterSettings, world_size: int) -> None:
    """The training program's own checks, here and now; under Slurm the number of ranks is not known yet."""
    from lorapre_dist.training.run.settings import build_parser, load_settings

    if world_size:
        load_settings(settings.pretrain, world_size)
    else:
        build_parser().parse_args(settings.pretrain)


def _show(launch: Launch) -> int:
    for name, value in launch.ranks.items():
        print(f"# for every rank: {name}={value}")
    print(launch.shown())
    return 0


def _run(launcher: str, launch: Launch, settings: ClusterSettings, hosts: dict[str, int]) -> int:
    words = list(launch.words)
    if launch.ranks:
        _write_ranks_file(launch, settings)
        chosen = ranks_file(settings).with_name("hostfile")
        chosen.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
        words[words.index("--hostfile") + 1] = str(chosen)
    begun, asked = time.time(), threading.Event()
    # A session of its own: a signal to the terminal's group reaches the front alone, which knows what to do with it.
    process = subprocess.Popen(words, env=os.environ | launch.variables, start_new_session=True)

    def stop(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not hosts or asked.is_set():
            os.killpg(process.pid, number)
            return
        asked.set()
        print(f"{name}: asking the ranks on {', '.join(hosts)} to save and stop", file=sys.stderr, flush=True)
        threading.Thread(target=_ask_to_stop, args=(launch, settings, list(hosts)), daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, stop)
    code = process.wait()
    code = 128 - code if code < 0 else code
    if launcher == "mpich" and code == 0:
        code = _code_that_mpich_hides(settings, begun, asked.is_set())
    if code == 0 or launcher == "slurm":
        return code
    resumes = _newest(settings)
    print(f"ended with exit code {code}; the same command {resumes}", file=sys.stderr, flush=True)
    return code


def _write_ranks_file(launch: Launch, settings: ClusterSettings) -> None:
    # DeepSpeed reads "NAME=value" from each line and knows no comments.
    lines = [f"{name}={value}\n" for name, value in launch.ranks.items()]
    ranks_file(settings).write_text("".join(lines), encoding="utf-8")


def _ask_to_stop(launch: Launch, settings: ClusterSettings, hosts: Iterable[str]) -> None:
    name, pattern = launch.stop
    command = f"pkill -{name} -f {shlex.quote(pattern)}"

    def ask(host: str) -> None:
        try:
            done = checks.ssh(host, settings, command)
            problem = " ".join(done.stderr.split()) if done.returncode > 1 else None  # 1: none is there any more
        except subprocess.TimeoutExpired:
            problem = "no answer"
        if problem is not None:
            print(f"warning: {host} could not be asked to stop: {problem}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(ask, hosts))


def _code_that_mpich_hides(settings: ClusterSettings, begun: float, asked: bool) -> int:
    """DeepSpeed starts MPICH's ranks through a helper that ends with 0 whatever became of the rank."""
    summary = settings.output_dir / "summary.json"
    if summary.is_file() and summary.stat().st_mtime >= begun:
        return 0
    return EXIT_STOPPED if asked else 1


def _newest(settings: ClusterSettings) -> str:
    names = [path.name for path in (settings.output_dir / "checkpoints").glob("step*")]
    tags = [name for name in names if re.fullmatch(r"step\d+", name)]
    return f"resumes from {max(tags)} in {settings.output_dir}" if tags else "starts from the beginning"
