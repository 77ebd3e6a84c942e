"""Which streams a service holds open, how many of them for whom, and until when: who stands still keeps nobody out."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from fedkd.errors import FedkdError

STRANGERS = "-"
"""Who asks without an account: the state of health, and the list of methods where the policy shows it."""


class Busy(FedkdError):
    """A caller has as many streams open as it may."""


class Stream:
    """One open stream. It stands still while it asks nothing, or takes no answer; not while the service is at work."""

    def __init__(self, caller: str, context: Any) -> None:
        self.caller, self.context = caller, context
        self.inside, self.sending, self.since = 0, False, time.monotonic()

    def read(self, questions: Iterator[Any]) -> Iterator[Any]:
        """Yield what the caller asks, and remember that something is at work."""
        for question in questions:
            self.inside, self.since = self.inside + 1, time.monotonic()
            yield question

    def send(self, reply: Any) -> Iterator[Any]:
        """Yield a reply, and remember until it was taken that it is on its way."""
        self.sending, self.since = True, time.monotonic()
        yield reply
        self.sending, self.inside, self.since = False, self.inside - 1, time.monotonic()

    def stands(self, now: float) -> float:
        """Return for how many seconds the caller has kept the service waiting."""
        return now - self.since if self.sending or self.inside <= 0 else 0.0


class Streams:
    """The open streams of a service.

    Args:
        most: of all callers together.
        each: of one caller.
        patience: seconds that a stream may stand still; then it is cancelled.
        ended: told of a caller whose stream was cancelled.
    """

    def __init__(self, most: int, each: int, patience: float, ended: Callable[[str], None]) -> None:
        self._most, self._each, self._patience, self._ended = most, each, patience, ended
        self._open: set[Stream] = set()
        self._count: Counter[str] = Counter()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._watch: threading.Thread | None = None

    def open(self, caller: str, context: Any) -> Stream:
        """Count a stream of ``caller``; :meth:`close` it in any case.

        Raises:
            Busy: it has too many already, or all have.
        """
        with self._lock:
            if self._count[caller] >= self._each:
                raise Busy(f"{self._each} streams of {caller} are open, the most at a time: try again in 1 s")
            if len(self._open) >= self._most:
                raise Busy(f"{self._most} streams are open, the most at a time: try again in 1 s")
            self._count[caller] += 1
            stream = Stream(caller, context)
            self._open.add(stream)
            if self._watch is None:
                self._watch = threading.Thread(target=self._end_what_stands, name="streams", daemon=True)
                self._watch.start()
        return stream

    def close(self, stream: Stream) -> None:
        """Forget a stream."""
        with self._lock:
            if stream in self._open:
                self._open.remove(stream)
                self._count[stream.caller] -= 1

    def end(self) -> None:
        """End the watch."""
        self._closed.set()

    def _end_what_stands(self) -> None:
        while not self._closed.wait(0.25):
            now = time.monotonic()
            with self._lock:
                late = [s for s in self._open if s.stands(now) > self._patience]
            for stream in late:
                stream.context.cancel()
                self.close(stream)
                self._ended(stream.caller)


class Guarded(grpc.ServerInterceptor):  # type: ignore[misc]
    """Holds what strangers may call (all but ``service``) to a few streams of little patience.

    gRPC waits in a thread for the one message of a plain call, without an end: whoever never sends it would keep the
    thread. Here such a call is a stream of one message like any other. Streams of answers to strangers are not served.
    """

    def __init__(self, streams: Streams, service: str) -> None:
        self._streams, self._service = streams, service

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None or details.method.startswith(f"/{self._service}/"):
            return handler
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                lambda requests, context: self._held(
                    context, lambda stream: handler.stream_stream(stream.read(requests), context)
                ),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.request_streaming or handler.response_streaming:
            return None

        def one(requests: Iterator[Any], context: Any) -> Any:
            def answer(stream: Stream) -> Iterator[Any]:
                request = next(stream.read(requests), None)
                if request is None:
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call ended before its message")
                yield handler.unary_unary(request, context)

            return next(self._held(context, answer))

        return grpc.stream_unary_rpc_method_handler(one, handler.request_deserializer, handler.response_serializer)

    def _held(self, context: Any, answers: Callable[[Stream], Iterator[Any]]) -> Iterator[Any]:
        try:
            stream = self._streams.open(STRANGERS, context)
        except Busy as cause:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(cause))
        try:
            for reply in answers(stream):
                yield from stream.send(reply)
        finally:
            self._streams.close(stream)
