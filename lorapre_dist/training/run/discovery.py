"""Which rank this process is, whatever started it.

``deepspeed``, ``torchrun`` and ``deepspeed --launcher mpich`` say it in RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. Under a plain ``mpirun`` (also ``deepspeed --launcher openmpi``) mpi4py is asked, under ``srun`` Slurm's
variables are read; otherwise the process is a world of its own.
"""

from __future__ import annotations

import os
import socket
import subprocess

from lorapre_dist.config import ConfigError, extras

DEFAULT_PORT = 29500


def find_ranks() -> None:
    """Complete the variables above.

    Raises:
        ConfigError: MPI's library is not mpirun's, mpi4py is missing, or Slurm's host list cannot be read.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return
    # Open MPI's name, then that of Hydra, which starts MPICH's and Intel's ranks.
    if "OMPI_COMM_WORLD_SIZE" in env or "MPI_LOCALNRANKS" in env:
        _ask_mpi()
    elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        _read_slurm()
    else:
        _alone()


def _ask_mpi() -> None:
    extras.need("mpi", why="started by mpirun")
    extras.need("deepspeed", why="started by mpirun")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"started by mpirun, but mpi4py cannot be used: {error}; install it for this MPI") from error
    from deepspeed.comm.comm import mpi_discovery

    started = int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", 1)))
    found = MPI.COMM_WORLD.Get_size()
    if found != started:
        library = MPI.Get_library_version().split(",")[0].strip()
        raise ConfigError(
            f"mpirun started {started} ranks and mpi4py sees {found}: it uses {library}, another MPI than mpirun's; "
            "make both the same (MPI4PY_MPIABI, or pip install --no-binary mpi4py mpi4py)"
        )
    # DeepSpeed would take the first address of rank 0's host, which may be of another network.
    given = os.environ.get("MASTER_ADDR")
    mpi_discovery(distributed_port=int(os.environ.get("MASTER_PORT", DEFAULT_PORT)), verbose=False)
    if given:
        os.environ["MASTER_ADDR"] = given
    # MPI has told what it knows. mpirun would take an exit without this for a crash.
    MPI.Finalize()


def _read_slurm() -> None:
    env = os.environ
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
    if missing := [name for name in names.values() if name not in env]:
        raise ConfigError(f"started by srun, but {', '.join(missing)} is not set")
    env.update({name: env[source] for name, source in names.items()})
    if "MASTER_ADDR" not in env:
        hosts = env.get("SLURM_STEP_NODELIST", "")
        command = ["scontrol", "show", "hostnames", hosts]
        try:
            listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError) as error:
            raise ConfigError(f"cannot list Slurm's hosts {hosts!r} ({error}); set MASTER_ADDR") from error
        env["MASTER_ADDR"] = listed[0]
    # Two jobs may share the first host.
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000))


def _alone() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    single = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in single.items()})
