"""What serves where, as the text of haproxy.cfg.

Two slots take turns: one holds production, the other the candidate. Which is which, the share and the lease are
entries of a map in HAProxy's memory, so a rollout and a promotion change them without a reload, and no answer that
streams notices. The text holds what a fresh process begins with: production alone, share 0.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from urllib.parse import quote

from utils.exceptions import BalancerError, Problem

SHARE, LEASE = "canary_bp", "lease_until"
# which slot is production's and which the candidate's; the same slot for both: there is no candidate
PRODUCTION, CANDIDATE = "production", "candidate"
SLOTS = (0, 1)
# what a model is known by; nothing else may get into the configuration as one
DIGEST = re.compile(r"[0-9a-f]{64}")
# what clients may be told as the name of a model: it becomes JSON inside the configuration
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,199}")
UNKNOWN = "unknown"
NOBODY = "127.0.0.1:9"


@dataclass(frozen=True)
class Server:
    """A model server: its address as host:port, and the digest of the model it has to serve ("" if unknown)."""

    address: str
    digest: str = ""

    @property
    def mark(self) -> str:
        """The digest as it may become configuration, or "unknown". Raises BalancerError for other text."""
        if self.digest and not DIGEST.fullmatch(self.digest):
            raise BalancerError(Problem("the digest of a model is 64 hexadecimal digits", self.digest[:80]))
        return self.digest or UNKNOWN


@dataclass(frozen=True)
class Layout:
    """Everything the configuration depends on. Without a canary all traffic goes to production."""

    production: Server
    canary: Server | None
    port: int
    session_header: str = "x-session-id"
    server_timeout_s: float = 590.0
    reload_drain_s: float = 1800.0
    models: tuple[str, ...] = ("model",)
    """What /v1/models answers."""
    slot: int = 0
    """Production's; the candidate has the other one."""

    @property
    def candidate_slot(self) -> int:
        return 1 - self.slot if self.canary else self.slot

    def server_of(self, slot: int) -> Server | None:
        return self.production if slot == self.slot else self.canary


def configuration(layout: Layout) -> str:
    """The text of haproxy.cfg. Only completions and the list of models are reachable; retries would hide errors.

    Paths are relative to the folder it is started in. `description` tells of a running process which text it has.
    """
    text = _text(layout)
    roles = {"@PRODUCTION@": str(layout.slot), "@CANDIDATE@": str(layout.candidate_slot)}
    for slot in SLOTS:
        server = layout.server_of(slot)
        roles[f"@SERVER{slot}@"] = f"{server.address if server else NOBODY}{'' if server else ' disabled'}"
        roles[f"@DIGEST{slot}@"] = server.mark if server else UNKNOWN
    return _filled(text, roles | {"@FIXED@": fingerprint(layout)})


def fingerprint(layout: Layout) -> str:
    """Of what only a reload can change: equal for layouts that differ in servers, digests and roles."""
    return hashlib.sha256(_text(layout).encode()).hexdigest()[:16]


def _text(layout: Layout) -> str:
    values = {
        "@PORT@": str(layout.port),
        "@HEADER@": layout.session_header,
        "@TIMEOUT@": str(max(1, round(layout.server_timeout_s * 1000))),
        "@DRAIN@": str(max(1, round(layout.reload_drain_s * 1000))),
        "@MODELS@": _models(layout.models),
    }
    return _filled("\n".join([_GLOBAL, _FRONTEND, *(_BACKEND.replace("@N@", str(slot)) for slot in SLOTS)]), values)


