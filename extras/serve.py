"""
Letting others ask a checkpoint: a web page, and an endpoint that speaks OpenAI's chat API.

    python -m extras.serve --model out/stage2      the page at http://127.0.0.1:8000, the API at /v1

All of it is OURS, but the filter of a user's text (App. A), `--moderation`; it sees answers, too.
Three threads: the event loop talks to clients; one reads what they send, so that a bad request is
refused at once; one runs the model, for one request at a time, as they came.

    request --body--> JSON --conversation_of--> turns --check--> ChatRequest --Line--> pieces of X_a
"""
import asyncio
import copy
import io
import json
import os
import socket
import sys
import time
import traceback
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import requests
import torch
from PIL import Image, ImageOps

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, JSONResponse, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    sys.exit(f"error: extras.serve needs them: pip install starlette uvicorn ({error})")

import sample
from data import render, sample_of
from extras import chat_api, probe
from extras.chat_api import Refusal
from parts import files
from parts.pictures import load_image

PAGE = Path(__file__).with_name("serve.html")


@dataclass(frozen=True)
class Config:
    model: str                           # checkpoint folder
    host: str = "127.0.0.1"              # 0.0.0.0 lets other machines in, without a password
    port: int = 8000                     # 0 is any that is free
    temperature: float = 0.2             # where a request does not say; 0 is greedy
    top_p: float = 1.0                   # the same
    max_new_tokens: int = 512            # the same
    moderation: str = None               # endpoint, http://.../v1, to judge questions and answers
    max_queue: int = 64                  # requests at once, the waiting ones included
    max_per_client: int = 16             # of them from one address
    max_mb: int = 20                     # megabytes of a request, its pictures included
    max_megapixels: int = 50             # of a picture, before it is decoded
    max_question: int = 4000             # characters
    template: str = None                 # for a checkpoint that does not name its own
    device: str = "auto"                 # cuda, mps or cpu
    dtype: str = "auto"                  # bf16, fp16, fp32; int8: f_phi's weights (needs torchao)
    compile: bool = False                # one compiled decoding step: starts slowly, answers faster

    CHOICES = sample.Config.CHOICES


# -----------------------------------------------------------------------------
# What is asked, and what is refused


def refusal_of(error):
    """What to tell a client. A ValueError is about what was sent, as everywhere in this project."""
    match error:
        case Refusal():
            return error
        case HTTPException():
            return Refusal(error.detail, status=error.status_code)
        case ValueError():
            return Refusal(str(error))
    return Refusal("the server failed; its own output says why", status=500)


async def send_refusal(request, error):
    refusal = refusal_of(error)
    return JSONResponse(refusal.json, refusal.status)


class ChatRequest(NamedTuple):
    """A request that was read and found right."""
    turns: list            # as in data.py, the last one human
    files: list            # the bytes of each picture: as small as they were sent, while they wait
    ids: list              # of the prompt
    sampling: dict         # what Talker.stream takes

    def pictures(self):
        return [load_image(io.BytesIO(file)) for file in self.files]


# -----------------------------------------------------------------------------
# One model, many clients


