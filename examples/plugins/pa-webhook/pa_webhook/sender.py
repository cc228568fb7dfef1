"""Post messages from a background thread, so that training never waits for a server."""

from __future__ import annotations

import json
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

MAX_WAITING = 100
"""If more messages wait for a slow server, the oldest are dropped."""


class Sender:
    """Posts messages one after the other during a run.

    Args:
        url: the URL to post to. No error text contains it, since anyone who has it can post.
        timeout: seconds to wait for a response.

    Attributes:
        error: the error of the last lost message; None if none was lost.
        lost: the number of lost messages.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.error: str | None = None
        self.lost = 0
        self._url, self._timeout = url, timeout
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._waiting: queue.Queue[bytes | None] = queue.Queue(MAX_WAITING)
        self._has_given_up = threading.Event()
        # A daemon, so that Python can exit while a DNS lookup hangs, which has no timeout.
        self._thread = threading.Thread(target=self._work, name="pa-webhook", daemon=True)
        self._thread.start()

    def post(self, content: Mapping[str, Any]) -> None:
        """Queue a message without waiting."""
        self._put(json.dumps(content).encode())

    def close(self) -> None:
        """Wait at most `timeout` seconds until all messages are posted; the rest is lost."""
        self._put(None)
        self._thread.join(self._timeout)
        if self._thread.is_alive():
            self._has_given_up.set()  # the thread ends after its current message
            self._lose(f"no response within {self._timeout:g} s", 1 + self._waiting.qsize())

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
                self._lose(f"the server responded {error.code} {error.reason}")
                error.close()
            except OSError as error:
                self._lose(str(getattr(error, "reason", error)))
            except Exception as error:  # http.client's and urllib's texts may contain the URL
                self._lose(type(error).__name__)

    def _lose(self, error: str, count: int = 1) -> None:
        self.error = error
        self.lost += count


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Treats a redirect as an error: following it would turn the POST into a GET."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None
