"""A stand-in for Google Cloud Storage: the part of its JSON API that TensorStore's client speaks.

Its semantics are the real service's as documented: an object is put whole or not at all and gets a
new generation; `ifGenerationMatch` (0: it must not exist) makes a put or a deletion conditional;
listings are strongly consistent and come in pages; there is nothing to append to, rename or lock.
It is not the service: no credentials, quotas, redundancy or network are tested with it.
"""

import contextlib
import http.server
import itertools
import json
import sys
import threading
import time
import urllib.parse

PAGE = 7  # names in a listing's page: more than one page is asked for


class Bucket:
    """The buckets of one server, all that a test may look at or change: {bucket/name: content}."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.lock = threading.Lock()
        self.generations = itertools.count(time.time_ns() // 1000)
        self.before = lambda kind, name: None  # called before a PUT or DELETE; True: it is lost
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> bytes:
        return self.objects[name][0]

    def __setitem__(self, name: str, content: bytes):
        with self.lock:
            self.objects[name] = content, next(self.generations)

    def __delitem__(self, name: str):
        with self.lock:
            del self.objects[name]

    def names(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", 1 << 16
    bucket: Bucket

    def log_message(self, *_):
        pass

    def _answer(self, code, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, code, why):
        self._answer(code, {"error": {"code": code, "message": why}})

    def _asked(self):
        """(bucket and name, the query); the bucket `absent` is none."""
        url = urllib.parse.urlsplit(self.path)
        self.bucket.asked.append(f"{self.command} {self.path}")
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        parts = url.path.split("/b/", 1)[1].split("/o", 1)
        name = query.get("name") or urllib.parse.unquote(parts[1].removeprefix("/"))
        return f"{parts[0]}/{name}", query

    def _matches(self, name, query):
        """Whether the preconditions hold; the lock is held."""
        generation = self.bucket.objects.get(name, (b"", 0))[1]
        wanted, unwanted = (query.get(f"ifGeneration{how}Match") for how in ("", "Not"))
        return wanted in (None, str(generation)) and unwanted != str(generation)

    def do_GET(self):
        name, query = self._asked()
        if name.endswith("/") and "/o/" not in self.path:
            self._list(name.removesuffix("/"), query)
            return
        with self.bucket.lock:
            content, generation = self.bucket.objects.get(name, (None, 0))
            matches = self._matches(name, query)
        if content is None:
            self._refuse(404, f"No such object: {name}")
        elif not matches:
            self._answer(304 if "ifGenerationNotMatch" in query else 412)
        elif query.get("alt") != "media":
            self._answer(200, {"name": name, "generation": generation, "size": str(len(content))})
        elif "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last or len(content)), len(content) - 1)
            if first > last:
                self._refuse(416, "no such bytes")
                return
            span = f"bytes {first}-{last}/{len(content)}"
            self._answer(
                206, content[first : last + 1], Content_Range=span, x_goog_generation=generation
            )
        else:
            self._answer(200, content, x_goog_generation=generation)

    def _list(self, bucket, query):
        if bucket == "absent":
            self._refuse(404, "The specified bucket does not exist.")
            return
        names = [name.removeprefix(f"{bucket}/") for name in self.bucket.names(f"{bucket}/")]
        names = [name for name in names if name.startswith(query.get("prefix", ""))]
        names = [name for name in names if name >= query.get("startOffset", "")]
        if end := query.get("endOffset"):
            names = [name for name in names if name < end]
        after = query.get("pageToken", "")
        names = [name for name in names if name > after or not after]
        found = {"items": [{"name": name, "size": "0"} for name in names[:PAGE]]}
        if len(names) > PAGE:
            found["nextPageToken"] = names[PAGE - 1]
        self._answer(200, found)

    def do_POST(self):
        name, query = self._asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.path.startswith("/upload/") or query.get("uploadType") != "media":
            self._refuse(400, f"the stand-in does not do {self.path}")
        elif name.startswith("absent/"):
            self._refuse(404, "The specified bucket does not exist.")
        elif name.startswith("forbidden/"):
            self._refuse(403, "does not have storage.objects.create access")
        else:
            if self.bucket.before("PUT", name):
                self.close_connection = True
                return
            with self.bucket.lock:
                if matches := self._matches(name, query):
                    generation = next(self.bucket.generations)
                    self.bucket.objects[name] = content, generation
            if matches:
                self._answer(200, {"name": name, "generation": str(generation)})
            else:
                self._refuse(412, "conditionNotMet")

    def do_DELETE(self):
        name, query = self._asked()
        if self.bucket.before("DELETE", name):
            self.close_connection = True
            return
        with self.bucket.lock:
            known, matches = name in self.bucket.objects, self._matches(name, query)
            if known and matches:
                del self.bucket.objects[name]
        code = 204 if known and matches else 412 if known else 404
        self._answer(code) if code == 204 else self._refuse(code, "conditionNotMet or not there")


@contextlib.contextmanager
def serving():
    """(the buckets, the environment in which gs:// means them), served while the block lasts."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    with _Server(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield bucket, {"TENSORSTORE_GCS_HTTP_URL": url, "no_proxy": "127.0.0.1,localhost"}
        finally:
            server.shutdown()
            thread.join()
