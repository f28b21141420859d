"""The queue, and the one thread that owns the model: batches of one adapter each, which take a token by turns.

A request joins when a row is free, the oldest first whatever its adapter: none waits for another adapter's batch to
end. Adapters come and go between two tokens.
"""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from peftopt import machine
from peftopt.errors import BadInput, PeftoptError
from peftopt.models.adapter import CONFIG
from peftopt.models.baked import is_baked
from peftopt.server.answer import Answer, Piece, Voice
from peftopt.server.asked import Asked, Problem, wrong

BASE = "base"
"""The name of the base, or of a merged model, unless it is told another."""


class Rows(Protocol):
    """Rows under way: see engines/_rows.py."""

    logits: Any
    joins: bool

    def step(self, tokens: Sequence[int]) -> None:
        """Give each row its next token, and compute what follows."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""

    def join(self, others: Any) -> None:
        """Take in the rows of another batch."""


class Model(Protocol):
    """A loaded model that answers in rows."""

    batches: int
    eos: frozenset[int]

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer together."""

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""

    @property
    def repetition_penalty(self) -> float:
        """What the model was made to be asked with; 1 is none."""

    def begin(self, prompts: Sequence[Sequence[int]], adapter: str) -> Rows:
        """Run prompts of one adapter."""

    def most_rows(self, name: str) -> int:
        """The most rows of a batch of an adapter; 0 = any number."""

    def virtual(self, name: str) -> int:
        """How many virtual tokens stand before each prompt of an adapter."""

    def add(self, name: str, folder: str) -> Any:
        """Load an adapter; its tokenizer."""

    def remove(self, name: str) -> None:
        """Unload an adapter."""

    def close(self) -> None:
        """Free the model's memory."""


@dataclass(eq=False)
class Job:
    """A request on its way. `adapter` is the model's name for it, which no reload shares; `pieces` what its client
    waits for: tokens, then perhaps a Problem, or None for one that was given up. `gone`: nobody waits any more."""

    answer: Answer
    adapter: str
    voice: Voice
    pieces: asyncio.Queue[Piece | Problem | None] = field(default_factory=asyncio.Queue)
    gone: bool = False


@dataclass(eq=False)
class _Batch:
    adapter: str
    rows: Rows
    jobs: list[Job]


@dataclass(eq=False)
class _Order:
    """Something to do to the model between two tokens, once no request of `adapter` is left."""

    do: Callable[[], Any]
    adapter: str | None
    done: Future[Any] = field(default_factory=Future)


@dataclass(frozen=True)
class Served:
    """A name that is served: the folder, the model's own name of it ("" = the base), its words, and how many virtual
    tokens stand before its prompts."""

    folder: str
    adapter: str
    voice: Voice
    since: int
    virtual: int = 0


