"""A small server in process, with faults to order: what it does to a request is the request's model name.

It speaks OpenAI's two forms, llama.cpp's /completion, TGI's /generate_stream and MII's REST form, as their published
schemas have them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.threads import listening

GOOD = ("base", "support", "sales")
FAULTS = ("silent", "stall", "reset", "garbage", "early", "plain", "broken", "refused", "burst", "said")
METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="base"}} {running}
vllm:num_requests_waiting{{engine="0",model_name="base"}} 0.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0",model_name="base"}} 0.25
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_sum{{engine="0",model_name="base"}} {queued}
vllm:request_queue_time_seconds_count{{engine="0",model_name="base"}} {count}
"""


class Server:
    """`gap` seconds between tokens, after `first` seconds; `slots` requests at once, others wait; a strict one refuses
    fields beyond OpenAI's, and `ids=False` prompts of token ids. A leaky one computes base-model requests with an
    adapter's weights when they share a batch with its requests, as vLLM 0.32 on CPU did; a stale one answers a name
    that it has heard before with the weights that were loaded then, and a sticky one after its unload too. Without
    `loads` it knows no way to load adapters. The weights of the `resident` names that were asked last are at hand; any
    other's first token takes `swap` seconds more. A connection is let go of, without a word, after `keeps` requests.
    Until `meeting` requests have been worked on at once, each waits for the others, a second at most. A server that
    is `caching` keeps prompts: "own" finds what the same weights have left, "shared" what any have; what others have
    left makes half of the answer. Then it tells that 4 of 7 prompt tokens were there. A `cache_salt` keeps prompts
    apart, as in vLLM, and `cache_prompt: false` finds none, as in llama.cpp; a `picky` one refuses both. One that
    `drifts` has other weights after so many requests."""

    def __init__(
        self,
        gap: float = 0.001,
        first: float = 0.002,
        slots: int = 1000,
        strict: bool = False,
        ids: bool = True,
        models: tuple[str, ...] = (*GOOD, *FAULTS),
        leaky: bool = False,
        loads: bool = True,
        stale: bool = False,
        sticky: bool = False,
        resident: int = 1000,
        swap: float = 0.0,
        keeps: int = 1000,
        meeting: int = 1,
        caching: str = "",
        picky: bool = False,
        drifts: int = 1_000_000,
    ) -> None:
        self.drifts = drifts
        self.caching, self.picky, self.kept = caching, picky, dict[tuple[str, ...], str]()
        self.keeps = keeps
        self.meeting, self.met = meeting, asyncio.Event()
        self.gap, self.first, self.strict, self.ids, self.models = gap, first, strict, ids, models
        self.loads, self.stale, self.sticky = loads, stale, sticky
        self.resident, self.swap = deque[str](maxlen=resident), swap
        self.loaded: dict[str, str] = {}
        self.first_weights: dict[str, str] = {}
        self.leaky, self.batch = leaky, Counter[str]()
        self.slots = asyncio.Semaphore(slots)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.seen: Counter[str] = Counter()
        self.running = 0
        self.most = 0
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kept = 0
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if (kept := kept + 1) > self.keeps:
                    break
                text = head.decode()
                method, path, _ = text.split("\r\n")[0].split(" ")
                length = next((int(x[15:]) for x in text.lower().split("\r\n") if x.startswith("content-length:")), 0)
                body = json.loads(await reader.readexactly(length)) if length else {}
                self.headers.append(text)
                if not await self.answer(method, path, body, writer):
                    break
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, method: str, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays open."""
        if path == "/v1/models":
            listed = [{"id": m, "object": "model", "owned_by": "vllm"} for m in self.models]
            return self.whole(writer, 200, {"object": "list", "data": listed})
        if path == "/health":
            return self.whole(writer, 200, {})
        if path == "/metrics":
            text = METRICS.format(running=self.running, queued=0.01 * len(self.bodies), count=len(self.bodies))
            return self.whole(writer, 200, text, "text/plain")
        if method != "POST":
            return self.whole(writer, 404, {"detail": "Not Found"})
        if path.endswith("_lora_adapter"):
            found = self.lora(path, body) if self.loads else (404, json.dumps({"detail": "Not Found"}))
            return self.whole(writer, *found, "text/plain")
        self.bodies.append(body)
        name = str(body.get("model") or body.get("parameters", {}).get("adapter_id") or "base")
        self.seen[name] += 1
        if name not in self.models and name not in self.loaded:
            error = {"message": f"The model `{name}` does not exist.", "type": "NotFoundError", "code": 404}
            return self.whole(writer, 404, {"error": error})
        if self.strict and "ignore_eos" in body:
            return self.whole(writer, 422, {"detail": "ignore_eos: extra fields not permitted"})
        if self.picky and {"cache_salt", "cache_prompt"} & body.keys():
            return self.whole(writer, 422, {"detail": "cache_salt: extra fields not permitted"})
        if not self.ids and isinstance(body.get("prompt"), list):
            return self.whole(writer, 400, {"error": {"message": "prompt must be a string"}})
        self.running += 1
        try:
            async with self.slots:
                return await self.generate(path, name, body, writer)
        finally:
            self.running -= 1

    def lora(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """vLLM's runtime API: its answers are plain text."""
        name = body["lora_name"]
        if "unload" in path:
            if name not in self.loaded:
                return 404, json.dumps({"error": {"message": f"The lora adapter '{name}' cannot be found."}})
            if not self.sticky:
                del self.loaded[name]
            return 200, f"Success: LoRA adapter '{name}' removed successfully."
        weights = Path(body["lora_path"], "adapter_model.safetensors")
        if not weights.exists():
            return 404, json.dumps({"error": {"message": f"No adapter found for {body['lora_path']}"}})
        now = weights.read_text()
        self.loaded[name] = self.first_weights.setdefault(name, now) if self.stale else now
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    async def generate(  # noqa: C901 (a branch for each way in which a server goes wrong)
        self, path: str, name: str, body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> bool:
        self.most = max(self.most, self.running)
        asked = ("max_tokens", "max_completion_tokens", "max_new_tokens", "n_predict")
        n = next((body[k] for k in asked if body.get(k)), body.get("parameters", {}).get("max_new_tokens", 8))
        fixed = body.get("ignore_eos", False)
        end = n if fixed else min(n, 5)
        count = self.seen[name]
        if self.most >= self.meeting:
            self.met.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.met.wait(), 1)
        if name == "broken" or (name == "refused" and count % 2 == 0) or (name == "burst" and 4 <= count < 10):
            return self.whole(writer, 503, {"error": {"message": "the engine is overloaded"}})
        if name not in self.resident:
            self.resident.append(name)
            await asyncio.sleep(self.swap)
        if name == "silent":
            await asyncio.sleep(30)
        if name == "plain":
            return self.whole(writer, 200, {"choices": [{"text": "all at once", "finish_reason": "stop"}]})
        if body.get("logprobs"):
            return await self.fingerprint(name, body, writer)
        cached = 4 if self.begun_by(name, body) else 0
        if path.startswith("/mii"):
            await asyncio.sleep(self.first)
            finish = "length" if end == n else "stop"
            texts = [
                {"generated_text": " x" * end, "prompt_length": 3, "generated_length": end, "finish_reason": finish}
                for _ in body["prompts"]
            ]
            return self.whole(writer, 200, json.dumps(texts))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await asyncio.sleep(self.first)
        for i in range(end):
            await asyncio.sleep(self.gap if i else 0)
            if i == 2 and name == "stall":
                await asyncio.sleep(30)
            if i == 2 and name == "reset":
                writer.transport.abort()
                return False
            if i == 2 and name == "garbage":
                self.chunk(writer, "data: {not json\n\n")
            if i == 2 and name == "said":
                self.chunk(writer, 'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n')
            if i == 2 and name == "early":
                writer.write(b"0\r\n\r\n")
                return False
            self.event(writer, self.token(path, name, i, end, n, body))
            await writer.drain()
        if path == "/completion":
            ended = {"stop_type": "limit" if end == n else "eos", "tokens_predicted": end, "tokens_evaluated": 7}
            ended |= {"timings": {"cache_n": cached}} if self.caching else {}
            self.event(writer, {"index": 0, "content": "", "tokens": [], "stop": True, **ended})
        elif not path.startswith("/generate"):
            usage = {"prompt_tokens": 7, "completion_tokens": end, "total_tokens": 7 + end, **self.told(cached)}
            kind = "chat.completion.chunk" if "chat" in path else "text_completion"
            self.event(writer, {"object": kind, "choices": [], "usage": usage})
            self.chunk(writer, "data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    def begun_by(self, name: str, body: dict[str, Any]) -> str:
        """Whose prompt is kept that begins this one, which is kept from now on; "" for nobody's."""
        if not self.caching or body.get("cache_prompt") is False:
            return ""
        prompt = json.dumps([body.get(form) for form in ("messages", "prompt", "inputs", "prompts")])
        weights = self.loaded.get(name, name)
        key = (weights if self.caching == "own" else "", body.get("cache_salt", ""), prompt)
        found = self.kept.get(key, "")
        self.kept.setdefault(key, weights)
        return found

    def told(self, cached: int) -> dict[str, Any]:
        return {"prompt_tokens_details": {"cached_tokens": cached}} if self.caching else {}

    async def fingerprint(self, name: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Log-probabilities that depend on the model and the prompt, with a little noise."""
        self.batch[name] += 1
        await asyncio.sleep(self.first)
        others = [other for other, n in self.batch.items() if n and other != "base"]
        self.batch[name] -= 1
        if self.leaky and name == "base" and others:
            name = others[0]
        begun = self.begun_by(name, body)
        name = self.loaded.get(name, name) + "'" * (len(self.bodies) > self.drifts)
        text, noise = body["messages"][-1]["content"], 0.004 * (len(self.bodies) % 3)
        content = []
        for i in range(body["max_tokens"]):
            parts = [(zlib.crc32(f"{weights}{text}{i}".encode()) % 1000) / 500 for weights in (name, begun or name)]
            level = sum(parts) / 2 + noise
            top = [{"token": f"t{j}", "logprob": -0.1 - level * (j + 1)} for j in range(body["top_logprobs"])]
            content.append({"token": "t0", "logprob": top[0]["logprob"], "top_logprobs": top})
        message = {"role": "assistant", "content": "x"}
        choice = {"message": message, "logprobs": {"content": content}, "finish_reason": "length"}
        usage = {"prompt_tokens": 7, **self.told(4 if begun else 0)}
        return self.whole(writer, 200, {"choices": [choice], "usage": usage})

    def token(self, path: str, name: str, i: int, end: int, n: int, body: dict[str, Any]) -> dict[str, Any]:
        last = i == end - 1
        word, finish = f" {name[0]}", ("length" if end == n else "stop") if last else None
        ids = {"token_ids": [10 + i]} if body.get("return_token_ids") else {}
        if path.startswith("/generate"):
            token = {"id": 10 + i, "text": word, "logprob": -0.1, "special": False}
            reason = "length" if end == n else "eos_token"
            details = {"finish_reason": reason, "generated_tokens": end, "seed": None, "input_length": 7}
            return {"index": i + 1, "token": token, "generated_text": word * end if last else None} | (
                {"details": details} if last else {"details": None}
            )
        if path == "/completion":
            return {"index": 0, "content": word, "tokens": [10 + i], "stop": False}
        about = {"id": "cmpl-1", "created": 1, "model": name}
        if "chat" in path:
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": finish, **ids}
            return {**about, "object": "chat.completion.chunk", "choices": [choice]}
        choice = {"index": 0, "text": word, "finish_reason": finish, **ids}
        return {**about, "object": "text_completion", "choices": [choice]}

    def whole(self, writer: asyncio.StreamWriter, status: int, data: Any, kind: str = "application/json") -> bool:
        text = data if kind == "text/plain" else json.dumps(data)
        head = f"HTTP/1.1 {status} Status\r\nContent-Type: {kind}\r\nContent-Length: {len(text.encode())}\r\n\r\n"
        writer.write((head + text).encode())
        return True

    def event(self, writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
        self.chunk(writer, f"data: {json.dumps(data)}\n\n")

    def chunk(self, writer: asyncio.StreamWriter, text: str) -> None:
        raw = text.encode()
        writer.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")


@contextmanager
def served(**settings: Any) -> Iterator[Server]:
    """A server on a port of its own, in a thread of its own."""
    server = Server(**settings)
    with listening(server.handle) as url:
        server.url = url
        yield server
