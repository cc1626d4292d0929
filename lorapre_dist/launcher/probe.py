"""What one host has, as a line of JSON: ``python -m lorapre_dist.launcher.probe``, which imports nothing heavy."""

from __future__ import annotations

import argparse
import fcntl
import glob
import hashlib
import json
import os
import platform
import socket
import struct
from importlib import metadata

from lorapre_dist.config import shipped

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy", "mpi4py")
SIOCGIFADDR = 0x8915


def address(interface: str) -> str | None:
    """IPv4 address of a network interface, None if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            return socket.inet_ntoa(fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, request)[20:24])
        except OSError:
            return None


def version(package: str) -> str | None:
    """Installed version, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def port_is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def sources() -> str:
    """Digest of the package's source files: an old copy on one host trains something else."""
    digest, folder = hashlib.sha256(), shipped.package()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def probe(interface: str, port: int, shared: str) -> dict[str, object]:
    """Everything that :mod:`lorapre_dist.launcher.checks` compares; ``shared`` is a file that all hosts must see."""
    return {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "sources": sources(),
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "address": address(interface) if interface else None,
        "port_is_free": port_is_free(port),
        "devices": len(glob.glob("/dev/nvidia[0-9]*")),
        "sees_shared": os.path.exists(shared) if shared else True,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--interface", default="")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--shared", default="")
    print(json.dumps(probe(**vars(parser.parse_args()))))
