"""
What a client of our HTTP server may not do: be slow on purpose, send without end, come in under a
name that is not the server's.

The deadlines are all of `seconds`, the server's --timeout: an idle connection, the head of a
request, a body (and more for one that is large), and taking what was sent.
"""
import ipaddress
from urllib.parse import urlsplit

import anyio
import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from extras.chat_api import Refusal

MAX_CONNECTIONS = 900    # at once: most systems let a process open 1,024 files
SLOWEST = 50_000         # bytes of a body that buy another second


class Connection(H11Protocol):
    """uvicorn's connection, with deadlines that it does not have by itself."""
    head_deadline = take_deadline = None

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self.set_head_deadline()

    def data_received(self, data):
        super().data_received(data)
        self.set_head_deadline()

    def set_head_deadline(self):
        """It runs while a head is awaited, or the rest of a request that was answered already."""
        waits = self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE
        if waits and not self.head_deadline:
            self.head_deadline = self.abort_later()
        elif not waits and self.head_deadline:
            self.head_deadline.cancel()
            self.head_deadline = None

    def abort_later(self):
        seconds = self.config.timeout_keep_alive
        return self.loop.call_later(seconds, self.transport.abort)

    def pause_writing(self):             # the client takes less than it is sent
        super().pause_writing()
        self.take_deadline = self.abort_later()

    def resume_writing(self):
        super().resume_writing()
        self.take_deadline.cancel()


async def hear(request, most, seconds):
    """A request's body. Raises Refusal if it has more than `most` bytes or comes too slowly.

    Who is refused while they still send hears nothing of it: up to four times as many are heard.
    """
    data = bytearray()
    size = 0
    try:
        with anyio.fail_after(seconds) as scope:
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    data += chunk
                if size > 4 * most:
                    break
                scope.deadline += len(chunk) / SLOWEST
    except TimeoutError as error:
        raise Refusal(f"the body of the request came too slowly, {size} bytes: {seconds} seconds "
                      f"are waited, and one more for each {SLOWEST} bytes", status=408) from error
    if size > most:
        raise Refusal(f"the request has {size / 1e6:.1f} MB; at most {most / 1e6:g} are taken",
                      status=413)
    return data


def is_reached_at(host, names):
    """Whether the Host of a request is an address, or one of these names.

    Another name may be that of a foreign page, whose owner let it point to this machine afterwards
    (DNS rebinding): to a visitor's browser, the server would be part of that page.
    """
    if set(host) & set("@/?#"):          # no name holds them, but urlsplit reads around them
        return False
    name = ""
    try:
        name = urlsplit(f"//{host}").hostname or ""      # without its port
        ipaddress.ip_address(name)
    except ValueError:
        return name in names
    return True
