"""
Letting others talk to it: a web page and an endpoint that speaks OpenAI's chat API, in one process.

    python serve.py --model out/stage2        the page at http://127.0.0.1:8000, the API at http://127.0.0.1:8000/v1

All of it is OURS, but the broader-impact section's filters of question and answer (`--moderation`). Three threads: the event
loop talks to clients; one reads what they send (decodes pictures, tokenises), so that a bad request is refused at once; one
runs the model, for one request at a time, in the order in which they came:

    request --body--> JSON --conversation--> messages --check--> Asked --in_turn--> pieces of the answer
"""
import asyncio
import base64
import copy
import io
import ipaddress
import json
import os
import random
import socket
import sys
import time
import traceback
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

import requests
import torch
import urllib3
from PIL import Image, ImageOps
try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, JSONResponse, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    sys.exit(f"error: serve.py needs starlette and uvicorn (pip install starlette uvicorn); {error}")

import attention
import sample
import toy
from data import prompt, render
from images import load_image
from records import IMAGE, PICTURES, typed_flags

HERE = os.path.dirname(os.path.abspath(__file__))
MAX_PICTURES = 16          # in a conversation
NUMBERS = {"temperature": (0, 2), "top_p": (0, 1), "max_tokens": (1, 2 ** 31), "max_completion_tokens": (1, 2 ** 31),
           "seed": (-2 ** 63, 2 ** 63 - 1), "n": (1, 1)}                     # what a request may say, and from where to where
TAKEN = {*NUMBERS, "messages", "model", "stop", "stream", "stream_options", "user"}


@dataclass(frozen=True)
class Config:
    model: str                          # checkpoint folder
    host: str = "127.0.0.1"             # 0.0.0.0 lets other machines in, and asks nobody for a password
    port: int = 8000                    # 0 is any that is free
    examples: str = None                # folder of pictures that the page offers; without it, scenes of toy.py
    temperature: float = 0.2            # where a request does not say; 0 is greedy
    top_p: float = 1.0                  # the same
    max_new_tokens: int = 512           # the same
    moderation: str = None              # an OpenAI-compatible endpoint, http://.../v1, that judges questions and answers
    allow_remote_images: bool = False   # fetch pictures from http(s) addresses, but for private ones
    max_queue: int = 64                 # requests at once, the waiting ones included
    max_per_client: int = 16            # of them from one address
    max_mb: int = 20                    # megabytes of a request, or of a fetched picture
    max_megapixels: int = 50            # of a picture, before it is decoded
    max_question: int = 4000            # characters
    template: str = None                # for a checkpoint that does not name its own
    device: str = "auto"                # cuda, mps or cpu
    dtype: str = "auto"                 # bf16, fp16 or fp32
    int8: bool = False                  # f_phi's weights in 8 bits (needs torchao)
    compile: bool = False               # one compiled decoding step: a slow start, for many answers


# ---------------------------------------------------------------------------------------------------------------------
# What is asked, and what is refused