class Line:
    """Who waits for the model, as they came. It works for one at a time, in a thread of its own."""

    def __init__(self):
        self.thread = ThreadPoolExecutor(1)
        self.tickets = []

    async def run(self, pieces):
        """What a generator yields, run in the model's thread when its turn has come.

        Until then yields its place, an int, at least once a second. Who stops listening leaves the
        line; who listens slowly holds up nobody.
        """
        heard = asyncio.Queue()
        turn = asyncio.create_task(self.take_turn(pieces, heard.put_nowait))
        turn.add_done_callback(lambda _: heard.put_nowait(None))
        try:
            while True:
                piece = await heard.get()
                if piece is None:
                    break
                yield piece
            await turn                   # raises what went wrong in it
        finally:
            turn.cancel()

    async def take_turn(self, pieces, put):
        ticket = asyncio.Event()
        self.tickets.append(ticket)
        try:
            while self.tickets[0] is not ticket:
                put(self.tickets.index(ticket))
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(ticket.wait(), 1)
                ticket.clear()
            while True:
                piece = await asyncio.wrap_future(self.thread.submit(next, pieces, None))
                if piece is None:
                    return
                put(piece)
        finally:
            self.thread.submit(pieces.close)     # behind a step that may still be under way
            self.tickets.remove(ticket)
            for other in self.tickets:
                other.set()


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
        self.open = Counter()            # requests under way, by client
        routes = [Route("/", self.page), Route("/settings", self.settings),
                  Route("/v1/models", self.models),
                  Route("/v1/chat/completions", self.completions, methods=["POST"]),
                  Route("/prompt", self.prompt, methods=["POST"]),
                  Route("/attention", self.attention, methods=["POST"])]
        kinds = (Refusal, ValueError, HTTPException, ClientDisconnect, Exception)
        self.app = Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, send_refusal))

    async def __call__(self, scope, receive, send):
        """Every request comes in here; there is room for so many, and for so many of one client."""
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        client = scope["client"][0]
        most, most_of_one = self.config.max_queue, self.config.max_per_client
        if self.open.total() >= most:
            full = f"the queue is full: {most} requests are waiting; try again in a moment"
        elif self.open[client] >= most_of_one:
            full = f"{most_of_one} requests from {client} are under way; wait until one is answered"
        else:
            self.open[client] += 1
            try:
                return await self.app(scope, receive, send)
            finally:
                self.open -= Counter([client])           # which forgets a client at zero
        request = Request(scope, receive)
        with suppress(ClientDisconnect):
            async for _ in request.stream():             # who still sends would hear nothing
                pass
        refusal = await send_refusal(request, Refusal(full, code="queue_full", status=429))
        await refusal(scope, receive, send)

    async def body(self, request):
        """The JSON object that was sent."""
        data = bytearray()
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= self.config.max_mb * 10 ** 6:     # the rest is heard, but not kept
                data += chunk
        if size > len(data):
            raise Refusal(f"the request has {size / 1e6:.1f} MB; at most {self.config.max_mb} are "
                          "taken", status=413)
        if not request.headers.get("content-type", "").startswith("application/json"):
            # pages of others cannot send this from a visitor's browser
            raise Refusal("the request is not of Content-Type application/json", status=415)
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Refusal(f"the request is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise Refusal("the request is not a JSON object")
        if body.get("model") not in (None, self.name):
            raise Refusal(f"there is no model {body['model']!r} here, but {self.name!r}", "model",
                          "model_not_found", 404)
        return body

    async def read(self, body):
        """What a request asks, as a ChatRequest."""
        return await asyncio.wrap_future(self.reader.submit(self.check, body))

    def check(self, body):
        """Everything that could stop an answer is found here, in the reader's thread."""
        sampling = chat_api.sampling_of(body)
        talker = self.talker
        turns, contents, pictures = [], [], []
        for i, (text, urls) in enumerate(chat_api.conversation_of(body.get("messages"))):
            where = f"messages[{i}]"
            if i % 2 == 1:
                turns.append({"from": "gpt", "value": text})
                continue
            if not text.strip():
                raise Refusal("the question is empty; it needs words", where)
            most = self.config.max_question
            if len(text) > most:
                raise Refusal(f"the question has {len(text)} characters; at most {most} are taken",
                              where, "string_above_max_length")
            for n, url in enumerate(urls, 1):
                name = f"{where}, picture {n}"
                contents.append(chat_api.picture_bytes(url, name))
                pictures.append((name, load_image(io.BytesIO(contents[-1]), name)))
            turns.append(talker.ask(text, len(urls)))
        ids = sample_of(turns, pictures, self.tokenizer, talker.template, talker.view)["input_ids"]
        if len(ids) >= self.context:
            raise Refusal(f"the prompt is {len(ids)} tokens ({talker.view.cost}); the model's "
                          f"context is {self.context}: start a new conversation, or ask briefly",
                          "messages", "context_length_exceeded")
        generator = torch.Generator(talker.model.device)
        generator.manual_seed(sampling.pop("seed", time.time_ns()))
        stop = [talker.template.STOP, *sampling.pop("stop")]
        named = {"top_p": self.config.top_p, "stop": stop, "generator": generator} | sampling
        return ChatRequest(turns, contents, ids, named)

    async def moderate(self, what, text):
        """Raises Refusal if the endpoint flags a text, or does not say: nothing passes unseen."""
        key = os.environ.get("OPENAI_API_KEY")
        try:
            reply = await asyncio.to_thread(
                requests.post, self.config.moderation.rstrip("/") + "/moderations", timeout=30,
                json={"input": text}, headers={"Authorization": f"Bearer {key}"} if key else {})
            reply.raise_for_status()
            result = reply.json()["results"][0]
            flagged = files.typed(result["flagged"], bool, "flagged")
            reasons = [name for name, applies in result.get("categories", {}).items() if applies]
        except Exception as error:       # whatever it is, the text goes no further
            raise Refusal(f"the {what} could not be moderated: {error!r}", status=502) from error
        if flagged:
            raise Refusal(f"the {what} was flagged by moderation ({', '.join(reasons)})",
                          code="content_filter")

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
                    continue
                if isinstance(piece, str):
                    text += piece
                yield ""
        if self.config.moderation:
            await self.moderate("answer", text)
            yield text
            yield piece                  # the last one: how it ended

    async def completions(self, request):
        """OpenAI's chat API: https://platform.openai.com/docs/api-reference/chat"""
        body = await self.body(request)
        question = await self.read(body)
        if self.config.moderation:
            texts = [turn["value"].replace(files.IMAGE, "").strip() for turn in question.turns]
            await self.moderate("question", "\n".join(texts))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()),
                "model": self.name}
        if body.get("stream"):
            options = body.get("stream_options") or {}
            events = self.events(question, head, options.get("include_usage"))
            return StreamingResponse(events, media_type="text/event-stream", headers={
                "Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        text = ""
        async with aclosing(self.answer(question)) as pieces:
            async for piece in pieces:
                if isinstance(piece, str):
                    text += piece
                if await request.is_disconnected():
                    raise ClientDisconnect
        reason, usage = piece
        return JSONResponse(chat_api.completion(head, text, reason, usage))

    async def events(self, question, head, with_usage):
        """The answer as server-sent events.

        A place in the line is a comment: clients of the API skip it, our page reads it.
        """
        yield chat_api.chunk(head, {"role": "assistant", "content": ""})
        try:
            async with aclosing(self.answer(question)) as pieces:
                async for piece in pieces:
                    match piece:
                        case int(place):
                            yield f": {place} before you\n\n"
                        case str(text):
                            yield chat_api.chunk(head, {"content": text})
                        case reason, usage:
                            yield chat_api.chunk(head, {}, reason)
        except Exception as error:       # too late for a status, but not for its words
            refusal = refusal_of(error)
            if refusal.status == 500:
                traceback.print_exc()
            yield chat_api.event(refusal.json)
            return
        if with_usage:
            yield chat_api.last_chunk(head, usage)
        yield "data: [DONE]\n\n"

    async def models(self, request):
        model = {"id": self.name, "object": "model", "owned_by": "minllava", "created": 0,
                 "max_model_len": self.context}
        return JSONResponse({"object": "list", "data": [model]})

    async def page(self, request):
        return FileResponse(PAGE, headers={
            "Cache-Control": "no-store", "Content-Security-Policy":
            "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"})

    async def settings(self, request):
        names = ("temperature", "top_p", "max_new_tokens", "max_mb", "max_question")
        shown = {name: getattr(self.config, name) for name in names}
        return JSONResponse(shown | {"model": self.name})

    async def prompt(self, request):
        """The exact prompt of a request: its text, and its ids."""
        question = await self.read(await self.body(request))
        text = "".join(text for text, _ in render(question.turns, self.talker.template))
        return JSONResponse({"text": text, "ids": question.ids})

    async def attention(self, request):
        """Where the model looked: at each word of `answer`, the pictures under its weights."""
        body = await self.body(request)
        answer = body.pop("answer", None)
        if not isinstance(answer, str) or not answer.strip():
            raise Refusal("answer is not the text of an answer", "answer")
        question = await self.read(body)
        async with aclosing(self.line.run(self.looks(question, answer))) as pieces:
            words = [piece async for piece in pieces if not isinstance(piece, int)]
        return JSONResponse(words)

    def looks(self, question, answer):
        pictures = question.pictures()
        small = [ImageOps.contain(picture, (336, 336)) for picture in pictures]
        words = probe.words_and_attention(self.talker, question.turns, pictures, answer)
        for word, maps in words:
            seen = [probe.overlay(*pair) for pair in zip(small, maps, strict=True)]
            yield {"word": word, "pictures": [probe.data_url(one, "JPEG") for one in seen]}


def main(argv=None):
    config = Config(**files.typed_flags(Config, argv, "A web page and an API for a checkpoint."))
    files.check_least(config, temperature=0, top_p=0, max_new_tokens=1, max_queue=1)
    Image.MAX_IMAGE_PIXELS = config.max_megapixels * 500_000     # at twice as many Pillow refuses
    try:
        door = socket.create_server((config.host, config.port))
    except OSError as error:
        raise ValueError(f"--host {config.host} --port {config.port}: {error.strerror or error}; "
                         "take another port") from error
    server = uvicorn.Server(uvicorn.Config(Server(config), log_level="warning", lifespan="off",
                                           ws="none", timeout_graceful_shutdown=3))
    print(f"{config.model} at http://{config.host}:{door.getsockname()[1]}, the API at /v1; "
          "Ctrl-C ends it", flush=True)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[door])


if __name__ == "__main__":
    files.run_main(main)
