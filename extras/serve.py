"""
Letting others ask a checkpoint: a web page, and an endpoint that speaks OpenAI's chat API.

    python -m extras.serve --model out/stage2      the page at http://127.0.0.1:8000, the API at /v1

All of it is OURS, but the filters of a user's text and pictures (App. A), `--moderation`, which
sees answers, too.
Three threads: the event loop talks to clients; one reads what they send, so that a bad request is
refused at once; one runs the model, for one request at a time, as they came.

    request --body--> JSON --conversation_of--> turns --check--> ChatRequest --Line--> pieces of X_a
"""
import asyncio
import copy
import io
import json
import logging
import socket
import sys
import threading
import time
import traceback
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import requests
import torch
from PIL import Image, ImageOps

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    sys.exit(f"error: extras.serve needs them: pip install starlette uvicorn ({error})")

import sample
from data import render, sample_of
from extras import chat_api, probe
from extras.chat_api import Refusal
from extras.http_limits import Connection, hear, is_reached_at
from parts import files
from parts.client import api_key
from parts.pictures import data_url, load_image, opened, upright_rgb, upright_size

PAGE = Path(__file__).with_name("serve.html")
MODERATED = 2048         # pixels of a side, at most: endpoints have limits; OpenAI's is 20 MB


@dataclass(frozen=True)
class Config:
    model: str                           # checkpoint folder
    host: str = "127.0.0.1"              # 0.0.0.0 lets other machines in, without a password
    port: int = 8000                     # 0 is any that is free
    temperature: float = 0.2             # where a request does not say; 0 is greedy
    top_p: float = 1.0                   # the same
    max_new_tokens: int = 512            # the same
    moderation: str = None               # endpoint, http://.../v1, to judge what is said and shown
    max_queue: int = 64                  # requests at once, the waiting ones included
    max_per_client: int = 16             # of them from one address
    max_mb: int = 20                     # megabytes of a request, its pictures included
    max_megapixels: int = 50             # of a request's pictures, before they are decoded
    max_question: int = 4000             # characters
    timeout: int = 10                    # seconds: idle, for a head, a body (more if it is large)
    allow_origin: list[str] = ()         # of pages that may ask: https://lab.org, or * for all
    allow_host: list[str] = ()           # names, beside its addresses, at which it is reached
    trust_proxy: str = None              # address of a proxy whose X-Forwarded-For is believed
    template: str = None                 # for a checkpoint that does not name its own
    device: str = "auto"                 # cuda, mps or cpu
    dtype: str = "auto"                  # bf16, fp16, fp32; int8: f_phi's weights (needs torchao)
    compile: bool = False                # one compiled decoding step: starts slowly, answers faster

    CHOICES = sample.Config.CHOICES


# -----------------------------------------------------------------------------
# What is asked, and what is refused


