"""A span of OpenTelemetry for each request, below the client's and above the engine's: what `--trace` sends.

Names are those of the semantic conventions for generative AI (opentelemetry.io/docs/specs/semconv/gen-ai), which are in
development. Spans are sent in batches by a thread of the SDK's; where the collector is slow, spans are dropped, and no
request waits. No text of a user's is in them.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from peftopt.errors import BadInput, MissingEnvironment
from peftopt.gateway.lines import Line

if TYPE_CHECKING:
    from opentelemetry.trace import Span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    from opentelemetry.util.types import AnyValue

PATH = "/v1/traces"
"""Where a collector takes spans over HTTP (the OTLP specification)."""
EXPORT_S = 5.0
"""The longest that a batch of spans may take to be sent, and the end of the gateway waits for the last one."""
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}


class Traces:
    """Spans of one gateway, which users reach at `host` and `port`."""

    def __init__(self, url: str, host: str, port: int) -> None:
        """`url` of a collector, with or without its path. Raises BadInput for one that is none, MissingEnvironment
        without the libraries."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise MissingEnvironment(f"--trace needs {error.name}", "pip install 'peftopt[trace]'") from error
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=Resource.create({"service.name": "peftopt-gateway"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint(url), timeout=EXPORT_S)))
        self._tracer = self._provider.get_tracer("peftopt.gateway")
        self._context = TraceContextTextMapPropagator()
        self._server: dict[str, AnyValue] = {"server.address": host, "server.port": port}

    def begin(self, headers: Mapping[str, str], line: Line) -> Trace:
        """A request's span, a child of the one in its `traceparent`; the line gets the id of the trace."""
        from opentelemetry.trace import SpanKind, format_trace_id

        above = self._context.extract(dict(headers))
        span = self._tracer.start_span(
            "request", above, SpanKind.SERVER, attributes=self._server, start_time=int(line.at * 1e9)
        )
        line.trace_id = format_trace_id(span.get_span_context().trace_id)
        return Trace(span, self._context)

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        self._provider.force_flush(round(1e3 * EXPORT_S))
        self._provider.shutdown()


class Trace:
    """A request's span, until its end."""

    def __init__(self, span: Span, context: TraceContextTextMapPropagator) -> None:
        self._span, self._context = span, context

    def headers(self) -> dict[str, str]:
        """The headers that name this span to the engine."""
        from opentelemetry.trace import set_span_in_context

        found: dict[str, str] = {}
        self._context.inject(found, set_span_in_context(self._span))
        return found

    def end(self, line: Line, path: str, served: str, streams: bool) -> None:
        """Finish the span with the values of the request's line; `served`: the model's name at the engine."""
        from opentelemetry.trace import Status, StatusCode

        operation = OPERATIONS[path]
        self._span.update_name(f"{operation} {line.adapter}".strip())
        told: dict[str, AnyValue] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "peftopt",
            "gen_ai.request.model": line.adapter,
            "gen_ai.request.stream": streams,
            "gen_ai.response.model": served,
            "gen_ai.response.finish_reasons": (line.finish,) if line.finish else None,
            "gen_ai.response.time_to_first_chunk": None if line.ttft_ms is None else line.ttft_ms / 1e3,
            "gen_ai.usage.input_tokens": line.prompt_tokens,
            "gen_ai.usage.output_tokens": line.new_tokens or None,
            "http.response.status_code": line.status,
            "error.type": line.kind,
            "peftopt.request.id": line.request_id,
            "peftopt.adapter.version": line.version,
            "peftopt.arm": line.arm,
            "peftopt.queue_gateway_ms": round(line.queue_gateway_ms, 3),
            "peftopt.queue_engine_ms": line.queue_engine_ms,
        }
        self._span.set_attributes({name: value for name, value in told.items() if value not in (None, "", 0)})
        if line.kind:
            self._span.set_status(Status(StatusCode.ERROR, line.kind))
        self._span.end(int((line.at + line.request_duration_ms / 1e3) * 1e9))


def endpoint(url: str) -> str:
    """The URL for spans, with the usual path if it has none. Raises BadInput for a text that is not a URL."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"--trace {url!r} is not the address of a collector", "write http://127.0.0.1:4318")
    return url if parts.path.strip("/") else urllib.parse.urlunsplit(parts._replace(path=PATH))
