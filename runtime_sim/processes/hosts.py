"""How the processes of a group come to be: started on this machine, or waiting on another.

Always a fresh interpreter (`subprocess`), never a fork of one that holds threads, locks and mappings.  On
another machine `tyir-rank` listens (`RankServer`); whoever knows the key may have one process started there.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Final

from tyir.diagnostics import TyirError
from tyir.runtime_sim.processes.gloo import family_of

__all__ = ["KEY", "PORT", "RankServer", "address_of", "connect", "parse_host", "start_here", "start_rank"]

PORT: Final = 29400  # of tyir-rank; as torchrun's rendezvous
KEY: Final = "TYIR_GROUP_KEY"
_PATIENCE: Final = 8.0  # seconds for a machine to be reached and to answer
_HANDSHAKE: Final = 5  # seconds for each message of the handshake


def address_of(name: str) -> str:
    """The digits of a machine's name; `TyirError` when nobody knows it."""
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise TyirError(f"there is no machine '{name}': {error.strerror}", help="give its address") from None


def parse_host(text: str) -> tuple[str, int]:
    """`b`, `b:29500` or `[fe80::1]:29500`: a machine and tyir-rank's port there."""
    name, separator, port = text.rpartition(":")
    if not separator or (":" in name and not name.startswith("[")):
        name, port = text, str(PORT)
    name = name.strip("[]")
    if not name or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise TyirError(f"'{text}' does not name a machine", help="write HOST or HOST:PORT")
    return name, int(port)


def key_for(host: str) -> bytes:
    """What both ends must know; `TyirError` where others could reach the port and there is none."""
    given = os.environ.get(KEY, "")
    if not given and not _is_loopback(host):
        raise TyirError(
            f"whoever reaches {host} could have programs run there: there is no key",
            help=f"set {KEY} to the same secret on all machines",
        )
    return given.encode() or b"loopback"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def start_rank(connected: socket.socket, host: str, folders: Sequence[Path]) -> subprocess.Popen[bytes]:
    """A process of `rank.py` that is told what to do through a connected socket, which is closed here."""
    with connected:
        descriptor = connected.fileno()
        return subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "tyir.runtime_sim.processes.rank", str(descriptor), host),
                *map(str, folders),
            ],
            stdin=subprocess.DEVNULL,
            stdout=2,  # it prints nothing, libraries might
            pass_fds=(descriptor,),
            process_group=0,  # Ctrl-C is for the first process, which ends the others
        )


def start_here(host: str, folder: Path) -> tuple[Connection, subprocess.Popen[bytes]]:
    """A process on this machine, and the connection to it."""
    ours, theirs = socket.socketpair()
    process = start_rank(theirs, host, [folder])
    return Connection(ours.detach()), process


def connect(host: str, port: int) -> Connection:
    """A process that tyir-rank starts on another machine.  `TyirError` within 10 seconds otherwise."""
    host = address_of(host)
    key = key_for(host)
    try:
        reached = socket.create_connection((host, port), _PATIENCE)
    except OSError as error:
        why = (
            f"no answer within {_PATIENCE:.0f} s"
            if isinstance(error, TimeoutError)
            else error.strerror or str(error)
        )
        raise TyirError(
            f"{host}:{port} cannot be reached: {why}",
            help=f"start tyir-rank there: tyir-rank FOLDER --host {host} --port {port}",
        ) from None
    _limit(reached, int(_PATIENCE))
    connection = Connection(reached.detach())
    try:
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
    except AuthenticationError:
        connection.close()
        raise TyirError(f"{host}:{port} has another key", help=f"set {KEY} alike on both") from None
    except (OSError, EOFError):
        connection.close()
        raise TyirError(
            f"{host}:{port} was reached and does not answer",
            help="it runs another group, or is not tyir-rank",
        ) from None
    _unlimit(connection)
    return connection


def _limit(connected: socket.socket, seconds: int) -> None:
    connected.settimeout(None)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _unlimit(connection: Connection) -> None:
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))


class RankServer:
    """Waits on a machine for groups that want a process there, one at a time."""

    def __init__(self, host: str, port: int, folders: Sequence[Path]) -> None:
        """Listens; `TyirError` when it cannot."""
        self.folders = folders
        host = address_of(host)
        self._key = key_for(host)
        try:
            self._listening = socket.create_server((host, port), family=family_of(host), backlog=4)
        except OSError as error:
            raise TyirError(
                f"cannot listen at {host}:{port}: {error.strerror}",
                help="give an address of this machine (ip -brief address), and a port that is free",
            ) from None
        self.address: tuple[str, int] = self._listening.getsockname()[:2]

    def serve_one(self) -> int:
        """Wait for a group and run its process to the end; its exit code."""
        while True:
            connected, _ = self._listening.accept()
            host = connected.getsockname()[0]  # the address that this machine has for the others
            _limit(connected, _HANDSHAKE)
            connection = Connection(os.dup(connected.fileno()))
            try:
                deliver_challenge(connection, self._key)
                answer_challenge(connection, self._key)
            except (AuthenticationError, OSError, EOFError):
                connected.close()
                continue
            finally:
                _unlimit(connection)
                connection.close()
            process = start_rank(connected, host, self.folders)
            try:
                return process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(5)

    def close(self) -> None:
        self._listening.close()