class Scheduler:
    """Its methods are called in the event loop; the thread hands tokens over to it. `name`: what the base, or a merged
    model, is served as."""

    def __init__(
        self, model: Model, base: str, max_batch: int, context: int = 0, max_queued: int = 0, name: str = BASE
    ) -> None:
        self.name = name
        self.served = {name: Served(base, "", Voice(model.tokenizer), round(time.time()))}
        self.context = min(filter(None, (context, model.context)), default=0)
        """The most tokens of a prompt and its answer; 0 = any number."""
        self.counts: Counter[str] = Counter()
        """Since the start: "computed" tokens; requests "answered", "failed" and "left" by their clients."""
        self.broken = ""
        """Why nothing is computed any more."""
        self.scheduled: Callable[[float], None] = lambda seconds: None
        """Told how long each request waited."""
        self._model, self._max_batch, self._max_queued = model, max_batch, max_queued
        self._penalty = model.repetition_penalty
        self._waiting: deque[Job] = deque()
        self._batches: list[_Batch] = []
        self._orders: list[_Order] = []
        self._changing: set[str] = set()
        self._loads = 0
        self._ending = False
        self._changed = threading.Condition()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    # ---- requests, in the event loop

    def submit(self, asked: Asked) -> Job:
        """Queue a request. Raises Problem for one that cannot be answered."""
        asked = replace(asked, model=asked.model or self.name)
        known = self.served.get(asked.model)
        if known is None:
            raise Problem(404, f"The model `{asked.model}` does not exist.", "model_not_found", "model")
        field_ = "messages" if asked.chat else "prompt"
        try:
            prompt = known.voice.prompt(asked)
        except BadInput as error:
            raise wrong(field_, str(error)) from error
        new_tokens = self._room(asked, prompt, known.virtual, field_)
        asked = replace(asked, repetition_penalty=asked.repetition_penalty or self._penalty)
        job = Job(Answer(asked, prompt, new_tokens, known.voice, self._model.eos), known.adapter, known.voice)
        with self._changed:
            if self.broken:
                raise Problem(503, f"the model is gone: {self.broken}", "engine_dead")
            if self._max_queued and len(self._waiting) >= self._max_queued:
                raise Problem(503, f"{len(self._waiting)} requests wait, as many as may", "overloaded")
            self._waiting.append(job)
            self._changed.notify()
        return job

    def _room(self, asked: Asked, prompt: Sequence[int], virtual: int, field_: str) -> int:
        """How many tokens the answer may have, after so many `virtual` ones and the prompt."""
        words = self._model.vocabulary
        if not prompt or not all(0 <= token < words for token in prompt):
            what = f"a token id must be from 0 to {words - 1}" if prompt else "the prompt is empty: not one token"
            raise wrong(field_, what)
        room = self.context - virtual - len(prompt) if self.context else asked.new_tokens or 2**31
        if room < max(asked.new_tokens, 1):
            what = f"{virtual} virtual tokens, " if virtual else ""
            what += f"a prompt of {len(prompt)} tokens and {max(asked.new_tokens, 1)} new ones"
            message = f"{what} are more than the model's context of {self.context} tokens"
            raise Problem(400, message, "context_length_exceeded", field_)
        return asked.new_tokens or room

    def leave(self, job: Job) -> None:
        """Nobody waits for it any more."""
        with self._changed:
            job.gone = True
            job.pieces.put_nowait(None)
            self._changed.notify()

    @property
    def alive(self) -> bool:
        """Whether the thread is there."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Requests of which tokens are computed."""
        return sum(len(batch.jobs) for batch in list(self._batches))

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    # ---- adapters, in the event loop

    async def load(self, name: str, folder: str) -> None:
        """Serve an adapter or a baked prompt. Raises Problem, as vLLM's runtime API does, for a name that is there:
        under it may be other weights."""
        if name in self.served or name in self._changing:
            what = f"'{name}' is the base." if name == self.name else f"The lora adapter '{name}' is loaded already."
            raise Problem(400, what, "already_loaded", "lora_name")
        if not (Path(folder, CONFIG).is_file() or is_baked(folder)):
            raise Problem(404, f"No adapter found for '{name}' at {folder}", "adapter_not_found", "lora_path")
        self._changing.add(name)
        self._loads += 1
        adapter = f"adapter{self._loads}"
        try:
            tokenizer = await self._ordered(lambda: self._model.add(adapter, folder))
        except PeftoptError as error:
            raise wrong("lora_path", f"{error.message}; {error.hint}") from error
        finally:
            self._changing.discard(name)
        since, virtual = round(time.time()), self._model.virtual(adapter)
        self.served[name] = Served(folder, adapter, Voice(tokenizer), since, virtual)

    async def unload(self, name: str) -> None:
        """Serve an adapter no more, and free it when its last request is answered. Raises Problem for a name that is
        not there."""
        if name == self.name or name not in self.served:
            raise Problem(404, f"The lora adapter '{name}' cannot be found.", "adapter_not_found", "lora_name")
        adapter = self.served.pop(name).adapter
        await self._ordered(lambda: self._model.remove(adapter), adapter)
        await asyncio.to_thread(machine.give_back)  # it takes some 50 ms, which no token waits for

    async def _ordered(self, do: Callable[[], Any], adapter: str | None = None) -> Any:
        order = _Order(do, adapter)
        with self._changed:
            if self.broken:
                raise Problem(503, f"the model is gone: {self.broken}", "engine_dead")
            self._orders.append(order)
            self._changed.notify()
        return await asyncio.wrap_future(order.done)

    async def end(self, reason: str) -> None:
        """Fail what is left, and end the thread, between two tokens."""
        with self._changed:
            self._ending = True
            self.broken = self.broken or reason
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, 10.0)

    # ---- the thread

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(self._has_work)
                    if self._ending:
                        break
                    self._waiting = deque(self._still(self._waiting))
                    due = [order for order in self._orders if not self._in_use(order.adapter)]
                    self._orders = [order for order in self._orders if order not in due]
                    groups = self._admit()
                for order in due:
                    _settle(order)
                for group in groups:
                    self._begin(group)
                for batch in list(self._batches):
                    self._step(batch)
        except Exception as error:  # noqa: BLE001 (told by /health and to every request, and printed)
            traceback.print_exc()
            self.broken = _reason(error)
        self._give_up()

    def _has_work(self) -> bool:
        return bool(self._ending or self._waiting or self._batches or self._orders)

    def _in_use(self, adapter: str | None) -> bool:
        jobs = [*self._waiting, *(job for batch in self._batches for job in batch.jobs)]
        return any(job.adapter == adapter for job in jobs)

    def _still(self, jobs: Sequence[Job] | deque[Job]) -> list[Job]:
        """Those that somebody waits for."""
        stay = [job for job in jobs if not job.gone]
        self.counts["left"] += len(jobs) - len(stay)
        return stay

    def _keep(self, batch: _Batch, jobs: Sequence[Job]) -> None:
        """Drop the rows of all other jobs."""
        if not jobs:
            self._batches.remove(batch)
        elif len(jobs) < len(batch.jobs):
            batch.rows.keep([row for row, job in enumerate(batch.jobs) if job in jobs])
        batch.jobs = list(jobs)

    def _admit(self) -> list[list[Job]]:
        """Take the oldest that there is room for out of the queue, in groups of one adapter."""
        groups: dict[str, list[Job]] = {}
        free = self._max_batch - self.running
        under_way = {batch.adapter for batch in self._batches}
        for job in list(self._waiting):
            most, group = self._model.most_rows(job.adapter), groups.get(job.adapter, [])
            whole = self._model.batches and not group and len(self._batches) + len(groups) >= self._model.batches
            if free <= 0 or whole:
                break
            alone = most and (job.adapter in under_way or len(group) >= most)
            if alone or (self._model.batches and not self._fits([*group, job])):
                continue
            groups.setdefault(job.adapter, []).append(job)
            self._waiting.remove(job)
            free -= 1
        return list(groups.values())

    def _fits(self, group: Sequence[Job]) -> bool:
        """Whether rows that begin together fit a cache of one length: the longest prompt and the longest answer."""
        answers = [job.answer for job in group]
        return max(len(a.prompt) for a in answers) + max(a.new_tokens for a in answers) <= self.context

    def _begin(self, jobs: list[Job]) -> None:
        """Run the prompts of a group, and let its rows join those of their adapter."""
        if not (jobs := self._still(jobs)):
            return
        now = time.perf_counter_ns()
        for job in jobs:
            job.answer.scheduled = now
            self._told(self.scheduled, (now - job.answer.queued) / 1e9)
        adapter, answers = jobs[0].adapter, [job.answer for job in jobs]
        batch = None
        try:
            batch = _Batch(adapter, self._model.begin([answer.prompt for answer in answers], adapter), jobs)
            self._batches.append(batch)
            self._speak(batch)
        except Exception as error:  # noqa: BLE001 (whatever a forward pass raises is told to its requests)
            self._fail(jobs, error, batch)
            return
        hosts = [b for b in self._batches if b.adapter == adapter and b is not batch and b.rows.joins]
        if hosts and batch in self._batches and batch.rows.joins:
            self._join(hosts[0], batch)

    def _join(self, host: _Batch, batch: _Batch) -> None:
        self._batches.remove(batch)
        jobs = [*host.jobs, *batch.jobs]
        try:
            host.rows.join(batch.rows)
            host.jobs = jobs
        except Exception as error:  # noqa: BLE001 (as above; half joined rows are of no use)
            self._fail(jobs, error, host)

    def _step(self, batch: _Batch) -> None:
        """One more token for every row that is still waited for."""
        try:
            self._keep(batch, self._still(batch.jobs))
            if not batch.jobs:
                return
            batch.rows.step([job.answer.tokens[-1] for job in batch.jobs])
            self._speak(batch)
        except Exception as error:  # noqa: BLE001 (whatever a forward pass raises is told to its requests)
            self._fail(batch.jobs, error, batch)

    def _speak(self, batch: _Batch) -> None:
        """Choose every row's token and hand it over; rows that are done leave."""
        logits = batch.rows.logits
        best, highest = logits.float().argmax(-1).tolist(), logits.amax(-1).tolist()
        now = time.perf_counter_ns()
        self.counts["computed"] += len(batch.jobs)
        told: list[tuple[Job, Piece | Problem]] = []
        stay = []
        for row, job in enumerate(batch.jobs):
            if not math.isfinite(highest[row]):
                told.append((job, Problem(500, "the model's logits are not finite", "not_finite")))
                self.counts["failed"] += 1
                continue
            piece = job.answer.add(logits[row], best[row], now)
            told.append((job, piece))
            if not piece.finish:
                stay.append(job)
            else:
                self.counts["answered"] += 1
        self._told(_hand_over, told)
        self._keep(batch, stay)

    def _fail(self, jobs: Sequence[Job], error: Exception, batch: _Batch | None) -> None:
        """Tell requests why they end, and forget their batch."""
        self._batches = [other for other in self._batches if other is not batch]
        if isinstance(error, PeftoptError):
            problem = Problem(400, f"{error.message}; {error.hint}", "refused")
        else:
            sys.stderr.write("".join(traceback.format_exception(error)))
            problem = Problem(500, f"the model failed: {_reason(error)}", "engine_error")
        error.__traceback__ = None  # its frames hold the tensors that did not fit
        self.counts["failed"] += len(jobs)
        self._told(_hand_over, [(job, problem) for job in jobs])

    def _give_up(self) -> None:
        with self._changed:
            jobs = [*self._waiting, *(job for batch in self._batches for job in batch.jobs)]
            self._waiting.clear()
            self._batches.clear()
            orders, self._orders = self._orders, []
        problem = Problem(503, f"the server ends: {self.broken}", "server_ends")
        self._told(_hand_over, [(job, problem) for job in jobs])
        for order in orders:
            order.done.set_exception(problem)

    def _told(self, what: Callable[[Any], None], value: Any) -> None:
        self._loop.call_soon_threadsafe(what, value)


def _hand_over(told: Sequence[tuple[Job, Piece | Problem]]) -> None:
    for job, piece in told:
        job.pieces.put_nowait(piece)


def _settle(order: _Order) -> None:
    try:
        order.done.set_result(order.do())
    except Exception as error:  # noqa: BLE001 (raised where the order was given)
        order.done.set_exception(error)


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}"[:300] if text else type(error).__name__
