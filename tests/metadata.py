"""EC2's metadata service, played by a server of this process on loopback."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "token-of-a-minute"


@contextmanager
def metadata_service(
    *, version_1: bool = False, version_2: bool = True, role: str | None = None, pages: Mapping[str, str] = {}
) -> Iterator[str]:
    """The address of one that answers as EC2 does with these settings. pages: others that it has, by path."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            asked = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self.answer(200 if version_2 and asked else 403, TOKEN)

        def do_GET(self) -> None:
            if not (version_1 or self.headers["X-aws-ec2-metadata-token"] == TOKEN):
                return self.answer(401, "")
            known = {"/latest/meta-data/instance-type": "trn2.48xlarge", **pages}
            if role is not None:
                known["/latest/meta-data/iam/security-credentials/"] = role
            return self.answer(200 if self.path in known else 404, known.get(self.path, "not found"))

        def answer(self, code: int, text: str) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
