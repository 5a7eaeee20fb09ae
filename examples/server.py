"""A web server that answers, a token at a time, while weights stream. Standard library only, beside the model.

Forward passes run in threads; the event loop goes on serving. Requests that run at the same time share one stream of
weights: what one pass has read serves the others.

python examples/server.py path/to/checkpoint --memory-budget 6GiB --port 8000
curl -N "http://127.0.0.1:8000/generate?prompt=Once%20upon%20a%20time&tokens=20"
curl http://127.0.0.1:8000/report
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import odewei
from odewei.torch import init_on_demand_weights_model

LONGEST_REQUEST = 1 << 16
MOST_TOKENS = 1000


class Server:
    """One model for all requests. At most ``passes`` forward passes run at a time; others wait for a thread."""

    def __init__(self, folder: Path, memory_budget: str, passes: int) -> None:
        config = AutoConfig.from_pretrained(folder)
        self.model = init_on_demand_weights_model(
            lambda: AutoModelForCausalLM.from_config(config), folder, memory_budget=memory_budget
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.threads = ThreadPoolExecutor(passes, thread_name_prefix="forward")

    async def serve(self, host: str, port: int) -> None:
        server = await asyncio.start_server(self.answer, host, port, limit=LONGEST_REQUEST)
        print(f"http://{host}:{server.sockets[0].getsockname()[1]}", flush=True)
        async with server:
            await server.serve_forever()

    def close(self) -> None:
        self.threads.shutdown()
        odewei.close(self.model)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection. A client that has gone ends its generation after the token at hand."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.split(b"\r\n", 1)[0].decode("ascii").split(" ")
            url = urlsplit(target)
            query = parse_qs(url.query)
            if method != "GET":
                await send(writer, "405 Method Not Allowed", "only GET\n")
            elif url.path == "/report":
                report = dataclasses.asdict(odewei.report(self.model))
                await send(writer, "200 OK", json.dumps(report, default=str) + "\n")
            elif url.path == "/generate":
                tokens = min(MOST_TOKENS, int(query.get("tokens", ["20"])[0]))
                await stream(writer, self.generate(query["prompt"][0], tokens))
            else:
                await send(writer, "404 Not Found", "/generate?prompt=...&tokens=20 or /report\n")
        except (ValueError, KeyError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            await send(writer, "400 Bad Request", "this cannot be understood\n")
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the server ends: nobody awaits this task
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def generate(self, prompt: str, tokens: int) -> AsyncIterator[str]:
        """The text of one token after another."""
        loop = asyncio.get_running_loop()
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        cache = None
        for _ in range(tokens):
            ids, cache = await loop.run_in_executor(self.threads, self.step, ids, cache)
            yield self.tokenizer.decode(ids[0]) + " "

    def step(self, ids: torch.Tensor, cache: object) -> tuple[torch.Tensor, object]:
        """One forward pass, in a thread: the most likely next token, and the cache with all before it."""
        with torch.inference_mode():
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
        return output.logits[:, -1:].argmax(-1), output.past_key_values


async def send(writer: asyncio.StreamWriter, status: str, body: str) -> None:
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
    await writer.drain()


async def stream(writer: asyncio.StreamWriter, pieces: AsyncIterator[str]) -> None:
    """Each piece as soon as it is there, as a chunk of its own."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nTransfer-Encoding: chunked\r\n")
    writer.write(b"Connection: close\r\n\r\n")
    async for piece in pieces:
        data = piece.encode()
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    await writer.drain()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a language model.")
    parser.add_argument("folder", nargs="?", type=Path, help="a checkpoint of transformers, as it was downloaded")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights instead")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--passes", type=int, default=4, help="forward passes at a time")
    parser.add_argument("--memory-budget", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.tiny:
            from tiny import write_llama

            arguments.folder, arguments.memory_budget = write_llama(Path(scratch)), "400KiB"  # less than half of it
        if arguments.folder is None:
            parser.error("give a folder, or --tiny")
        server = Server(arguments.folder, arguments.memory_budget, arguments.passes)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                asyncio.run(server.serve(arguments.host, arguments.port))
        finally:
            server.close()


if __name__ == "__main__":
    main()