def refusal_of(error):
    """What to tell a client: only a Refusal's words, and Starlette's, were written for it."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):
        return Refusal(error.detail, status=error.status_code)
    return Refusal("the server failed; its own output says why", status=500)


async def send_refusal(request, error):
    refusal = refusal_of(error)
    # of a body that was not heard to its end, the rest is not waited for
    headers = {"Connection": "close"} if refusal.status in (408, 413) else {}
    return JSONResponse(refusal.json, refusal.status, headers)


async def collect(request, pieces):
    """The pieces of an answer, a list. Raises ClientDisconnect when the client has gone away."""
    found = []
    async with aclosing(pieces):
        async for piece in pieces:
            if await request.is_disconnected():
                raise ClientDisconnect
            if not isinstance(piece, int):               # that would be a place in the line
                found.append(piece)
    return found


@contextmanager
def refusing():
    """The ValueErrors in here are of this project, about what was sent, and go to who sent it."""
    try:
        yield
    except ValueError as error:
        raise Refusal(str(error)) from error


class ChatRequest(NamedTuple):
    """A request that was read and found right."""
    turns: list            # as in data.py, the last one human
    files: list            # the bytes of each picture: as small as they were sent, while they wait
    ids: list              # of the prompt
    sampling: dict         # what Talker.stream takes
    answer: str            # that the model gave, or none; of /attention
    stream: bool
    with_usage: bool       # of a stream: say how many tokens it was

    def pictures(self):
        with refusing():
            return [load_image(io.BytesIO(file)) for file in self.files]


def pixels_of(name, file):
    """How many pixels a picture has, by its head."""
    with refusing(), opened(io.BytesIO(file), name) as head:
        if head.format == "TIFF":        # libtiff prints whatever is wrong with a file
            raise ValueError("TIFF is not taken: strangers would fill the server's output")
        return head.width * head.height


def read_small(name, file):
    """What has the size of a picture, which was read to its end, but as small as it allows."""
    with opened(io.BytesIO(file), name) as image:
        size = upright_size(image)
        image.draft(image.mode, (1, 1))
        upright_rgb(image)
    return SimpleNamespace(size=size)


def pictures_to_moderate(question):
    """A request's pictures as `data:` addresses, as the model is shown them, but not as large.

    They are made anew, for a file may hold another picture than the one that is shown.
    """
    pictures = question.pictures()
    for picture in pictures:
        picture.thumbnail((MODERATED, MODERATED))
    return [data_url(picture, "JPEG") for picture in pictures]


# -----------------------------------------------------------------------------
# One model, many clients


class Line:
    """Who waits for the model, as they came. It works for one at a time, in a thread of its own."""

    def __init__(self):
        self.thread = ThreadPoolExecutor(1)
        self.jobs = []                   # the first is under way

    async def run(self, pieces):
        """What a generator yields, run in the model's thread when its turn has come.

        While there is nothing, yields its place in the line, an int, once a second. Who stops
        listening leaves the line; who listens slowly holds up nobody.
        """
        heard = asyncio.Queue()
        put = partial(asyncio.get_running_loop().call_soon_threadsafe, heard.put_nowait)
        gone = threading.Event()
        job = self.thread.submit(run_job, pieces, put, gone)
        job.add_done_callback(lambda _: put(None))
        self.jobs.append(job)
        try:
            piece = self.jobs.index(job)
            while piece is not None:
                yield piece
                try:
                    piece = await asyncio.wait_for(heard.get(), 1)
                except asyncio.TimeoutError:
                    piece = self.jobs.index(job)
            job.result()                 # raises what went wrong in it
        finally:
            gone.set()
            job.cancel()
            self.jobs.remove(job)


def run_job(pieces, put, gone):
    """Put what a generator yields, until nobody listens any more."""
    with closing(pieces):
        for piece in pieces:
            if gone.is_set():
                return
            put(piece)


class Server:
    """An ASGI application around a Talker."""

    def __init__(self, config):
        self.config = config
        self.name = Path(config.model).absolute().name
        self.talker = sample.Talker(sample.Config(
            config.model, temperature=config.temperature, max_new_tokens=config.max_new_tokens,
            template=config.template, device=config.device, dtype=config.dtype), config.compile)
        self.context = self.talker.model.f_phi.config.max_position_embeddings
        # the reader's own, for one tokenizer cannot serve two threads
        self.tokenizer = copy.deepcopy(self.talker.model.tokenizer)
        self.reader = ThreadPoolExecutor(1)
        self.line = Line()
        self.queue = {}                  # {task of a request whose body was heard: its client}
        self.failures = set()            # where the server failed, each told once
        names = ("localhost", config.host, socket.gethostname(), *config.allow_host)
        self.names = {name.lower() for name in names}
        routes = [Route("/", self.page), Route("/v1/models", self.models),
                  Route("/v1/chat/completions", self.completions, methods=["POST"]),
                  Route("/prompt", self.prompt, methods=["POST"]),
                  Route("/attention", self.attention, methods=["POST"])]
        kinds = (Refusal, HTTPException, ClientDisconnect, Exception)
        self.app = Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, send_refusal))

    async def __call__(self, scope, receive, send):
        """Every request comes in here."""
        request = Request(scope)
        host = request.headers.get("host", "")
        app = self.app
        if not is_reached_at(host, self.names):
            app = await send_refusal(request, Refusal(
                f"Host {host!r:.80} is no address or name of this server; --allow_host adds one",
                status=421))
        try:
            await app(scope, receive, send)
        except Exception as error:       # who sent the request was told by `send_refusal`
            self.report(error)
        finally:
            self.queue.pop(asyncio.current_task(), None)

    def report(self, error):
        """Print where the server failed, without the error's words: they may hold anybody's."""
        trace = "".join(traceback.format_tb(error.__traceback__))
        if trace not in self.failures:   # the output does not grow by those who know how to fail it
            self.failures.add(trace)
            print(f"the server failed, {type(error).__name__}:\n{trace}", file=sys.stderr)

    async def read(self, request, with_answer=False):
        """What a request asks, as a ChatRequest, if there is room for it."""
        config = self.config
        client = request.client.host
        data = await hear(request, config.max_mb * 10 ** 6, config.timeout)
        if list(self.queue.values()).count(client) >= config.max_per_client:
            raise Refusal(f"{config.max_per_client} requests from {client} are under way; wait "
                          "until one is answered", "queue_full", 429)
        if len(self.queue) >= config.max_queue:
            raise Refusal(f"the queue is full: {config.max_queue} requests are waiting; try again "
                          "in a moment", "queue_full", 429)
        self.queue[asyncio.current_task()] = client
        if not request.headers.get("content-type", "").startswith("application/json"):
            # pages of others cannot send this from a visitor's browser
            raise Refusal("the request is not of Content-Type application/json", status=415)
        return await asyncio.wrap_future(self.reader.submit(self.check, data, with_answer))

    def check(self, data, with_answer):
        """Everything that could stop an answer is found here, in the reader's thread."""
        body = chat_api.object_of(data)
        if body.get("model") not in (None, self.name):
            raise Refusal(f"there is no model {chat_api.brief(body['model'])} here, but "
                          f"{self.name!r}", "model_not_found", 404)
        answer = chat_api.answer_of(body) if with_answer else ""
        sampling = chat_api.sampling_of(body)
        conversation = chat_api.conversation_of(body.get("messages"))
        self.check_length([*conversation, (answer, [])])
        talker = self.talker
        turns, contents = [], {}
        for i, (text, urls) in enumerate(conversation):
            where = f"messages[{i}]"
            if i % 2 == 1:
                turns.append({"from": "gpt", "value": text})
                continue
            if not text.strip() or len(text) > self.config.max_question:
                raise Refusal(f"{where}: the question has {len(text)} characters; 1 to "
                              f"{self.config.max_question} are taken, of which one is no blank")
            for n, url in enumerate(urls, 1):
                name = f"{where}, picture {n}"
                contents[name] = chat_api.picture_bytes(url, name)
            turns.append(sample.human_turn(text, len(urls)))
        ids = self.ids_of(turns, contents, answer)
        generator = torch.Generator(talker.model.device)
        generator.manual_seed(sampling.pop("seed", time.time_ns()))
        stop = [talker.template.STOP, *sampling.pop("stop")]
        named = {"top_p": self.config.top_p, "stop": stop, "generator": generator} | sampling
        options = body.get("stream_options") or {}
        return ChatRequest(turns, list(contents.values()), ids, named, answer,
                           bool(body.get("stream")), bool(options.get("include_usage")))

    def ids_of(self, turns, contents, answer):
        """The prompt's ids, with those of a given answer; contents are {name: file of a picture}.

        Raises Refusal if the pictures together are too large, or all of it for the model's context.
        """
        pixels = sum(pixels_of(name, file) for name, file in contents.items())
        if pixels > self.config.max_megapixels * 10 ** 6:
            raise Refusal(f"the pictures have {pixels / 1e6:.0f} megapixels; at most "
                          f"{self.config.max_megapixels} are taken")
        if answer:
            turns = [*turns, {"from": "gpt", "value": answer}]
        view = self.talker.view
        with refusing():
            pictures = [(name, read_small(name, file)) for name, file in contents.items()]
            read = sample_of(turns, pictures, self.tokenizer, self.talker.template, view)
        n = len(read["input_ids"])
        if n >= self.context:
            raise Refusal(f"the prompt is {n} tokens ({view.cost}); the model's context is "
                          f"{self.context}: start a new conversation, or ask briefly",
                          "context_length_exceeded")
        return read["input_ids"]

    def check_length(self, conversation):
        """Refuse what cannot fit in the model's context before any time is spent on it."""
        n_characters = sum(len(text) for text, _ in conversation)
        n_parts = sum(1 + len(urls) for _, urls in conversation)
        if n_parts > self.context or n_characters > 32 * self.context:
            raise Refusal(f"a conversation of {n_parts} texts and pictures, {n_characters} "
                          f"characters, does not fit in a context of {self.context} tokens",
                          "context_length_exceeded")

    async def moderate_question(self, question):
        """The two filters of App. A: the text of a conversation, then each of its pictures.

        A picture is a request of its own, for OpenAI's endpoint takes one at a time.
        """
        texts = [turn["value"].replace(files.IMAGE, "").strip() for turn in question.turns]
        await self.moderate("the question", "\n".join(texts))
        urls = await asyncio.wrap_future(self.reader.submit(pictures_to_moderate, question))
        for i, url in enumerate(urls, 1):
            part = {"type": "image_url", "image_url": {"url": url}}
            await self.moderate(f"picture {i} of {len(urls)}", [part])

    async def moderate(self, what, content):
        """Raises Refusal if the endpoint flags a text, or a list with a picture's part, or does not
        say: nothing passes unseen."""
        key = api_key()
        try:
            reply = await asyncio.to_thread(
                requests.post, self.config.moderation.rstrip("/") + "/moderations", timeout=30,
                json={"input": content}, headers={"Authorization": f"Bearer {key}"} if key else {})
            reply.raise_for_status()
            result = reply.json()["results"][0]
            flagged = files.typed(result["flagged"], bool, "flagged")
            reasons = [name for name, applies in result.get("categories", {}).items() if applies]
        except Exception as error:       # whatever it is, nothing goes further
            raise Refusal(f"{what} could not be moderated ({type(error).__name__})",
                          status=502) from error
        if flagged:
            raise Refusal(f"{what} was flagged by moderation ({', '.join(reasons)})",
                          "content_filter")

    def generate(self, question):
        """The answer's pieces (str), then how it ended: (finish_reason, usage)."""
        ids = []
        yield from self.talker.stream(question.turns, question.pictures(), ids,
                                      **question.sampling)
        ended = self.talker.model.has_ended(ids, question.sampling["stop"])
        usage = {"prompt_tokens": len(question.ids), "completion_tokens": len(ids),
                 "total_tokens": len(question.ids) + len(ids)}
        yield "stop" if ended else "length", usage

    async def answer(self, question):
        """Places in the line (int), then what `generate` yields.

        With moderation, empty texts come until the whole answer has passed.
        """
        text = ""
        async with aclosing(self.line.run(self.generate(question))) as pieces:
            async for piece in pieces:
                if isinstance(piece, int) or not self.config.moderation:
                    yield piece
                elif isinstance(piece, str):
                    text += piece
                    yield ""
                else:
                    end = piece
        if self.config.moderation:
            await self.moderate("the answer", text)
            yield text
            yield end

    async def completions(self, request):
        """OpenAI's chat API: https://platform.openai.com/docs/api-reference/chat"""
        question = await self.read(request)
        if self.config.moderation:
            await self.moderate_question(question)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()),
                "model": self.name}
        if question.stream:
            events = self.events(question, head)
            return StreamingResponse(events, media_type="text/event-stream", headers={
                "Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        *texts, end = await collect(request, self.answer(question))
        return JSONResponse(chat_api.completion(head, "".join(texts), *end))

    async def events(self, question, head):
        """The answer as server-sent events.

        A place in the line is a comment: clients of the API skip it, our page reads it.
        """
        yield chat_api.chunk(head, {"role": "assistant", "content": ""})
        try:
            async with aclosing(self.answer(question)) as pieces:
                async for piece in pieces:
                    match piece:
                        case int(place) if place > 0:
                            yield f": {place} before you\n\n"
                        case str(text):
                            yield chat_api.chunk(head, {"content": text})
                        case reason, usage:
                            yield chat_api.chunk(head, {}, reason)
        except Exception as error:       # too late for a status, but not for its words
            if not isinstance(error, Refusal):
                self.report(error)
            yield chat_api.event(refusal_of(error).json)
            return
        if question.with_usage:
            yield chat_api.chunk(head, usage=usage)
        yield "data: [DONE]\n\n"

    async def models(self, request):
        model = {"id": self.name, "object": "model", "owned_by": "minllava", "created": 0}
        return JSONResponse({"object": "list", "data": [model]})

    async def page(self, request):
        names = ("temperature", "top_p", "max_new_tokens", "max_mb", "max_question")
        settings = {name: getattr(self.config, name) for name in names} | {"model": self.name}
        page = PAGE.read_text(encoding="utf-8").replace("SETTINGS", json.dumps(settings))
        return HTMLResponse(page, headers={
            "Cache-Control": "no-store", "Content-Security-Policy":
            "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"})

    async def prompt(self, request):
        """The exact prompt of a request: its text, and its ids."""
        question = await self.read(request)
        text = "".join(text for text, _ in render(question.turns, self.talker.template))
        return JSONResponse({"text": text, "ids": question.ids})

    async def attention(self, request):
        """Where the model looked: at each word of `answer`, the pictures under its weights."""
        question = await self.read(request, with_answer=True)
        return JSONResponse(await collect(request, self.line.run(self.looks(question))))

    def looks(self, question):
        pictures = question.pictures()
        small = [ImageOps.contain(picture, (336, 336)) for picture in pictures]
        words = probe.words_and_attention(self.talker, question.turns, pictures,
                                           question.answer)
        for word, maps in words:
            seen = [probe.overlay(*pair) for pair in zip(small, maps, strict=True)]
            yield {"word": word, "pictures": [data_url(one, "JPEG") for one in seen]}


def main(argv=None):
    config = Config(**files.typed_flags(Config, argv, "A web page and an API for a checkpoint."))
    files.check_least(config, temperature=0, top_p=0, max_new_tokens=1, max_queue=1, timeout=1)
    if config.moderation:
        api_key()                        # raises ValueError for one that no header can hold
    for name in ("uvicorn", "asyncio", "PIL"):           # each bad client would be a line or more
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")      # Pillow's, about damaged pictures
    Image.MAX_IMAGE_PIXELS = None        # `ids_of` has the limit, for all of a request's
    try:
        door = socket.create_server((config.host, config.port))
    except OSError as error:
        raise ValueError(f"--host {config.host} --port {config.port}: {error}; take another "
                         "port") from error
    app = Server(config)
    if config.allow_origin:
        app = CORSMiddleware(app, config.allow_origin, ["GET", "POST"], ["*"])
    server = uvicorn.Server(uvicorn.Config(
        app, http=Connection, ws="none", lifespan="off", log_config=None,
        proxy_headers=config.trust_proxy is not None, forwarded_allow_ips=config.trust_proxy,
        timeout_keep_alive=config.timeout, timeout_graceful_shutdown=3))
    print(f"{config.model} at http://{config.host}:{door.getsockname()[1]}, the API at /v1; "
          "Ctrl-C ends it", flush=True)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[door])


if __name__ == "__main__":
    files.run_main(main)
