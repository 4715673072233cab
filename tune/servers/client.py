"""One HTTP client for all that render: whatever a server answers, it ends, and it ends in memory that there is.

An answer has so many bytes and seconds at most (`Limits`), is followed to no other host, and is told in words that are
fit for a terminal. Requests run in an event loop of the client's own, where they can be given up at any point.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import io
import json
import logging
import threading
import urllib.request
import warnings
from dataclasses import dataclass

import anyio
import httpx
from PIL import Image, UnidentifiedImageError

from ...errors import UserError, plain, quoted, without_password
from ...measure.folder import UNREADABLE, decode, first_line
from .backend import Refused

SILENCE = 600  # Seconds without a word of a job's progress until its server counts as hanging.
ALONE = 120  # Seconds without any server until the command ends.
FAILURES = 5  # Of a server that answers in between, without an image, until it is out for good.

SILENT = logging.Logger("websockets", logging.CRITICAL + 1)  # What breaks is raised, too.
FORMATS = ("PNG", "JPEG", "WEBP")  # What servers send; Pillow knows some that start other programs.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `Limits.pixels` is below it, and an error.


class Gone(Exception):
    """A server does not answer, or not as one does."""

    def __init__(self, text):
        super().__init__(plain(text))


@dataclass(frozen=True)
class Limits:
    """What an answer may take.

    quiet, total: seconds without a byte, and until it is whole. json, image, message: bytes of an answer in JSON, of an
    image, of a WebSocket's message. pixels: of an image. redirects: all on the same host.
    """

    quiet: float = 30
    total: float = 300
    json: int = 32 * 2**20  # Nothing but brackets take 28 times as much memory.
    image: int = 128 * 2**20
    message: int = 8 * 2**20
    pixels: int = 2**26
    redirects: int = 3


class Client:
    """A server at `url`, which the option named `option` gave; `example` is a right one.

    words: what a refusal in JSON says, as `words(status, told)`, or None if it is none: that raises Refused. Any other
    answer than a good one raises Gone, which names the server and what it answered. Raises UserError for no address.
    """

    def __init__(self, option, url, example, words, limits=None):
        self.words, self.limits = words, limits or Limits()
        try:
            self._url = httpx.URL(url if "//" in url else f"http://{url}")
            port = self._url.port
            if self._url.scheme not in ("http", "https") or not self._url.host or (port is not None and port > 65535):
                raise ValueError(url)
        except (httpx.InvalidURL, ValueError) as e:
            shown = quoted(without_password(url))
            raise UserError(f"{option} {shown} is not an address; give one like {example}") from e
        try:
            self._http = httpx.AsyncClient(
                verify=_ssl(),
                headers={"Accept-Encoding": "identity"},  # What is compressed has no size yet.
                timeout=self.limits.quiet,
                limits=httpx.Limits(max_keepalive_connections=0),  # A server may close those just when they are used.
            )
        except (httpx.InvalidURL, ValueError, ImportError) as e:  # Of a proxy that the environment names.
            raise UserError(f"{option} {self} cannot be asked by the proxy that is set ({plain(e)})") from e
        self._base = str(self._url.copy_with(query=None, fragment=None)).rstrip("/")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._lock, self._closed = threading.Lock(), False

    def __str__(self):
        """The address without the password."""
        url = self._url.copy_with(userinfo=b"", query=None, fragment=None)
        return plain(url, 150).rstrip("/")

    def close(self):
        """Give up what is asked, and end the event loop."""
        with self._lock:
            if self._closed:
                return
            self._closed = True

        async def give_up():
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(give_up(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    # ------------------------------------------------------------------------
    # What is asked.

    def get(self, path, **query):
        """The answer, as `read` takes it."""
        return self._answer(path, self._start(path, None, query, self.limits.json, self.limits.total))

    def post(self, path, body):
        return self._answer(path, self._start(path, body, {}, self.limits.json, self.limits.total))

    def start_post(self, path, body):
        """A post that may take as long as it takes: a Future of its answer, which `close` gives up."""
        return self._start(path, body, {}, self.limits.json, None)

    def answer_of(self, path, future):
        """As `post`, of a Future that is done."""
        return self._answer(path, future)

    def image(self, path, **query):
        """A PIL image in RGB."""
        status, kind, content = self._wait(path, self._start(path, None, query, self.limits.image, self.limits.total))
        if status >= 400:
            raise Gone(f"{self}{path} answers {status} {_excerpt(content)}")
        try:
            return read_image(content, self.limits)
        except ValueError as e:
            raise Gone(f"{self}{path} answers {kind or 'something'} that is no image to use ({e})") from e

    def read(self, path, answer, how):
        """`how` of an answer's JSON; raises Gone where it is not made like that."""
        told, excerpt = answer
        try:
            return how(told)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as e:
            raise Gone(f"{self}{path} answers {excerpt}, which is not what it should be") from e

    @contextlib.contextmanager
    def listen(self, path):
        """A connection of `websockets`, whose messages have a limit."""
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import ClientConnection, connect

        host, port = self._url.raw_host.decode(), self._url.port or {"http": 80, "https": 443}[self._url.scheme]
        proxied = urllib.request.getproxies() and not urllib.request.proxy_bypass(host)

        def at_home(sock, protocol, **options):
            if (protocol.uri.host, protocol.uri.port) != (host, port):
                raise Gone(f"{self} leads its WebSocket to another host")
            return ClientConnection(sock, protocol, **options)

        options = {"ssl": _ssl()} if self._url.scheme == "https" else {}
        if not proxied:
            options |= {"proxy": None, "address": (host, port)}  # With it no redirect leads elsewhere.
        with contextlib.ExitStack() as stack:
            try:
                socket = stack.enter_context(
                    connect(
                        self._base.replace("http", "ws", 1) + path,
                        open_timeout=self.limits.quiet,
                        ping_interval=None,
                        close_timeout=0.2,
                        logger=SILENT,
                        compression=None,
                        max_size=self.limits.message,
                        max_queue=4,
                        create_connection=at_home,
                        **options,
                    )
                )
            except (OSError, ValueError, WebSocketException) as e:
                raise Gone(f"{self} takes no WebSocket ({e})") from e
            yield socket

    # ------------------------------------------------------------------------
    # How.

    def _start(self, path, body, query, most, patience):
        """A Future of `(status, type, content)`. patience: seconds until it begins to answer, or None."""
        data = None if body is None else json.dumps(body).encode()
        with self._lock:
            if self._closed:
                raise Gone(f"{self} is not asked any more")
            if not self._thread.is_alive():
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(self._fetch(path, data, query, most, patience), self._loop)

    def _wait(self, path, future):
        try:
            return future.result()
        except concurrent.futures.CancelledError as e:
            raise Gone(f"{self}{path} is not waited for any more") from e

    def _answer(self, path, future):
        status, _, content = self._wait(path, future)
        excerpt, words = _excerpt(content), None
        try:
            told = json.loads(content) if content else None
            words = self.words(status, told) if status >= 400 else None
        except (ValueError, RecursionError) as e:
            if status < 400:
                raise Gone(f"{self}{path} answers {excerpt}, which is no JSON") from e
        if words:
            raise Refused(words)
        if status >= 400:
            raise Gone(f"{self}{path} answers {status} {excerpt}")
        return told, excerpt

    async def _fetch(self, path, data, query, most, patience):
        timeout = httpx.Timeout(self.limits.quiet, read=None if patience is None else self.limits.quiet)
        headers = {"Content-Type": "application/json"} if data else {}
        response = None
        try:
            request = self._http.build_request(
                "POST" if data else "GET",
                self._base + path,
                content=data,
                params=query or None,
                headers=headers,
                timeout=timeout,
            )
            with anyio.fail_after(patience):
                response = await self._send(request, path)
            with anyio.fail_after(self.limits.total):
                content = await self._content(response, path, most)
            return response.status_code, plain(response.headers.get("Content-Type", ""), 40), content
        except TimeoutError as e:
            raise Gone(f"{self}{path} has not answered to its end within {self.limits.total:g} s") from e
        except httpx.TimeoutException as e:
            raise Gone(f"{self} does not answer (nothing for {self.limits.quiet:g} s)") from e
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as e:
            raise Gone(f"{self} does not answer ({str(e) or type(e).__name__})") from e
        finally:
            if response is not None:
                await response.aclose()

    async def _send(self, request, path):
        """The response to a request, its content still to come, after redirects on the same host."""
        for _ in range(self.limits.redirects + 1):
            response = await self._http.send(request, stream=True)
            if response.next_request is None:
                return response
            await response.aclose()
            request, before = response.next_request, request.url
            here, there = ((u.host, u.port or u.scheme) for u in (before, request.url))
            upgraded = before.host == request.url.host and (before.scheme, request.url.scheme) == ("http", "https")
            if here != there and not upgraded:
                raise Gone(f"{self}{path} answers {response.status_code} and leads to another host, {request.url.host}")
        raise Gone(f"{self}{path} leads from one address to the next without end")

    async def _content(self, response, path, most):
        if (encoding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
            raise Gone(f"{self}{path} answers in the encoding {encoding}, which it was not asked for")
        content = bytearray()
        async for piece in response.aiter_raw():
            content += piece
            if len(content) > most:
                raise Gone(f"{self}{path} answers more than {most / 2**20:.3g} MB")
        return bytes(content)


@functools.cache
def _ssl():
    """The certificates that are trusted, which take their time to load."""
    return httpx.create_ssl_context()


def _excerpt(content):
    """The beginning of what was answered, to be told."""
    return plain(content[:200].decode(errors="replace").strip(), 80) or "nothing"


def read_image(content, limits):
    """A PIL image in RGB; raises ValueError, with the reason, for none, or one of too many pixels."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > limits.pixels:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {limits.pixels / 1e6:.3g} million")
        return decode(image)
    except UnidentifiedImageError as e:  # Pillow would name a buffer of ours.
        raise ValueError("of no format that is known, or damaged") from e
    except UNREADABLE as e:
        raise ValueError(plain(first_line(e))) from e
