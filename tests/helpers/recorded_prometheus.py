"""Looks at real metrics in the form of the API of a Prometheus, at the times that a test chooses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

from prometheus_client.parser import text_string_to_metric_families

from helpers.threads import listening


@contextlib.contextmanager
def recorded(texts: Sequence[str], step_s: float) -> Iterator[str]:
    """The URL of one that has these looks, a step apart, the last in the step that is now."""
    last = time.time() // step_s * step_s
    looks = {last - step_s * (len(texts) - 1 - n): text for n, text in enumerate(texts)}

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            asked = parse_qs(urlsplit(head.split(" ")[1]).query)
            start, end = float(asked["start"][0]), float(asked["end"][0])
            body = json.dumps(_answer({at: text for at, text in looks.items() if start <= at <= end})).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    with listening(handle) as url:
        yield url


def _answer(looks: dict[float, str]) -> dict[str, Any]:
    """A matrix, as query_range answers."""
    values: dict[tuple[tuple[str, str], ...], list[tuple[float, str]]] = defaultdict(list)
    for at, text in sorted(looks.items()):
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = {**sample.labels, "__name__": sample.name, "job": "gateway", "instance": "a:8000"}
                values[tuple(sorted(labels.items()))].append((at, str(sample.value)))
    result = [{"metric": dict(labels), "values": samples} for labels, samples in values.items()]
    return {"status": "success", "data": {"resultType": "matrix", "result": result}}