def _filled(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def _models(names: tuple[str, ...]) -> str:
    """The OpenAI list, and each of its entries by itself."""
    entries = [{"id": name, "object": "model", "created": 0, "owned_by": "rollout"} for name in names]
    answers = {"/v1/models": {"object": "list", "data": entries}}
    for name, entry in zip(names, entries, strict=True):
        if not MODEL_NAME.fullmatch(name):  # a last look: this text becomes configuration
            raise BalancerError(Problem("this name of a model cannot be told to clients", name[:80]))
        answers |= {f"/v1/models/{name}": entry, f"/v1/models/{quote(name, safe='')}": entry}
    rule = (
        "  http-request return status 200 content-type application/json string '{}' if {{ method GET }} {{ path {} }}"
    )
    return "\n".join(rule.format(json.dumps(value), path) for path, value in answers.items())


_GLOBAL = """# written by scripts/rollout.py; share, lease and roles live in memory, control.map is the safe state
global
  maxconn 4096
  description @FIXED@ @PRODUCTION@ @CANDIDATE@
  stats socket unix@admin.sock mode 600 level admin expose-fd listeners
  log ring@requests len 1024 format raw local0
  hard-stop-after @DRAIN@ms
ring requests
  format raw
  maxlen 1024
  size 1048576
  timeout connect 1s
  timeout server 10s
  server sink unix@log.sock log-proto octet-count
defaults
  mode http
  log global
  timeout connect 2s
  timeout client 60s
  timeout server @TIMEOUT@ms
  timeout http-request 10s
  timeout http-keep-alive 30s
  retries 0
  option abortonclose
  option idle-close-on-response
  log-format '{"t":%Ts%ms,"be":"%[var(txn.arm)]","st":%ST,"ts":"%ts","Tr":%Tr,"Ta":%Ta,"B":%B,"rc":"%rc",\
"u":"%[var(txn.unit)]","bp":"%[var(txn.bp)]","in":"%[var(txn.want)]"}'
"""
_FRONTEND = """frontend public
  bind 127.0.0.1:@PORT@
  acl completions method POST
  acl endpoint path -m str /v1/chat/completions /v1/completions
  http-request return status 200 content-type text/plain string ok if { method GET } { path -m str /health }
@MODELS@
  http-request deny deny_status 404 unless completions endpoint
  http-request set-var(txn.unit) req.hdr(@HEADER@),xxh64(7) if { req.hdr(@HEADER@) -m found }
  http-request set-var(txn.production) str(production),map_str_int(control.map,@PRODUCTION@)
  http-request set-var(txn.candidate) str(candidate),map_str_int(control.map,@CANDIDATE@)
  http-request set-var(txn.b) req.hdr(@HEADER@),xxh32(7),mod(10000) if { req.hdr(@HEADER@) -m found }
  http-request set-var(txn.b) rand(10000) unless { req.hdr(@HEADER@) -m found }
  http-request set-var(txn.bp) str(canary_bp),map_str_int(control.map,0)
  http-request set-var(txn.lease) str(lease_until),map_str_int(control.map,0)
  acl lease_ok date(),sub(txn.lease) lt 0
  acl no_candidate var(txn.production),sub(txn.candidate) eq 0
  http-request set-var(txn.bp) int(0) if no_candidate or !lease_ok
  acl in_canary var(txn.b),sub(txn.bp) lt 0
  acl candidate_at_0 var(txn.candidate) -m int 0
  acl up_0 nbsrv(slot0) ge 1
  acl up_1 nbsrv(slot1) ge 1
  http-request set-var(txn.want) str(1) if in_canary
  http-request set-var(txn.arm) str(production)
  http-request set-var(txn.arm) str(canary) if in_canary candidate_at_0 up_0 or in_canary !candidate_at_0 up_1
  acl to_canary var(txn.arm) -m str canary
  http-request set-var(txn.slot) var(txn.production)
  http-request set-var(txn.slot) var(txn.candidate) if to_canary
  use_backend slot0 if { var(txn.slot) -m int 0 }
  default_backend slot1
"""
# the digest is looked up when the request comes: its answer may come when the slot holds another model
_BACKEND = """backend slot@N@
  option httpchk GET /health
  http-request set-var(txn.digest) str(digest@N@),map_str(digests.map,@DIGEST@N@@)
  acl marked res.hdr(x-model-digest) -m found
  http-response set-header x-model-digest %[var(txn.digest)] unless marked or { var(txn.digest) -m str unknown }
  server s @SERVER@N@@ check inter 500 fall 3 rise 2
"""
