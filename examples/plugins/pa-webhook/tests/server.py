"""A server in a separate process: records what is posted, and responds as the path says."""

import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STATUS = {"ok": 200, "fail": 500, "moved": 302}


class Handler(BaseHTTPRequestHandler):
    """Responds to ``/ok/…``, ``/fail/…`` and ``/moved/…`` at once, to ``/slow/…`` too late."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kind, _, name = self.path.strip("/").partition("/")
        with Path(sys.argv[1], name).open("ab") as file:
            file.write(self.headers["Content-Type"].encode() + b" " + body + b"\n")
        if kind == "slow":
            time.sleep(20)
        self.send_response(STATUS.get(kind, 200))
        if kind == "moved":
            self.send_header("Location", f"/ok/{name}")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Print nothing."""


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()
