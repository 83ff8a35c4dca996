"""A model server for tests: the OpenAI shape over asyncio, streaming, with faults that a test switches on at run time.

    python tests/rollout_stub.py PORT DIGEST        then POST /stub {"p500": 0.3} from the test

It knows the answer to "What is n?" (n), so that golden prompts have right and wrong answers.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import sys
from typing import Any

FAULTS: dict[str, float] = {}
GENERATOR = random.Random(0)


def hit(name: str) -> bool:
    return GENERATOR.random() < FAULTS.get(name, 0.0)


def answer_to(question: str) -> str:
    number = re.search(r"\d+", question)
    text = f"The answer is {number.group() if number else 'yes'}."
    if hit("wrong"):
        return "Something else entirely."
    if hit("empty"):
        return ""
    if hit("repeat"):
        return "again and again and " * 20
    if hit("refuse"):
        return "I'm sorry, but I cannot help with that."
    return text


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, digest: str) -> None:
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        while await one(reader, writer, digest):
            pass
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, digest: str) -> bool:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    method, path, _ = head.split("\r\n")[0].split(" ", 2)
    length = re.search(r"(?i)content-length: (\d+)", head)
    body = json.loads(await reader.readexactly(int(length.group(1)))) if length and int(length.group(1)) else {}
    closing = "connection: close" in head.lower()

    def reply(status: int, value: Any) -> bool:
        data = json.dumps(value).encode()
        top = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
        writer.write(f"{top}x-model-digest: {digest}\r\n\r\n".encode() + data)
        return not closing

    if path == "/health":
        return reply(200, {"status": "ok"})
    if path == "/stub":
        FAULTS.clear()
        FAULTS.update(body)
        return reply(200, FAULTS)
    if path == "/v1/models":
        return reply(200, {"data": [{"id": "model"}]})
    if method != "POST" or not path.startswith("/v1/"):
        return reply(404, {"error": "no such path"})
    if hit("hang"):
        await asyncio.sleep(3600)
    await asyncio.sleep(FAULTS.get("delay", 0.002))
    if hit("p500"):
        return reply(500, {"error": "broken"})
    if hit("p400"):
        return reply(400, {"error": "pinned to another model"})
    text = answer_to(body["messages"][-1]["content"])
    finish = "length" if hit("runaway") else "stop"
    if not body.get("stream"):
        await asyncio.sleep(6 * FAULTS.get("per_token", 0.001))
        return reply(200, {"choices": [{"message": {"content": text}, "finish_reason": finish}]})
    top = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
    writer.write(f"{top}x-model-digest: {digest}\r\n\r\n".encode())

    def send(data: str) -> None:
        event = f"data: {data}\n\n".encode()
        writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")

    if hit("sse_error"):
        send(json.dumps({"error": "out of memory"}))
    else:
        pieces = re.findall(r"\S+\s*", text)
        cut = hit("truncate")
        for piece in pieces[:2] if cut else pieces:
            await asyncio.sleep(FAULTS.get("per_token", 0.001))
            send(json.dumps({"choices": [{"delta": {"content": piece}}]}))
            await writer.drain()
        if cut:
            return False
        send(json.dumps({"choices": [{"delta": {}, "finish_reason": finish}]}))
        send("[DONE]")
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    return not closing


async def main() -> None:
    port, digest = int(sys.argv[1]), sys.argv[2]
    server = await asyncio.start_server(lambda r, w: serve(r, w, digest), "127.0.0.1", port, backlog=512)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
