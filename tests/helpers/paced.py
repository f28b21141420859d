"""A paced engine for the gateway's tests: OpenAI's form over plain sockets, and it notes when a client lets go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from helpers.threads import listening


class Paced:
    """`gap` seconds between tokens after `first` seconds. What it does to a request is in the prompt: "hold" never
    begins, "stall" stops after two tokens, "reset" breaks off there, "oom" is answered 500. `left`: requests whose
    client let go before their end. `folders`: the adapters loaded, by name; weights "wrong" answer as another's."""

    def __init__(self, gap: float = 0.002, first: float = 0.005, models: tuple[str, ...] = ("base",)) -> None:
        self.gap, self.first, self.models = gap, first, list(models)
        self.folders: dict[str, str] = {}
        self.seen: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.left = self.running = self.most = 0
        self.answers: Counter[str] = Counter()
        self.url = ""
        self.deaf = False
        self.says: Any = None
        """Answered to everybody in place of an answer, with `status`; None for none."""
        self.status = 200
        self.speaks: Callable[[str, str], str] = lambda name, prompt: "x"
        """What the gateway is answered that asks beside the users: the name that is asked, and the prompt."""
        self.kv_usage = 0.25
        """The share of its cache that it says is in use."""
        self.mute = False
        """Whether no log-probabilities are told."""
        self.twisted = ""
        """The model whose weights are loaded in place of those that are asked for; "" for none."""
        self.loads_held, self.loads_waiting = False, 0
        """Loads wait while they are held, and how many do."""
        self.slow: dict[str, float] = {}
        """Seconds more before the first token, by the name that is asked."""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                text = head.decode()
                method, path, _ = text.split("\r\n")[0].split(" ")
                length = next((int(x[15:]) for x in text.lower().split("\r\n") if x.startswith("content-length:")), 0)
                body = json.loads(await reader.readexactly(length)) if length else {}
                self.headers.append(text)
                await self.answered(method, path, body, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answered(
        self, method: str, path: str, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if path == "/v1/models":
            names = [*self.models, *self.folders]
            self.whole(writer, 200, {"data": [{"id": name, "owned_by": "vllm"} for name in names]})
        elif path == "/health":
            self.whole(writer, 200, {})
        elif path == "/metrics":
            metric = "vllm:kv_cache_usage_perc"
            self.whole(writer, 200, f"# TYPE {metric} gauge\n{metric} {self.kv_usage}\n", "text/plain")
        elif path.endswith("_lora_adapter"):
            self.loads_waiting += 1
            while self.loads_held and "unload" not in path:
                await asyncio.sleep(0.01)
            self.loads_waiting -= 1
            self.lora(path, body, writer)
        else:
            work = asyncio.ensure_future(self.generate(body, writer))
            gone = asyncio.ensure_future(reader.read(1))
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    self.left += 1
                    raise ConnectionError
                work.result()
            finally:
                self.running -= 1
                work.cancel()
                gone.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                    await gone

    def lora(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if "unload" in path:
            known = self.folders.pop(body["lora_name"], None)
            self.whole(writer, 200 if known else 404, "done", "text/plain")
        elif self.deaf:
            self.whole(writer, 400, {"error": {"message": "no room for another adapter"}})
        else:
            self.folders[body["lora_name"]] = self.twisted or body["lora_path"]
            self.whole(writer, 200, "done", "text/plain")

    async def generate(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.seen.append(body)
        name = body["model"]
        self.answers[name] += 1
        prompt = str(body.get("prompt") or body["messages"][-1]["content"])
        if prompt == "hold":
            await asyncio.sleep(3600)
        if self.says is not None and not body.get("logprobs"):
            self.whole(writer, self.status, self.says)
            return
        if body.get("logprobs") and not self.mute:
            self.whole(writer, 200, self.fingerprint(name, prompt, body))
            return
        if prompt == "oom":
            self.whole(writer, 500, {"error": {"message": "CUDA out of memory. Tried to allocate 2 GiB", "code": 500}})
            return
        await asyncio.sleep(self.first + self.slow.get(name, 0.0))
        tokens = body.get("max_tokens", 4)
        usage = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
        told = {"queue_time_ms": 3.0, "time_to_first_token_ms": 5.0, "generation_time_ms": 6.0}
        if not body.get("stream"):
            await asyncio.sleep(self.gap * tokens)
            choice = {"index": 0, "message": {"role": "assistant", "content": "x " * tokens}, "finish_reason": "length"}
            self.whole(writer, 200, {"model": name, "choices": [choice], "usage": usage, "metrics": told})
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.event(writer, {"model": name, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for n in range(tokens):
            if n == 2 and prompt == "stall":
                await asyncio.sleep(3600)
            if n == 2 and prompt == "reset":
                writer.transport.abort()
                raise ConnectionError
            finish = "length" if n == tokens - 1 else None
            text = "y" * body.get("width", 1)
            self.event(
                writer, {"model": name, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}
            )
            await writer.drain()
            await asyncio.sleep(self.gap)
        if (body.get("stream_options") or {}).get("include_usage"):
            self.event(writer, {"model": name, "choices": [], "usage": usage, "metrics": told})
        self.chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def fingerprint(self, name: str, prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        """Log-probabilities of the weights under the name: those of its folder, which is named by their hash."""
        weights = self.folders.get(name, name)
        content = []
        for i in range(body["max_tokens"]):
            level = (sum(map(ord, f"{weights}{prompt}{i}")) % 1000) / 100
            top = [{"token": f"t{j}", "logprob": -0.1 - level * (j + 1)} for j in range(body["top_logprobs"])]
            content.append({"token": "t0", "logprob": top[0]["logprob"], "top_logprobs": top})
        text, end = (self.speaks(name, prompt), "stop") if body.get("return_token_ids") else ("x", "length")
        return {"choices": [{"message": {"content": text}, "logprobs": {"content": content}, "finish_reason": end}]}

    def whole(self, writer: asyncio.StreamWriter, status: int, data: Any, kind: str = "application/json") -> None:
        text = (data if isinstance(data, str) else json.dumps(data)).encode()
        head = f"HTTP/1.1 {status} Status\r\nContent-Type: {kind}\r\nContent-Length: {len(text)}\r\n\r\n"
        writer.write(head.encode() + text)

    def event(self, writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
        self.chunk(writer, f"data: {json.dumps(data)}\n\n".encode())

    def chunk(self, writer: asyncio.StreamWriter, raw: bytes) -> None:
        writer.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")


@contextlib.contextmanager
def paced(**settings: Any) -> Iterator[Paced]:
    """A paced engine on a port of its own, in a thread of its own."""
    engine = Paced(**settings)
    with listening(engine.handle) as url:
        engine.url = url
        yield engine


async def main(port: int, name: str, weights: str) -> None:
    """A paced engine as a process of its own, which serves one model, with these weights."""
    engine = Paced(models=())
    engine.folders[name] = weights
    async with await asyncio.start_server(engine.handle, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
