"""HAProxy's process and its admin socket. Written for 2.6, Debian 12's.

The map file on disk says "nothing to the canary" and is never edited during a rollout: it is what a restarted or
reloaded balancer reads, so the safe state is the one that needs nobody. The live share, the lease and which slot is
whose are set in the balancer's memory over the admin socket, and every write is read back, because the socket has no
status codes.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.artifacts import files
from utils.exceptions import ArtefactError, BalancerError, Problem
from utils.rollout.edge.balancer import near_sockets
from utils.rollout.edge.balancer.haproxy_configuration import (
    CANDIDATE,
    LEASE,
    PRODUCTION,
    SHARE,
    SLOTS,
    Layout,
    Server,
    configuration,
    fingerprint,
)

PLACES = ("/usr/sbin/haproxy", "/usr/local/sbin/haproxy", ".haproxy/haproxy")
SAFE_MAP = f"{SHARE} 0\n{LEASE} 0\n"
MAP, DIGESTS = "control.map", "digests.map"
ROLES = (PRODUCTION, CANDIDATE)


def environment() -> dict[str, str]:
    """What HAProxy gets of our environment: its configuration language reads variables, and ours holds tokens."""
    return {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TZ") if name in os.environ}


def find_binary(setting: str) -> Path:
    """The haproxy binary. Raises ArtefactError saying how to get one, with and without root."""
    root = Path(__file__).resolve().parents[4]
    candidates = [setting] if setting else [shutil.which("haproxy") or "", *PLACES]
    for name in filter(None, candidates):
        path = Path(name) if Path(name).is_absolute() else root / name
        if os.access(path, os.X_OK) and path.is_file():
            return path
    fix = "apt-get install haproxy, or without root: sh scripts/launch/get_haproxy.sh"
    raise ArtefactError(Problem("there is no haproxy binary", setting or None, fix))


class Balancer:
    """One HAProxy under `home`: haproxy.cfg, control.map, admin.sock, master.sock, log.sock, balancer.pid."""

    def __init__(self, home: Path, binary: Path):
        self.home, self.binary = home.resolve(), binary
        self.config, self.map = self.home / "haproxy.cfg", self.home / MAP
        self.admin, self.pid_file = self.home / "admin.sock", self.home / "balancer.pid"

    def write(self, layout: Layout) -> None:
        """Replace haproxy.cfg by a checked one; raises BalancerError with HAProxy's own words when it is refused."""
        files.make_directory(self.home)
        self.make_map_safe()
        trial = self.home / "haproxy.cfg.new"
        files.write_text(trial, configuration(layout))
        self._run("refuses its configuration", "-c", "-f", trial.name)
        os.replace(trial, self.config)

    def take(self, layout: Layout) -> str:
        """Write it and make the balancer serve it."""
        self.write(layout)
        return self.activate(layout)

    def activate(self, layout: Layout) -> str:
        """Serve what was written, with share 0: "started", "reloaded", or "told" while it runs.

        Only a reload ends connections, after `reload_drain_s`; other servers and other roles need none.
        """
        if self.master() is None:
            self.start()
            how = "started"
        elif self._loaded()[0] != fingerprint(layout):
            self.reload()
            how = "reloaded"
        else:
            how = "told"
        self.tell(layout)
        return how

    def tell(self, layout: Layout) -> None:
        """Servers and roles in memory, each read back. Users never meet a moment without production."""
        if layout.canary:
            self.set(**{SHARE: 0, LEASE: 0})
        self._occupy(layout.slot, layout.production)
        self._put(MAP, **{PRODUCTION: layout.slot})
        if layout.canary:
            self._occupy(layout.candidate_slot, layout.canary)
        self._put(MAP, **{CANDIDATE: layout.candidate_slot})
        if not layout.canary:  # one slot has everyone by now, whatever the share was
            self.set(**{SHARE: 0, LEASE: 0})
            self.command(f"set server slot{1 - layout.slot}/s state maint")

    def make_map_safe(self) -> None:
        """What a start or a reload begins with is share 0, whoever edited the files."""
        for path, safe in ((self.map, SAFE_MAP), (self.home / DIGESTS, "")):
            if not path.is_file() or path.read_bytes() != safe.encode():
                files.write_text(path, safe)

    @property
    def port(self) -> int | None:
        """Where it listens by its configuration on disk."""
        with suppress(OSError, UnicodeDecodeError):
            match = re.search(
                r"^  bind 127\.0\.0\.1:(\d+)$", files.regular_bytes(self.config).decode(), flags=re.MULTILINE
            )
            return int(match[1]) if match else None
        return None

    def start(self) -> None:
        """Start the master and its worker in the background, and wait until the admin socket answers."""
        self._wait(self._port_is_free, f"another program listens on the balancer's port {self.port}", seconds=2.0)
        self.admin.unlink(missing_ok=True)  # a killed one leaves it behind
        master = ("-S", "unix@master.sock,mode,600")
        self._run("does not start", "-W", "-D", "-f", self.config.name, "-p", self.pid_file.name, *master)
        self._wait(lambda: bool(self.info().get("Pid")), "haproxy started, but its admin socket does not answer")

    def reload(self) -> None:
        """Take the configuration on disk; connections go on. Share and lease become what the map on disk says: 0."""
        before = self.info()["Pid"]
        master = self.master()
        if master is None:
            raise BalancerError(Problem("haproxy is not running", str(self.pid_file)))
        for _ in range(10):  # a master that has just started loses the signal
            os.kill(master, signal.SIGUSR2)
            with suppress(BalancerError):
                return self._wait(lambda: self.info()["Pid"] != before, "", seconds=1.0)
        raise BalancerError(Problem("haproxy did not take its new configuration", str(self.config)))

    def stop(self) -> None:
        """End the master (by the process id it wrote) and its workers."""
        master = self.master()
        if master is not None:
            os.kill(master, signal.SIGTERM)
            self._wait(lambda: self.master() is None, "haproxy does not stop")
        self.admin.unlink(missing_ok=True)

    def master(self) -> int | None:
        """Process id of the running master, or None. Its folder is checked: ids are used again by other programs."""
        try:
            pid = int(files.regular_bytes(self.pid_file).split()[0])
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            return None
        return pid if os.fsencode(self.home) in words and self.config.name.encode() in words else None

    def command(self, *commands: str, timeout_s: float = 1.0, to: str = "") -> str:
        """The answer of the admin socket, or of the socket named `to`. Raises BalancerError when none comes in time."""
        path = self.home / to if to else self.admin
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(timeout_s)
                near_sockets.connect(connection, path)
                connection.sendall((";".join(commands) + "\n").encode())
                if to:  # the master's socket stays open for more
                    connection.shutdown(socket.SHUT_WR)
                pieces = []
                while piece := connection.recv(1 << 16):
                    pieces.append(piece)
        except OSError as error:
            raise BalancerError(Problem(f"haproxy's {path.name}: {error.strerror or error}", str(path))) from error
        return b"".join(pieces).decode(errors="replace")

    def settings(self) -> dict[str, int]:
        """The live share and lease."""
        entries = self._entries()
        try:
            return {name: int(entries[name]) for name in (SHARE, LEASE)}
        except (KeyError, ValueError):
            raise BalancerError(Problem("haproxy does not show its map", str(self.map))) from None

    def set(self, **values: int) -> None:
        """Set share or lease in memory, and read them back. Raises BalancerError when they are not there."""
        self.command(*(f"set map {MAP} {name} {value}" for name, value in values.items()))
        settings = self.settings()
        if any(settings.get(name) != value for name, value in values.items()):
            raise BalancerError(Problem(f"haproxy holds {settings}, told was {values}"))

    def roles(self) -> tuple[int, int]:
        """The slots of production and of the candidate; the same one when there is no candidate."""
        entries = self._entries()
        slots = [entries[role] for role in ROLES if role in entries]
        try:
            production, candidate = map(int, slots if len(slots) == len(ROLES) else self._loaded()[1:])
        except ValueError:
            raise BalancerError(Problem("haproxy does not tell which slot is whose", str(self.map))) from None
        return production, candidate

    def info(self) -> dict[str, str]:
        """`show info` as a dictionary: Pid, Uptime_sec, DroppedLogs ..."""
        return dict(line.split(": ", 1) for line in self.command("show info").splitlines() if ": " in line)

    def statistics(self) -> dict[tuple[str, str], dict[str, str]]:
        """`show stat`: (production or canary, server) -> its columns."""
        production, candidate = self.roles()
        arms = {f"slot{candidate}": "canary", f"slot{production}": "production"}
        return {(arms.get(proxy, proxy), server): row for (proxy, server), row in self._rows().items()}

    def answers(self) -> int:
        """Requests in progress in the running worker."""
        rows = self._rows()
        return sum(int(rows[f"slot{slot}", "BACKEND"]["scur"] or 0) for slot in SLOTS)

    def open_answers(self, address: str) -> list[str]:
        """The streams that get an answer from this server, by HAProxy's names for them; not by slot: it may move."""
        try:
            where = _resolved(address)
        except BalancerError:
            return []
        matches = re.findall(
            r"^(0x[0-9a-f]+): |^  server=s .*addr=(\S+)", self.command("show sess all"), flags=re.MULTILINE
        )
        return [matches[place - 1][0] for place, (_, at) in enumerate(matches) if at == where]

    def cut(self, streams: list[str]) -> int:
        """End these streams; how many there were. A command line of HAProxy's has 16 KiB."""
        for first in range(0, len(streams), 100):
            self.command(*(f"shutdown session {stream}" for stream in streams[first : first + 100]))
        return len(streams)

    def drain(self, address: str, seconds: float) -> int:
        """Wait until no answer of this server streams, then cut the rest; how many were cut."""
        end = time.monotonic() + seconds
        while streams := self.open_answers(address):
            left = end - time.monotonic()
            if left <= 0:
                return self.cut(streams)
            time.sleep(min(left, 0.5))
        return 0

    def close_canary(self) -> None:
        """Nothing new to the canary's server, whatever the map says; what streams from it goes on."""
        production, candidate = self.roles()
        if production != candidate:
            self.command(f"set server slot{candidate}/s state maint")

    def _occupy(self, slot: int, server: Server) -> None:
        """This server in this slot, up: who calls has had an answer from it. Answers of the one before go on."""
        name, row, address = f"slot{slot}/s", self._rows()[f"slot{slot}", "s"], _resolved(server.address)
        if row["addr"] != address:
            host, port = address.rsplit(":", 1)
            self.command(f"set server {name} addr {host.strip('[]')} port {port}")
        if not row["status"].startswith("UP"):
            self.command(f"set server {name} state ready", f"set server {name} health up")
        self._put(DIGESTS, **{f"digest{slot}": server.mark})
        row = self._rows()[f"slot{slot}", "s"]
        if row["addr"] != address or not row["status"].startswith("UP"):
            raise BalancerError(Problem(f"haproxy holds {row['addr']} {row['status']}, told was {address} UP"))

    def _put(self, table: str, **values: object) -> None:
        """Entries that the map on disk does not have, read back; never a moment without the old or the new one."""
        held = self._entries(table)
        self.command(*(f"{'set' if n in held else 'add'} map {table} {n} {value}" for n, value in values.items()))
        entries = self._entries(table)
        if any(entries.get(name) != str(value) for name, value in values.items()):
            raise BalancerError(Problem(f"haproxy holds {entries}, told was {values}"))

    def _entries(self, table: str = MAP) -> dict[str, str]:
        lines = [line.split() for line in self.command(f"show map {table}").splitlines()]
        return {words[1]: words[2] for words in lines if len(words) == 3}

    def _loaded(self) -> list[str]:
        """What the running process began with: the text's fingerprint and the two slots; empty words if unknown."""
        words = self.info().get("description", "").split()
        return words if len(words) == 1 + len(SLOTS) else [""] * (1 + len(SLOTS))

    def _rows(self) -> dict[tuple[str, str], dict[str, str]]:
        text = self.command("show stat").lstrip("# ")
        return {(row["pxname"], row["svname"]): row for row in csv.DictReader(text.splitlines())}

    def _port_is_free(self) -> bool:
        """HAProxy would share it with another HAProxy, and the kernel would divide users between both."""
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", self.port or 0))
        except OSError:
            return False
        return True

    def _run(self, otherwise: str, *words: str) -> None:
        """HAProxy in its folder; every path that it is given, and that its configuration has, is relative to that."""
        command = [str(self.binary), "-C", str(self.home), *words]
        nothing = subprocess.DEVNULL
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=nothing, env=environment())
        if done.returncode:
            raise BalancerError(Problem(f"haproxy {otherwise}: {done.stderr.strip()[-600:]}"))

    @staticmethod
    def _wait(condition: Callable[[], Any], otherwise: str, seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(BalancerError, KeyError):
                if condition():
                    return
            time.sleep(0.02)
        raise BalancerError(Problem(otherwise))


def _resolved(address: str) -> str:
    """host:port with the host as a number, as HAProxy shows it. Raises BalancerError."""
    host, _, port = address.rpartition(":")
    try:
        family, *_, socket_address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    except (OSError, ValueError) as error:
        raise BalancerError(Problem(f"no such server: {error}", address)) from error
    return (
        f"[{socket_address[0]}]:{socket_address[1]}"
        if family == socket.AF_INET6
        else f"{socket_address[0]}:{socket_address[1]}"
    )
