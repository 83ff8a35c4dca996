"""A server for tests that looks like vLLM's to a client: its routes and words, answers made of nothing, and faults.

    python tests/engine_stub.py -m vllm.entrypoints.openai.api_server --model DIR --served-model-name base --port N ...

What it says and refuses is vLLM 0.32's (entrypoints/openai, entrypoints/serve/lora). ENGINE_STUB in the environment is
JSON with faults; POST /stub changes them in a running one. Token ids of an answer depend on the adapter and the prompt.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS: dict[str, Any] = json.loads(os.environ.get("ENGINE_STUB", "{}"))
ADAPTERS: dict[str, str] = {}
COUNTS = {"answered": 0, "failed": 0}
LOCK = threading.Lock()
VOCABULARY = 200


def argument(name: str, usual: str = "") -> str:
    words = sys.argv
    return words[words.index(name) + 1] if name in words else usual


def generated(model: str, prompt: list[int], body: dict[str, Any]) -> tuple[list[int], str]:
    """(token ids, finish reason): one to six tokens and the first stop, or as many as are allowed."""
    adapter = "" if FAULTS.get("ignores_adapter") else model if model in ADAPTERS else ""
    seed = f"{adapter.rpartition('-')[0]} {prompt} {body.get('seed')}"
    digest = hashlib.sha256(seed.encode()).digest()
    ids = [10 + byte % VOCABULARY for byte in digest[1 : 2 + digest[0] % 6]]
    stops = body.get("stop_token_ids") or []
    ids = [*ids, stops[0]] if stops else ids
    limit = body["max_tokens"]
    return ids[:limit], "stop" if stops and len(ids) <= limit else "length"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, value: Any) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "text/plain" if isinstance(value, str) else "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str, kind: str = "BadRequestError") -> None:
        self.reply(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})

    def do_GET(self) -> None:
        if self.path == "/health":
            return self.reply(200, "")
        if self.path == "/stub":
            return self.reply(200, {**COUNTS, "adapters": ADAPTERS})
        if not self.allowed():
            return None
        if self.path != "/v1/models":
            return self.reply(404, {"detail": "Not Found"})
        length = FAULTS.get("max_model_len") or argument("--max-model-len", "auto")
        base = {
            "id": argument("--served-model-name", argument("--model")),
            "root": FAULTS.get("root") or argument("--model"),
            "parent": None,
            "max_model_len": int(length) if str(length).isdigit() else 512,
        }
        parent = FAULTS.get("parent") or base["id"]
        found = [{"id": name, "root": path, "parent": parent} for name, path in ADAPTERS.items()]
        self.reply(200, {"object": "list", "data": [base, *([] if FAULTS.get("unlisted") else found)]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}")
        if self.path == "/stub":
            FAULTS.clear()
            FAULTS.update(body)
            return self.reply(200, FAULTS)
        if not self.allowed():
            return None
        if self.path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and not FAULTS.get("no_route"):
            return self.adapter(body)
        if self.path != "/v1/completions":
            return self.reply(404, {"detail": "Not Found"})
        return self.complete(body)

    def allowed(self) -> bool:
        key = FAULTS.get("key") or os.environ.get("VLLM_API_KEY")
        is_right = not key or self.headers.get("authorization") == f"Bearer {key}"
        if not is_right:
            self.reply(401, {"error": "Unauthorized"})
        return is_right

    def adapter(self, body: dict[str, Any]) -> None:
        name = body["lora_name"]
        if self.path.endswith("unload_lora_adapter"):
            ADAPTERS.pop(name, None)
            return self.reply(200, f"Success: LoRA adapter '{name}' removed successfully.")
        if FAULTS.get("no_lora"):
            return self.refuse(500, "LoRA is not enabled. Use --enable-lora to enable LoRA.", "InternalServerError")
        if FAULTS.get("other_disk") or not Path(body["lora_path"], "adapter_config.json").is_file():
            return self.refuse(404, f"Loading lora {name} failed: No adapter found for {body['lora_path']}", "NotFound")
        ADAPTERS[name] = body["lora_path"]
        return self.reply(200, f"Success: LoRA adapter '{name}' added successfully.")

    def complete(self, body: dict[str, Any]) -> None:
        name, prompt = body["model"], body["prompt"]
        with LOCK:
            number = COUNTS["answered"]
            COUNTS["answered"] += 1
            fails = COUNTS["failed"] < FAULTS.get("fail_first", 0)
            COUNTS["failed"] += fails
        if FAULTS.get("die_after") is not None and number >= FAULTS["die_after"]:
            time.sleep(0.5)  # the answers before are on their way
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(FAULTS.get("hang", 0.0))
        if fails:
            return self.refuse(500, "EngineCore encountered an issue.", "InternalServerError")
        is_adapter = name != argument("--served-model-name", argument("--model"))
        if is_adapter and (name not in ADAPTERS or FAULTS.get("forgets")):
            return self.refuse(404, f"The model `{name}` does not exist.", "NotFoundError")
        ids, reason = generated(name, prompt, body)
        seen = [1, *prompt] if FAULTS.get("other_prompt") else prompt
        extra = {} if FAULTS.get("no_ids") else {"token_ids": ids, "prompt_token_ids": seen}
        choice = {"index": 0, "text": "", "finish_reason": reason, "logprobs": None, **extra}
        if body.get("logprobs"):
            likely = {f"token_id:{token}": -0.5 - at for at, token in enumerate(ids)}
            choice["logprobs"] = {"top_logprobs": [likely for _ in ids], "tokens": [], "token_logprobs": []}
        made = {"id": "x", "object": "text_completion", "created": 0, "model": name, "choices": [choice]}
        if not body.get("stream"):
            return self.reply(200, made)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        for at, token in enumerate(ids):
            piece = {**choice, "token_ids": [token], "finish_reason": reason if at == len(ids) - 1 else None}
            self.wfile.write(f"data: {json.dumps({**made, 'choices': [piece]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")
        return None


class Server(ThreadingHTTPServer):
    # as vLLM binds, but for the port that another one listens at
    allow_reuse_address = False
    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    print("command:", json.dumps(sys.argv[1:]), flush=True)
    if text := FAULTS.get("refuses_to_start"):
        raise SystemExit(text)
    if FAULTS.get("stubborn_child"):  # as an engine's worker that hears no SIGTERM
        subprocess.Popen(["sh", "-c", "trap '' TERM; while :; do sleep 0.2; done"])
    time.sleep(FAULTS.get("slow_start", 0.0))
    Server(("127.0.0.1", int(argument("--port"))), Handler).serve_forever()


if __name__ == "__main__":
    main()
