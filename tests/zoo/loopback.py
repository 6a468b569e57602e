"""A web server on this machine that behaves, or not, as it is told."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Serves ``files`` (path -> bytes); ``manners`` (path -> name) says how.

    Attributes:
        requests: Method, path and ``Range`` of every request, in order.
    """

    def __init__(self):
        self.files = {}
        self.manners = {}
        self.requests = []
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), self._handler())
        self._server.daemon_threads = True
        self.address = f'http://127.0.0.1:{self._server.server_address[1]}'
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def _handler(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, self.headers.get('Range')))
                outer.answer(self)

            def log_message(self, *args):
                pass

        return Handler

    def answer(self, request):
        manner = self.manners.get(request.path, '')
        if manner.startswith('redirect '):
            request.send_response(302)
            request.send_header('Location', manner.removeprefix('redirect '))
            request.end_headers()
            return
        if manner == 'busy once':
            self.manners[request.path] = ''
            request.send_error(503)
            return
        data = self.files.get(request.path)
        if data is None:
            request.send_error(404)
            return
        if manner == 'page':
            data = b'<!DOCTYPE html><html>Are you sure?</html>'
        self._send(request, data, manner)

    def _send(self, request, data, manner):
        start = 0
        tag = f'"{hash(data)}"'
        asked = request.headers.get('Range')
        if (
            asked
            and manner != 'no ranges'
            and request.headers.get('If-Range', tag) == tag
        ):
            start = int(asked.removeprefix('bytes=').rstrip('-'))
        request.send_response(206 if start else 200)
        length = len(data) - start
        if manner == 'too long':
            length += 10
        request.send_header('Content-Length', str(length))
        request.send_header('ETag', tag)
        if start:
            place = f'bytes {start}-{len(data) - 1}/{len(data)}'
            request.send_header('Content-Range', place)
        if manner.startswith('named '):
            name = manner.removeprefix('named ')
            request.send_header('Content-Disposition', f'attachment; filename="{name}"')
        request.end_headers()
        body = data[start:]
        if manner == 'breaks once':
            self.manners[request.path] = ''
            body = body[: len(body) // 2]
        if manner == 'breaks':
            body = body[: len(body) // 2]
        if manner == 'slow':
            for i in range(0, len(body), len(body) // 20 + 1):
                request.wfile.write(body[i : i + len(body) // 20 + 1])
                request.wfile.flush()
                time.sleep(0.1)
            return
        request.wfile.write(body)
