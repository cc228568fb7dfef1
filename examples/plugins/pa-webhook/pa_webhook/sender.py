"""Posts messages from a thread, so that training never waits for a server."""

from __future__ import annotations

import json
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

MOST_WAITING = 100
"""Of more messages that wait for a slow server, the oldest are dropped."""


class Sender:
    """Posts messages one after the other, as long as a run takes.

    Args:
        url: where to. It stands in no error text, since whoever has it can post.
        timeout: seconds that the server may take to answer.

    Attributes:
        error: what went wrong with the last message that was lost; None while none was.
        lost: how many messages were lost.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.error: str | None = None
        self.lost = 0
        self._url, self._timeout = url, timeout
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._waiting: queue.Queue[bytes | None] = queue.Queue(MOST_WAITING)
        self._has_given_up = threading.Event()
        # A daemon: where looking up a name hangs, which has no timeout, Python can end.
        self._thread = threading.Thread(target=self._work, name="pa-webhook", daemon=True)
        self._thread.start()

    def post(self, content: Mapping[str, Any]) -> None:
        """Hand over a message; this never waits."""
        self._put(json.dumps(content).encode())

    def close(self) -> None:
        """Wait until all is posted, `timeout` seconds at most; what is left then is lost."""
        self._put(None)
        self._thread.join(self._timeout)
        if self._thread.is_alive():
            self._has_given_up.set()  # the thread ends with the message that it is at
            self._lose(f"no answer within {self._timeout:g} s", 1 + self._waiting.qsize())

    def _put(self, body: bytes | None) -> None:
        while True:
            try:
                self._waiting.put_nowait(body)
                return
            except queue.Full:
                self._waiting.get_nowait()
                self._lose("the server is too slow")

    def _work(self) -> None:
        while (body := self._waiting.get()) is not None and not self._has_given_up.is_set():
            request = urllib.request.Request(
                self._url, body, {"Content-Type": "application/json"}, method="POST"
            )
            try:
                self._opener.open(request, timeout=self._timeout).close()
            except urllib.error.HTTPError as error:
                self._lose(f"it answers {error.code} {error.reason}")
                error.close()
            except OSError as error:
                self._lose(str(getattr(error, "reason", error)))
            except Exception as error:  # of http.client and urllib, whose texts may hold the URL
                self._lose(type(error).__name__)

    def _lose(self, error: str, count: int = 1) -> None:
        self.error = error
        self.lost += count


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Takes a redirection for an error: following it would turn the message into a GET."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None
