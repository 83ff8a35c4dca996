"""HAProxy: its configuration, its admin socket, its process. Written for 2.6, Debian 12's.

The map file on disk says "nothing to the canary" and is never edited during a rollout: it is what a restarted or
reloaded balancer reads, so the safe state is the one that needs nobody. The live share and the lease are set in the
balancer's memory over the admin socket, and every write is read back, because the socket has no status codes.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.artifacts import files
from utils.exceptions import ArtefactError, BalancerError, Problem

PLACES = ("/usr/sbin/haproxy", "/usr/local/sbin/haproxy", ".haproxy/haproxy")
SHARE, LEASE = "canary_bp", "lease_until"
SAFE_MAP = f"{SHARE} 0\n{LEASE} 0\n"
# what a model is known by; nothing else may get into the configuration as one
DIGEST = re.compile(r"[0-9a-f]{64}")
# the kernel's limit for a socket's path is 108 bytes, HAProxy's own 97
LONGEST_SOCKET_PATH = 97


@dataclass(frozen=True)
class Server:
    """A model server: its address as host:port, and the digest of the model it has to serve ("" if unknown)."""

    address: str
    digest: str = ""


@dataclass(frozen=True)
class Layout:
    """Everything the configuration depends on. Without a canary all traffic goes to production."""

    production: Server
    canary: Server | None
    port: int
    session_header: str = "x-session-id"
    server_timeout_s: float = 120.0


def environment() -> dict[str, str]:
    """What HAProxy gets of our environment: its configuration language reads variables, and ours holds tokens."""
    return {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TZ") if name in os.environ}


def find_binary(wanted: str) -> Path:
    """The haproxy binary. Raises ArtefactError saying how to get one, with and without root."""
    root = Path(__file__).resolve().parents[3]
    candidates = [wanted] if wanted else [shutil.which("haproxy") or "", *PLACES]
    for name in filter(None, candidates):
        path = Path(name) if Path(name).is_absolute() else root / name
        if os.access(path, os.X_OK) and path.is_file():
            return path
    fix = "apt-get install haproxy, or without root: sh scripts/launch/get_haproxy.sh"
    raise ArtefactError(Problem("there is no haproxy binary", wanted or None, fix))


def configuration(layout: Layout, home: Path) -> str:
    """The text of haproxy.cfg. Only the two completion endpoints are reachable; retries are off, they hide errors."""
    table, lines = home / "control.map", []
    for part in (_GLOBAL, _FRONTEND, _CANARY_RULES if layout.canary else "", _BACKENDS):
        lines.append(
            part.replace("@HOME@", str(home))
            .replace("@MAP@", str(table))
            .replace("@PORT@", str(layout.port))
            .replace("@HEADER@", layout.session_header)
            .replace("@TIMEOUT@", str(max(1, round(layout.server_timeout_s * 1000))))
        )
    lines.append(_backend("production", layout.production))
    if layout.canary:
        lines.append(_backend("canary", layout.canary))
    return "\n".join(lines)


class Balancer:
    """One HAProxy under `home`: haproxy.cfg, control.map, admin.sock, log.sock, balancer.pid."""

    def __init__(self, home: Path, binary: Path):
        self.home, self.binary = home.resolve(), binary
        self.config, self.map = self.home / "haproxy.cfg", self.home / "control.map"
        self.admin, self.pid_file = self.home / "admin.sock", self.home / "balancer.pid"
        if len(str(self.admin)) + 20 > LONGEST_SOCKET_PATH:  # HAProxy appends a suffix while it binds
            fix = "choose a shorter --run.models_dir or --rollout.service"
            raise ArtefactError(Problem("the path of the balancer's socket is too long", str(self.admin), fix))

    def write(self, layout: Layout) -> None:
        """Replace haproxy.cfg by a checked one; raises BalancerError with HAProxy's own words when it is refused."""
        files.make_directory(self.home)
        self.make_map_safe()
        trial = self.home / "haproxy.cfg.new"
        files.write_text(trial, configuration(layout, self.home))
        command = [self.binary, "-c", "-q", "-f", trial]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
        if done.returncode:
            raise BalancerError(Problem(f"haproxy refuses its configuration: {done.stderr.strip()[-600:]}"))
        os.replace(trial, self.config)

    def make_map_safe(self) -> None:
        """What a start or a reload begins with is share 0, whoever edited the file."""
        if not self.map.is_file() or self.map.read_bytes() != SAFE_MAP.encode():
            files.write_text(self.map, SAFE_MAP)

    @property
    def port(self) -> int | None:
        """Where it listens by its configuration on disk."""
        with suppress(OSError, UnicodeDecodeError):
            found = re.search(r"^  bind 127\.0\.0\.1:(\d+)$", self.config.read_text(), flags=re.MULTILINE)
            return int(found[1]) if found else None
        return None

    def start(self) -> None:
        """Start the master and its worker in the background, and wait until the admin socket answers."""
        self.admin.unlink(missing_ok=True)  # a killed one leaves it behind
        command = [self.binary, "-W", "-D", "-q", "-f", self.config, "-p", self.pid_file]
        nothing = subprocess.DEVNULL
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=nothing, env=environment())
        if done.returncode:
            raise BalancerError(Problem(f"haproxy does not start: {done.stderr.strip()[-600:]}"))
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
        """Process id of the running master, or None. The name is checked: ids are used again by other programs."""
        try:
            pid = int(self.pid_file.read_text().split()[0])
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError, IndexError):
            return None
        return pid if str(self.config).encode() in command else None

    def command(self, *commands: str, timeout_s: float = 1.0) -> str:
        """The admin socket's answer. Raises BalancerError when there is none within the time."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(timeout_s)
                connection.connect(str(self.admin))
                connection.sendall((";".join(commands) + "\n").encode())
                pieces = []
                while piece := connection.recv(1 << 16):
                    pieces.append(piece)
        except OSError as error:
            raise BalancerError(
                Problem(f"haproxy's admin socket: {error.strerror or error}", str(self.admin))
            ) from error
        return b"".join(pieces).decode(errors="replace")

    def settings(self) -> dict[str, int]:
        """The live share and lease."""
        found = re.findall(rf"\b({SHARE}|{LEASE}) (\d+)\s*$", self.command(f"show map {self.map}"), flags=re.MULTILINE)
        if len(found) != 2:
            raise BalancerError(Problem("haproxy does not show its map", str(self.map)))
        return {name: int(value) for name, value in found}

    def set(self, **values: int) -> None:
        """Set share or lease in memory, and read them back. Raises BalancerError when they are not there."""
        self.command(*(f"set map {self.map} {name} {value}" for name, value in values.items()))
        found = self.settings()
        if any(found.get(name) != value for name, value in values.items()):
            raise BalancerError(Problem(f"haproxy holds {found}, told was {values}"))

    def info(self) -> dict[str, str]:
        """`show info` as a dictionary: Pid, Uptime_sec, DroppedLogs ..."""
        return dict(line.split(": ", 1) for line in self.command("show info").splitlines() if ": " in line)

    def statistics(self) -> dict[tuple[str, str], dict[str, str]]:
        """`show stat`: (proxy, server) -> its columns."""
        text = self.command("show stat").lstrip("# ")
        return {(row["pxname"], row["svname"]): row for row in csv.DictReader(text.splitlines())}

    def drain(self, *, cut: bool) -> None:
        """Nothing new to the canary's server, whatever the map says; with `cut` also end what still streams."""
        self.command("set server canary/s state maint")
        if cut:
            self.command("shutdown sessions server canary/s")

    @staticmethod
    def _wait(condition: Callable[[], Any], otherwise: str, seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(BalancerError, KeyError):
                if condition():
                    return
            time.sleep(0.02)
        raise BalancerError(Problem(otherwise))


def _backend(name: str, server: Server) -> str:
    header = ""
    if server.digest:
        if not DIGEST.fullmatch(server.digest):  # a last look: this text becomes configuration
            raise BalancerError(Problem("the digest of a model is 64 hexadecimal digits", server.digest[:80]))
        mark = "unless { res.hdr(x-model-digest) -m found }"
        header = f'\n  http-response set-header x-model-digest "{server.digest}" {mark}'
    return f"""backend {name}
  option httpchk GET /health{header}
  server s {server.address} check inter 500 fall 3 rise 2
"""


_GLOBAL = """# written by scripts/rollout.py; the share and the lease live in memory, control.map is the safe state
global
  maxconn 4096
  stats socket @HOME@/admin.sock mode 600 level admin expose-fd listeners
  log ring@requests len 1024 format raw local0
  hard-stop-after 120s
ring requests
  format raw
  maxlen 1024
  size 1048576
  timeout connect 1s
  timeout server 10s
  server sink unix@@HOME@/log.sock log-proto octet-count
defaults
  mode http
  log global
  timeout connect 2s
  timeout client 60s
  timeout server @TIMEOUT@ms
  timeout http-request 10s
  timeout http-keep-alive 30s
  retries 0
  option idle-close-on-response
  log-format '{"t":%Ts%ms,"be":"%b","st":%ST,"ts":"%ts","Tr":%Tr,"Ta":%Ta,"B":%B,"rc":"%rc","u":"%[var(txn.unit)]",\
"bp":"%[var(txn.bp)]","in":"%[var(txn.want)]"}'
"""
_FRONTEND = """frontend public
  bind 127.0.0.1:@PORT@
  acl completions method POST
  acl endpoint path -m str /v1/chat/completions /v1/completions
  http-request return status 200 content-type text/plain string ok if { method GET } { path -m str /health }
  http-request deny deny_status 404 unless completions endpoint
  http-request set-var(txn.unit) req.hdr(@HEADER@),xxh64(7) if { req.hdr(@HEADER@) -m found }
"""
_CANARY_RULES = """  http-request set-var(txn.b) req.hdr(@HEADER@),xxh32(7),mod(10000) if { req.hdr(@HEADER@) -m found }
  http-request set-var(txn.b) rand(10000) unless { req.hdr(@HEADER@) -m found }
  http-request set-var(txn.bp) str(canary_bp),map_str_int(@MAP@,0)
  http-request set-var(txn.lease) str(lease_until),map_str_int(@MAP@,0)
  acl lease_ok date(),sub(txn.lease) lt 0
  http-request set-var(txn.bp) int(0) unless lease_ok
  acl in_canary var(txn.b),sub(txn.bp) lt 0
  acl canary_up nbsrv(canary) ge 1
  http-request set-var(txn.want) str(1) if in_canary
  use_backend canary if in_canary canary_up
"""
_BACKENDS = """  default_backend production
"""