class Refusal(Exception):
    """What a client is told, as an HTTP status and in the API's form of an error."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def error_of(error):
    """(status, {"error": ...}) of what went wrong. A ValueError is about what was sent, as everywhere in this project."""
    status = getattr(error, "status", getattr(error, "status_code", 400 if isinstance(error, ValueError) else 500))
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    message = getattr(error, "detail", str(error)) if status != 500 else "the server failed; its own output says why"
    return status, {"error": {"message": message, "type": kind, "param": getattr(error, "param", None),
                              "code": getattr(error, "code", None)}}


async def refuse(request, error):
    status, said = error_of(error)
    return JSONResponse(said, status)


class Asked(NamedTuple):
    """A request that was read and found right."""
    turns: list            # as in data.py, the last one human
    files: list            # the bytes of each picture: as small as they were sent, while they wait
    prompt: str            # the exact text
    ids: list              # and its ids
    sampling: dict         # what `Talker.stream` takes
    stop: list


def conversation(messages):
    """The API's messages as [(text, [address of each picture]), ...], user and assistant by turns. Refusal says what is wrong.

    Text is a string or parts; a user's parts may be pictures, which stand before the words of their turn, as in training.
    """
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages is not a list of messages", "messages")
    said = []
    for i, message in enumerate(messages):
        where, want = f"messages[{i}]", ("user", "assistant")[i % 2]
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role in ("system", "developer"):
            raise Refusal(400, f"{where}: the system message of this model is part of its template; leave yours out", where)
        if role != want:
            raise Refusal(400, f"{where} is from {role!r} where {want!r} belongs; messages alternate user, assistant", where)
        texts, addresses = [], []
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            match part:
                case {"type": "text", "text": str(text)}:
                    text.encode()                        # half a surrogate pair is a ValueError here
                    texts.append(text)
                case {"type": "image_url", "image_url": {"url": str(address)} | str(address)} if role == "user":
                    addresses.append(address)
                case _:
                    raise Refusal(400, f"{where}.content is neither text nor a list of text parts and, from a user, image_url "
                                       "parts", where)
        said.append(("\n".join(texts), addresses))
    if role != "user":
        raise Refusal(400, "the last message is the assistant's; one of the user belongs there", "messages")
    if (n := sum(len(addresses) for _, addresses in said)) > MAX_PICTURES:
        raise Refusal(400, f"{n} pictures; at most {MAX_PICTURES} are taken", "messages")
    return said


def check_options(asked):
    """Refusal unless what a request says beside its messages is in range; what is not known must not ask for anything."""
    for name in asked.keys() - TAKEN:
        if asked[name] not in (None, False, 0, "", [], {}, {"type": "text"}):
            raise Refusal(400, f"{name!r} is not supported; taken are {', '.join(sorted(TAKEN))}", name)
    for name, (low, high) in NUMBERS.items():
        x, kind = asked.get(name), (int, float) if name in ("temperature", "top_p") else int
        if x is not None and (isinstance(x, bool) or not isinstance(x, kind) or not low <= x <= high):
            raise Refusal(400, f"{name} {x!r}: a number from {low} to {high} belongs there", name)
    for name, kind in (("stream", bool), ("stream_options", dict)):
        if not isinstance(asked.get(name) or kind(), kind):
            raise Refusal(400, f"{name} {asked[name]!r} is not of type {kind.__name__}", name)


def stops_of(stop):
    """The API's `stop`, None, a string or up to four, as a list."""
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(s, str) and s for s in stops):
        raise Refusal(400, f"stop {stop!r}: one to four strings belong there", "stop")
    return stops


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def is_public(address):
    """Whether an IPv4 address is one of the internet's own: not private, loopback, link-local, multicast or reserved."""
    ip = ipaddress.IPv4Address(address)
    return ip.is_global and not ip.is_multicast


def fetch(address, limit, allowed=is_public):
    """The bytes of an http(s) picture. Refusal for one that is not there, is too large, or lies at a forbidden address.

    Names are resolved here, all addresses of a name are checked, and the connection goes to a checked one, so a name cannot
    change its mind in between; redirects are followed by the same rules. IPv4 alone: an IPv6 address can wrap a private one
    in many ways. `allowed` says which addresses may be asked.
    """
    deadline, at = time.time() + 30, address
    try:
        for _ in range(4):
            parts = urlsplit(at)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise Refusal(400, f"image {at!r}: not an http(s) address")
            port = parts.port or (443 if parts.scheme == "https" else 80)
            found = {info[4][0] for info in socket.getaddrinfo(parts.hostname, port, socket.AF_INET, socket.SOCK_STREAM)}
            if not all(map(allowed, found)):
                raise Refusal(400, f"image {at!r}: lies at a private or reserved address, where this server fetches nothing")
            secure = {"server_hostname": parts.hostname, "assert_hostname": parts.hostname} if parts.scheme == "https" else {}
            pool = (urllib3.HTTPSConnectionPool if secure else urllib3.HTTPConnectionPool)(found.pop(), port, **secure)
            with pool, pool.urlopen("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), redirect=False,
                                    headers={"Host": parts.netloc.rpartition("@")[2]}, retries=False, timeout=10,
                                    preload_content=False, decode_content=False) as reply:
                if reply.status in (301, 302, 303, 307, 308):
                    at = urljoin(at, reply.headers.get("Location", ""))
                    continue
                if reply.status != 200:
                    raise Refusal(400, f"image {at!r}: the reply is HTTP {reply.status}")
                got = b""
                while chunk := reply.read1(2 ** 16):
                    got += chunk
                    if len(got) > limit or time.time() > deadline:
                        raise Refusal(400, f"image {at!r}: more than {limit // 10 ** 6} MB or 30 seconds")
                return got
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
        raise Refusal(400, f"image {at!r}: {error}") from error
    raise Refusal(400, f"image {address!r}: redirected too often")


def example_pictures(folder):
    """Up to eight pictures for the page, as addresses: a folder's, else drawn scenes."""
    if folder is None:
        return [sample.data_url(toy.draw(toy.sample_scene(random.Random(seed)))) for seed in range(4)]
    names = sorted(name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in PICTURES)[:8]
    if not names:
        raise ValueError(f"--examples {folder}: no pictures in it ({' '.join(sorted(PICTURES))})")
    pictures = [load_image(os.path.join(folder, name)) for name in names]
    for picture in pictures:
        picture.thumbnail((1024, 1024))
    return [sample.data_url(picture, "JPEG") for picture in pictures]


# ---------------------------------------------------------------------------------------------------------------------
# The server


class Server:
    """An ASGI application around a `Talker`."""

    def __init__(self, args):
        self.args, self.name = args, os.path.basename(os.path.normpath(args.model))
        self.talker = sample.Talker(sample.Config(args.model, temperature=args.temperature, top_p=args.top_p, dtype=args.dtype,
                                                  max_new_tokens=args.max_new_tokens, template=args.template,
                                                  device=args.device, int8=args.int8, compile=args.compile))
        self.context = self.talker.model.f_phi.config.max_position_embeddings
        self.tokenizer = copy.deepcopy(self.talker.model.tokenizer)  # the reader's: one tokenizer cannot serve two threads
        self.examples = example_pictures(args.examples)
        self.reader, self.model_thread = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.line, self.open = [], Counter()                         # who waits or is answered; open requests by client
        routes = [Route("/", self.page), Route("/settings", self.settings), Route("/v1/models", self.models)]
        routes += [Route(path, to, methods=["POST"]) for path, to in (
            ("/v1/chat/completions", self.completions), ("/prompt", self.prompt), ("/attention", self.attention))]
        self.app = Starlette(routes=routes, exception_handlers={
            kind: refuse for kind in (Refusal, ValueError, HTTPException, ClientDisconnect, Exception)})

    async def __call__(self, scope, receive, send):
        """Every request comes in here. There is room for so many at once, and for so many of one client."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        client, args, request, full = scope["client"][0], self.args, Request(scope, receive), None
        if self.open.total() >= args.max_queue:
            full = f"the queue is full: {args.max_queue} requests are waiting; try again in a moment"
        elif self.open[client] >= args.max_per_client:
            full = f"{args.max_per_client} requests from {client} are under way, the limit; wait until one is answered"
        if full:
            with suppress(ClientDisconnect):
                async for _ in request.stream():                     # or the client, still sending, would not hear it
                    pass
            return await (await refuse(request, Refusal(429, full, code="queue_full")))(scope, receive, send)
        self.open[client] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.open -= Counter([client])                           # which forgets a client at zero

    # ------------------------------------------------------------------ reading

    async def body(self, request):
        """The JSON object that was sent."""
        got, size, limit = bytearray(), 0, self.args.max_mb * 10 ** 6
        async for chunk in request.stream():
            size += len(chunk)
            got += chunk if size <= limit else b""                   # too much is heard to its end, but not kept
        if size > limit:
            raise Refusal(413, f"the request has {size / 1e6:.1f} MB; at most {self.args.max_mb} are taken, pictures included")
        if not request.headers.get("content-type", "").startswith("application/json"):     # pages of others cannot send this
            raise Refusal(415, "the request is not of Content-Type application/json")
        try:
            asked = json.loads(got)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"the request is not JSON: {error}") from error
        if not isinstance(asked, dict):
            raise Refusal(400, "the request is not a JSON object")
        if asked.get("model") not in (None, self.name):
            raise Refusal(404, f"there is no model {asked['model']!r} here, but {self.name!r}", "model", "model_not_found")
        return asked

    def file(self, address, where):
        """The bytes of a picture from its address in a request."""
        if address.startswith("data:"):
            head, _, data = address.partition(",")
            try:
                if not head.endswith(";base64"):
                    raise ValueError("no ;base64, in it")
                return base64.b64decode(data, validate=True)
            except ValueError as error:
                raise Refusal(400, f"{where}: not a data address of base64 ({error})") from error
        if not self.args.allow_remote_images:
            raise Refusal(400, f"{where}: only data addresses are taken; --allow_remote_images, at the server's start, is for "
                               "http(s) ones")
        return fetch(address, self.args.max_mb * 10 ** 6)

    async def read(self, asked):
        """What a request asks, as `Asked`."""
        check_options(asked)
        said = conversation(asked.get("messages"))
        names = [f"messages[{i}], picture {n}" for i, (_, some) in enumerate(said) for n in range(1, len(some) + 1)]
        addresses = [address for _, some in said for address in some]
        files = [await asyncio.to_thread(self.file, *both) for both in zip(addresses, names)]
        return await asyncio.get_running_loop().run_in_executor(self.reader, self.check, asked, said, files, names)

    def check(self, asked, said, files, names):
        """The last of reading, in a thread of its own: everything that could stop the answer is found here."""
        turns, args = [], self.args
        for i, (text, addresses) in enumerate(said):
            if i % 2:
                turns.append({"from": "gpt", "value": text})
                continue
            if not text.strip() and not self.talker.stage_1:
                raise Refusal(400, "the question is empty; it needs words", f"messages[{i}]")
            if len(text) > args.max_question:
                raise Refusal(400, f"the question has {len(text)} characters; at most {args.max_question} are taken",
                              f"messages[{i}]", "string_above_max_length")
            turns.append(self.talker.ask(text, len(addresses)))
        pictures = [load_image(io.BytesIO(file), name) for file, name in zip(files, names)]
        ids = prompt(turns, pictures, self.tokenizer, self.talker.template, self.talker.model.view, pixels=False)["input_ids"]
        if len(ids) >= self.context:
            raise Refusal(400, f"the prompt is {len(ids)} tokens ({self.talker.model.view.said}); the model's context is "
                               f"{self.context}: start a new conversation, or ask more briefly", "messages",
                          "context_length_exceeded")
        draw = torch.Generator(self.talker.model.device)
        draw.seed() if asked.get("seed") is None else draw.manual_seed(asked["seed"])
        given = {"temperature": asked.get("temperature"), "top_p": asked.get("top_p"),
                 "max_new_tokens": asked.get("max_completion_tokens") or asked.get("max_tokens")}
        given = {name: round(x, 3) for name, x in given.items() if x is not None}    # 1e-40 would make infinities of logits
        return Asked(turns, files, "".join(text for text, _ in render(turns, self.talker.template)), ids,
                     given | {"generator": draw}, stops_of(asked.get("stop")))

    async def moderate(self, what, text):
        """Refusal if the moderation endpoint flags a text, or does not say: nothing passes unseen."""
        key = os.environ.get("OPENAI_API_KEY")
        try:
            reply = await asyncio.to_thread(requests.post, self.args.moderation.rstrip("/") + "/moderations", timeout=30,
                                            json={"input": text}, headers={"Authorization": f"Bearer {key}"} if key else {})
            reply.raise_for_status()
            results = reply.json()["results"]
            flagged = [result["flagged"] for result in results]
            reasons = sorted(name for result in results for name, yes in result.get("categories", {}).items() if yes)
            if not flagged or not all(isinstance(yes, bool) for yes in flagged):
                raise ValueError("no results in the reply")
        except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refusal(502, f"the {what} could not be moderated, so it goes no further: {error!r}") from error
        if any(flagged):
            raise Refusal(400, f"the {what} was flagged by moderation ({', '.join(reasons) or 'no category'})",
                          code="content_filter")

    # ------------------------------------------------------------------ answering

    async def in_turn(self, pieces):
        """What a generator yields, run in the model's thread when its turn has come; until then its place, an int, at least
        once a second. Whoever stops listening leaves the line; who listens slowly holds up nobody."""
        heard = asyncio.Queue()
        turn = asyncio.create_task(self.take_turn(pieces, heard.put_nowait))
        turn.add_done_callback(lambda _: heard.put_nowait(None))
        try:
            while (piece := await heard.get()) is not None:
                yield piece
            await turn                                               # raises what went wrong in it
        finally:
            turn.cancel()

    async def take_turn(self, pieces, say):
        ticket, run = asyncio.Event(), asyncio.get_running_loop().run_in_executor
        self.line.append(ticket)
        try:
            while place := self.line.index(ticket):
                say(place)
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(ticket.wait(), 1)
                ticket.clear()
            while (piece := await run(self.model_thread, next, pieces, None)) is not None:
                say(piece)
        finally:
            self.model_thread.submit(pieces.close)                   # behind a step that may still be under way
            self.line.remove(ticket)
            for other in self.line:
                other.set()

    def generate(self, asked):
        """The answer's pieces (str), then how it ended, (finish_reason, usage)."""
        pictures, new, model = [load_image(io.BytesIO(file)) for file in asked.files], [], self.talker.model
        yield from self.talker.stream(asked.turns, pictures, stop=asked.stop, ids=new, **asked.sampling)
        stopped = new[-1] in model.eos_ids or any(s in model.tokenizer.decode(new) for s in [*self.talker.stop, *asked.stop])
        yield "stop" if stopped else "length", {"prompt_tokens": len(asked.ids), "completion_tokens": len(new),
                                                "total_tokens": len(asked.ids) + len(new)}

    async def answer(self, asked):
        """Places in the line (int), then what `generate` yields; with moderation empty text, until all of it has passed."""
        hold, said = self.args.moderation, ""
        async with aclosing(self.in_turn(self.generate(asked))) as pieces:
            async for piece in pieces:
                said += piece if isinstance(piece, str) else ""
                yield "" if hold and not isinstance(piece, int) else piece
        if hold:
            await self.moderate("answer", said)
            yield said
            yield piece                                              # the last one: how it ended

    async def completions(self, request):
        """OpenAI's chat API: https://platform.openai.com/docs/api-reference/chat"""
        body = await self.body(request)
        asked, text = await self.read(body), ""
        if self.args.moderation:
            await self.moderate("question", "\n".join(turn["value"] for turn in asked.turns).replace(IMAGE, "").strip())
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if body.get("stream"):
            usage = (body.get("stream_options") or {}).get("include_usage")
            return StreamingResponse(self.events(asked, head, usage), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        async with aclosing(self.answer(asked)) as pieces:
            async for piece in pieces:
                text += piece if isinstance(piece, str) else ""
                if await request.is_disconnected():
                    raise ClientDisconnect
        reason, usage = piece
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason, "logprobs": None}
        return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": usage})

    async def events(self, asked, head, with_usage):
        """The answer as server-sent events. A place in the line is a comment: clients of the API skip it, our page reads it."""
        def chunk(delta=None, reason=None, **more):
            choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason}]
            return f"data: {json.dumps(head | {'object': 'chat.completion.chunk', 'choices': choices} | more)}\n\n"
        yield chunk({"role": "assistant", "content": ""})
        try:
            async with aclosing(self.answer(asked)) as pieces:
                async for piece in pieces:
                    match piece:
                        case int(place):
                            yield f": {place} before you\n\n"
                        case str(text):
                            yield chunk({"content": text})
                        case reason, usage:
                            yield chunk({}, reason)
        except Exception as error:                                   # too late for a status, but not for its words
            status, said = error_of(error)
            if status == 500:
                traceback.print_exc()
            yield f"data: {json.dumps(said)}\n\n"
            return
        if with_usage:
            yield chunk(usage=usage)
        yield "data: [DONE]\n\n"

    async def models(self, request):
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "minllava",
                                                         "created": 0, "max_model_len": self.context}]})

    # ------------------------------------------------------------------ the page's own

    async def page(self, request):
        return FileResponse(os.path.join(HERE, "serve.html"), headers={"Cache-Control": "no-store", "Content-Security-Policy":
                            "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"})

    async def settings(self, request):
        a = self.args
        return JSONResponse({"model": self.name, "temperature": a.temperature, "top_p": a.top_p, "examples": self.examples,
                             "max_tokens": a.max_new_tokens, "max_mb": a.max_mb, "max_question": a.max_question,
                             "stage_1": self.talker.stage_1})

    async def prompt(self, request):
        """The exact prompt of a request: its text, and its ids."""
        asked = await self.read(await self.body(request))
        return JSONResponse({"text": asked.prompt, "ids": asked.ids})

    async def attention(self, request):
        """Where the model looked: of each word of `answer`, the pictures with its weights laid over them."""
        body = await self.body(request)
        answer = body.pop("answer", None)
        if not isinstance(answer, str) or not answer.strip():
            raise Refusal(400, "answer is not the text of an answer", "answer")
        asked = await self.read(body)

        def look():
            pictures = [load_image(io.BytesIO(file)) for file in asked.files]
            small = [ImageOps.contain(picture, (336, 336)) for picture in pictures]
            yield [{"word": word, "pictures": [sample.data_url(attention.overlay(*both), "JPEG") for both in zip(small, w)]}
                   for word, w in self.talker.attention(asked.turns, pictures, answer)]
        async with aclosing(self.in_turn(look())) as found:
            words = [item async for item in found if not isinstance(item, int)][0]
        return JSONResponse(words)


def main(argv=None):
    args = Config(**typed_flags(Config, argv, "A web page and an OpenAI-compatible endpoint for a LLaVA checkpoint.",
                                sample.CHOICES))
    try:
        door = socket.create_server((args.host, args.port))
    except OSError as error:
        raise ValueError(f"--host {args.host} --port {args.port}: {error.strerror or error}; take another port") from error
    server = uvicorn.Server(uvicorn.Config(Server(args), log_level="warning", timeout_graceful_shutdown=3))
    print(f"{args.model} at http://{args.host}:{door.getsockname()[1]}, the API at /v1; Ctrl-C ends it", flush=True)
    Image.MAX_IMAGE_PIXELS = args.max_megapixels * 500_000           # at twice as many Pillow refuses to decode
    with suppress(KeyboardInterrupt):
        server.run(sockets=[door])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
