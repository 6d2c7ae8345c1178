"""Letting others talk to it: the endpoint by OpenAI's own client, the page by Chromium, both in real server processes.

    python tests/test_serve.py picture MODEL IMAGES docs/serve.png    what the page looks like, after a question (README)
    python tests/test_serve.py crowd MODEL [SECONDS]                  50 clients at once, each with its own questions
"""
import asyncio
import base64
import http.server
import io
import itertools
import json
import os
import random
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import openai
import pytest
import requests
from PIL import Image

from conftest import ROOT, byte_tokenizer, scripted_llm, start_script, tiny_clip, tiny_llava     # first: it sets the path
import sample
import serve
import toy
from data import prompt
from images import load_image
from model import LLaVA
from test_sample import save

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUESTION = "What is 0.0?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model whose answers depend on all of its prompt."""
    return save(tiny_llava(), tmp_path_factory.mktemp("serve") / "my_run")


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that says "abc abc abc ..." and has a context of 100,000 tokens to say it in."""
    llm = scripted_llm(": abc abc")
    llm.config.max_position_embeddings = 100_000
    return save(LLaVA(tiny_clip(), llm, byte_tokenizer()), tmp_path_factory.mktemp("endless") / "endless")


@contextmanager
def server(folder, model, *flags):
    """The address of `python serve.py --model ...`, a process of its own in a folder of its own."""
    folder.mkdir(exist_ok=True)
    process = start_script(folder, "serve.py", "--model", model, "--port", 0, *flags)
    (folder / "pid").write_text(str(process.pid))
    try:
        deadline = time.time() + 120
        while not (found := re.search(r"http://\S+:\d+", (folder / "output").read_text())):
            assert process.is_alive() and time.time() < deadline, (folder / "output").read_text()
            time.sleep(0.05)
        yield found[0]
        assert process.is_alive(), "the server did not live to its end: " + (folder / "output").read_text()
    finally:
        process.terminate()
        process.join(20)
    assert not process.is_alive() and "Traceback" not in (said := (folder / "output").read_text()), said


@pytest.fixture(scope="module")
def url(checkpoint, tmp_path_factory):
    with server(tmp_path_factory.mktemp("url"), checkpoint, "--temperature", 0, "--max_new_tokens", 12) as url:
        yield url


@pytest.fixture(scope="module")
def slow(endless, tmp_path_factory):
    """A server that answers without end, unless it is stopped."""
    with server(tmp_path_factory.mktemp("slow"), endless, "--max_new_tokens", 90_000) as url:
        yield url


@pytest.fixture(scope="module")
def talker(checkpoint):
    return sample.Talker(sample.Config(str(checkpoint), temperature=0, max_new_tokens=12))


@pytest.fixture(scope="module")
def pictures(chats):
    return [chats / "images" / name for name in ("0_0.tiff", "5_0.png")]


def client_of(url):
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


def shown(path):
    """A picture as the API takes it."""
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def user(text, *paths):
    return {"role": "user", "content": [*map(shown, paths), {"type": "text", "text": text}] if paths else text}


def post(url, body, path="/v1/chat/completions", **more):
    return requests.post(url + path, **({"json": body, "timeout": 60} | more))


def still_answers(url, max_tokens=3):
    assert client_of(url).chat.completions.create(model="", messages=[user("Well?")], max_tokens=max_tokens,
                                                  extra_body={"model": None}).choices[0].message.content


def wait_until(true, seconds=20):
    deadline = time.time() + seconds
    while not true():
        assert time.time() < deadline, "it did not happen"
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------------------------------
# The endpoint


def test_the_official_client_gets_the_models_answer_whole_or_in_pieces(url, talker, pictures, checkpoint):
    """/v1/chat/completions says what `Talker` says of the same turns, and counts the tokens of both; /v1/models names it."""
    client = client_of(url)
    assert [m.id for m in client.models.list()] == [checkpoint.name]
    turns, images = [talker.ask(QUESTION, 2)], [load_image(p) for p in pictures]
    said = talker.answers([(turns, images)])[0]
    turns += [{"from": "gpt", "value": said}, talker.ask("And then?")]
    want, m = talker.answers([(turns, images)])[0], talker.model
    assert len(want) > 3, "the model says too little: the test tests nothing"
    asked = {"model": checkpoint.name, "messages": [user(QUESTION, *pictures), {"role": "assistant", "content": said},
                                                    user("And then?")]}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == want and whole.choices[0].finish_reason == "length"
    ids = prompt(turns, images, m.tokenizer, talker.template, m.view)["input_ids"]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 12)
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == want
    assert len(chunks) > 5 and chunks[-1].choices[0].finish_reason == "length", "the answer was not sent as it came"
    assert last.usage == whole.usage and not last.choices
    assert {c.model for c in chunks} == {checkpoint.name} and len({c.id for c in chunks}) == 1
    shown = post(url, asked, "/prompt").json()
    assert shown["ids"] == ids, "the prompt on demand is not what the model is asked"
    assert shown["text"].replace("<image>", "<image>" * m.N) == m.tokenizer.decode(ids)


def test_a_request_says_how_it_is_sampled(url, talker, checkpoint):
    """max_tokens, max_completion_tokens, temperature, top_p, seed and stop hold for the one request that names them."""
    client, turns = client_of(url), [talker.ask(QUESTION)]
    def said(**how):
        reply = client.chat.completions.create(model=checkpoint.name, messages=[user(QUESTION)], **how)
        return reply.choices[0].message.content, reply.choices[0].finish_reason, reply.usage.completion_tokens
    greedy = talker.answers([(turns, [])])[0]
    assert said() == (greedy, "length", 12) and said(temperature=1.5, top_p=0)[0] == said(temperature=1e-40)[0] == greedy
    assert said(max_tokens=4)[1:] == said(max_completion_tokens=4)[1:] == ("length", 4)
    one, again, other = (said(temperature=1, seed=seed)[0] for seed in (1, 1, 2))
    assert one == again and len({one, other, greedy}) == 3, "the seed or the temperature has no effect"
    assert len({said(temperature=1)[0] for _ in range(4)}) > 1, "without a seed every draw is the same"
    for stop in (greedy[3:5], ["never said", greedy[3:5]]):
        cut = greedy[:greedy.index(greedy[3:5])].strip()
        assert said(stop=stop)[:2] == (cut, "stop"), "the answer is not cut before the stop string"
        chunks = client.chat.completions.create(model=checkpoint.name, messages=[user(QUESTION)], stop=stop, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == cut, "of a stop string something was streamed"


@pytest.mark.parametrize("body, status, says", [
    ({"messages": [user("")]}, 400, "question is empty"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "system", "content": "Be brief."}, user("Why?")]}, 400, "system message of this model"),
    ({"messages": [user("Why?"), user("Why?")]}, 400, r"messages\[1\] is from 'user'"),
    ({"messages": [user("Why?"), {"role": "assistant", "content": "So."}]}, 400, "last message is the assistant's"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, r"messages\[0\]\.content"),
    ({"messages": [user("x" * 4001)]}, 400, "4001 characters; at most 4000"),
    ({"messages": [user("x" * 600)]}, 400, "context is 512"),
    ({"messages": [user("<image>\nWhy?")]}, 400, "<image>"),
    ({"messages": [user("\ud83d")]}, 400, "surrogates"),
    ({"messages": [user("Why?")], "model": "gpt-4"}, 404, "no model 'gpt-4' here, but 'my_run'"),
    ({"messages": [user("Why?")], "n": 2}, 400, "n 2: a number from 1 to 1"),
    ({"messages": [user("Why?")], "temperature": -1}, 400, "temperature -1"),
    ({"messages": [user("Why?")], "temperature": float("nan")}, 400, "temperature nan"),
    ({"messages": [user("Why?")], "max_tokens": 1.5}, 400, "max_tokens 1.5"),
    ({"messages": [user("Why?")], "seed": True}, 400, "seed True"),
    ({"messages": [user("Why?")], "stop": [""]}, 400, "stop"),
    ({"messages": [user("Why?")], "stream": "yes"}, 400, "stream 'yes'"),
    ({"messages": [user("Why?")], "tools": [{"type": "function"}]}, 400, "'tools' is not supported"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}},
                                                {"type": "text", "text": "?"}]}]}, 400, "--allow_remote_images"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,@"}},
                                                {"type": "text", "text": "?"}]}]}, 400, "base64"),
    ("not JSON", 400, "not JSON"), ("[" * 100_000, 400, "not JSON"), ("[]", 400, "not a JSON object")])
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_an_error_of_the_api_and_the_next_request_is_served(body, status, says, stream, url):
    """Each error has a status, before any of a stream is sent, and words that name what is wrong, in the API's form."""
    text = body if isinstance(body, str) else json.dumps({"stream": stream} | body)
    reply = post(url, None, data=text.encode(), headers={"Content-Type": "application/json"})
    error = reply.json()["error"]
    assert reply.status_code == status and re.search(says, error["message"]), reply.text
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    still_answers(url)


def test_errors_arrive_as_exceptions_of_the_official_client(url, checkpoint):
    """The client knows an error by its status, and shows its message and code."""
    client = client_of(url)
    with pytest.raises(openai.NotFoundError, match="no model 'other'") as error:
        client.chat.completions.create(model="other", messages=[user("?")])
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="context is 512") as error:
        client.chat.completions.create(model=checkpoint.name, messages=[user("x" * 600)])
    assert error.value.code == "context_length_exceeded"
    for path, status in (("/v1/nothing", 404), ("/v1/chat/completions", 405)):
        reply = requests.get(url + path, timeout=10)
        assert reply.status_code == status and reply.json()["error"]["message"]
    reply = post(url, None, data=json.dumps({"messages": [user("?")]}), headers={"Content-Type": "text/plain"})
    assert reply.status_code == 415, "any page in the same browser could use this server"


def picture_file(size, form="PNG", **how):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, form, **how)
    return file.getvalue()


def test_a_picture_may_be_of_any_form_but_not_broken_and_not_too_large(url, pictures, tmp_path):
    """1 x 1 and 1 x 20,000 pixels are answered about; 20,000 x 20,000 is refused before it is decoded, by its head; a file
    that is cut off or no picture is named."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2000, 4000, 3), dtype=np.uint8))
    noise.save(tmp_path / "noise.png")
    huge = picture_file((2, 2)).replace((2).to_bytes(4, "big") * 2, (20_000).to_bytes(4, "big") * 2)
    import zlib                                          # a PNG's head has a checksum
    huge = huge[:29] + zlib.crc32(huge[12:29]).to_bytes(4, "big") + huge[33:]
    for name, file, status, says in (
            ("dot", picture_file((1, 1)), 200, ""), ("line", picture_file((1, 20_000)), 200, ""),
            ("huge", huge, 400, r"messages\[0\], picture 1: .*400000000 pixels.*50000000"),
            ("text", b"<html>", 400, r"messages\[0\], picture 1: not a readable picture \(its form is not known\)"),
            ("torn", pictures[1].read_bytes()[:-200], 400, "not a readable picture"),
            ("empty", b"", 400, "not a readable picture"),
            ("noise", (tmp_path / "noise.png").read_bytes(), 413, r"\d\d\.\d MB; at most 20 are taken")):
        (tmp_path / name).write_bytes(file)
        reply = post(url, {"messages": [user(QUESTION, tmp_path / name)]})
        assert reply.status_code == status and re.search(says, reply.text), f"{name}: {reply.text}"
        still_answers(url)


# ---------------------------------------------------------------------------------------------------------------------
# Many at once


def stream_of(url, question="Say it.", **more):
    reply = post(url, {"messages": [user(question)], "stream": True} | more, stream=True)
    assert reply.status_code == 200, reply.text
    return reply, (line for line in reply.iter_lines(decode_unicode=True, chunk_size=1) if line)


def test_requests_wait_in_line_and_who_goes_away_leaves_it(slow):
    """One answer at a time, first come first served, and the waiting hear their place. A client that closes its connection,
    while its answer comes or while it waits, streaming or not, is forgotten within a second or so."""
    first, lines = stream_of(slow)
    assert '"content": "' in [next(lines) for _ in range(10)][-1], "the first in the line is not answered"
    second, waiting = stream_of(slow, max_tokens=30)
    next(waiting)
    assert next(waiting) == ": 1 before you", "nobody tells the waiting where they stand"
    with pytest.raises(requests.ReadTimeout):
        post(slow, {"messages": [user("Say it.")]}, timeout=0.5)                 # does not stream, and goes away in the line
    third, waiting_longer = stream_of(slow, max_tokens=3)
    next(waiting_longer)
    assert next(waiting_longer) in (": 1 before you", ": 2 before you", ": 3 before you")
    first.close()
    rest = list(waiting)
    assert rest[-1] == "data: [DONE]" and "length" in rest[-2], "who waited is not answered to the end"
    assert list(waiting_longer)[-1] == "data: [DONE]"
    with pytest.raises(requests.ReadTimeout):
        post(slow, {"messages": [user("Say it.")]}, timeout=0.5)                 # does not stream, and goes away at work
    began = time.time()
    still_answers(slow)
    assert time.time() - began < 10, "an answer that nobody waits for holds up the line"


def test_a_full_queue_and_a_greedy_client_are_told_so(endless, tmp_path):
    """Beyond --max_queue and --max_per_client the answer is 429 with a message; once there is room it is an answer again."""
    with server(tmp_path / "q", endless, "--max_queue", 2, "--max_new_tokens", 90_000) as url:
        streams = [stream_of(url)[0] for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="queue is full: 2 requests") as error:
            client_of(url).chat.completions.create(model="endless", messages=[user("Well?")])
        assert error.value.code == "queue_full" and error.value.type == "rate_limit_error"
        streams[0].close()
        wait_until(lambda: post(url, {"messages": [user("?")]}, "/prompt").ok)
        streams[1].close()
        still_answers(url)
    with server(tmp_path / "c", endless, "--max_per_client", 1, "--max_new_tokens", 90_000) as url:
        one = stream_of(url)[0]
        reply = post(url, {"messages": [user("Well?")]})
        assert reply.status_code == 429 and "1 requests from 127.0.0.1" in reply.json()["error"]["message"]
        one.close()
        wait_until(lambda: post(url, {"messages": [user("?")]}, "/prompt").ok)
        still_answers(url)


def crowd(url, model, seconds, clients=50):
    """`clients` threads that ask one question after the other, each its own about its own picture: what was asked and
    answered, as (question, picture, answer, seconds)."""
    until = time.time() + seconds

    def one(number):
        picture = toy.draw(toy.sample_scene(random.Random(number)))
        shown, asked, client = {"type": "image_url", "image_url": {"url": sample.data_url(picture)}}, [], client_of(url)
        while not asked or time.time() < until:
            question, began = f"What is {number}.{len(asked)}?", time.time()
            messages = [{"role": "user", "content": [shown, {"type": "text", "text": question}]}]
            reply = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=12)
            asked.append((question, picture, reply.choices[0].message.content, time.time() - began))
        return asked
    with ThreadPoolExecutor(clients) as pool:
        return [one for some in pool.map(one, range(clients)) for one in some]


@pytest.mark.slow
def test_fifty_clients_at_once_all_get_their_own_answers(checkpoint, talker, tmp_path):
    """None is dropped, none gets another's answer. (The command above asks for a minute, and looks at the memory.)"""
    with server(tmp_path / "crowd", checkpoint, "--max_per_client", 50) as url:
        asked = crowd(url, checkpoint.name, seconds=1)
    want = [talker.answers([([talker.ask(question, 1)], [picture])])[0] for question, picture, _, _ in asked]
    assert len(asked) >= 50 and len(set(want)) > 5, "the model always says the same: the test tests nothing"
    assert [answer for _, _, answer, _ in asked] == want


def test_who_listens_slowly_holds_up_nobody(checkpoint):
    """The model goes on to the next one while the answer before is still being read; one that is no longer read is closed."""
    desk, closed = serve.Server(serve.Config(str(checkpoint))), []

    def says(text):
        try:
            yield from text
        finally:
            closed.append(text)

    async def clients():
        slow = desk.in_turn(says("slow"))
        heard = [await anext(slow)]
        quick = [piece async for piece in desk.in_turn(says("quick")) if isinstance(piece, str)]
        heard += [piece async for piece in slow]
        gone = desk.in_turn(says(itertools.repeat("on ")))
        await anext(gone)
        await gone.aclose()
        await asyncio.sleep(0.1)
        return heard, quick, len(desk.line)
    heard, quick, left = asyncio.run(asyncio.wait_for(clients(), 60))
    assert ("".join(heard), "".join(quick), left, len(closed)) == ("slow", "quick", 0, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures from addresses


@contextmanager
def listening(handle, tls=None):
    """The address of a real HTTP server on this machine that answers each request by `handle(handler)`."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            handle(self)
        do_POST = do_GET

        def reply(self, body, status=200, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        http_server.socket = tls.wrap_socket(http_server.socket, server_side=True)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http_server.server_port}"
    finally:
        http_server.shutdown()
        http_server.server_close()


@pytest.fixture(scope="module")
def web(pictures):
    """A server of pictures, and the paths that it was asked for."""
    asked = []

    def handle(handler):
        asked.append(handler.path)
        port = handler.server.server_port
        to = {"/near": "/picture.png?size=1", "/away": f"http://127.0.0.2:{port}/picture.png", "/round": "/round",
              "/file": "file:///etc/passwd"}
        if handler.path in to:
            return handler.reply(b"", 302, Location=to[handler.path])
        if handler.path.startswith("/picture.png"):
            return handler.reply(pictures[1].read_bytes())
        handler.reply(b"x" * 5000 if handler.path == "/big" else b"", 200 if handler.path == "/big" else 404)
    with listening(handle) as url:
        yield url, asked


def test_a_remote_picture_never_comes_from_a_private_address(web, checkpoint, tmp_path):
    """However a private address is written, nothing is asked of it; nor behind a redirect."""
    url, asked = web
    port = url.rpartition(":")[2]
    for ip in ("127.0.0.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
               "255.255.255.255"):
        assert not serve.is_public(ip), ip
    assert serve.is_public("8.8.8.8")
    for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0", "[::1]", "[::ffff:127.0.0.1]",
                 "me@127.0.0.1"):
        with pytest.raises(serve.Refusal, match="private or reserved|not supported|not known|No address"):
            serve.fetch(f"http://{host}:{port}/picture.png", 10 ** 6)
    with server(tmp_path / "remote", checkpoint, "--allow_remote_images") as own:
        reply = post(own, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": f"{url}/picture.png"},
                                                                     {"type": "text", "text": "?"}]}]})
    assert reply.status_code == 400 and "private or reserved" in reply.json()["error"]["message"]
    for bad in ("file:///etc/passwd", "ftp://x/y.png", "http://", "http://[", "http://x:y/"):
        with pytest.raises(serve.Refusal):
            serve.fetch(bad, 10 ** 6)
    assert not asked, "a private address was asked"
    only = {"127.0.0.1"}.__contains__                    # as if it were public, and 127.0.0.2, this machine as well, were not
    with pytest.raises(serve.Refusal, match=r"127\.0\.0\.2.*private or reserved"):
        serve.fetch(f"{url}/away", 10 ** 6, only)


def test_a_remote_picture_is_fetched_within_limits(web, pictures):
    """Its bytes come as they are, also behind a redirect; what is missing, too large or led in a circle is an error."""
    url, only = web[0], {"127.0.0.1"}.__contains__
    for path in ("/picture.png", "/near"):
        assert serve.fetch(url + path, 10 ** 6, only) == pictures[1].read_bytes()
    for path, says in (("/gone", "HTTP 404"), ("/big", "more than"), ("/round", "too often"), ("/file", "not an http")):
        with pytest.raises(serve.Refusal, match=says):
            serve.fetch(url + path, 4000, only)


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here to make a certificate")
def test_a_remote_picture_over_https_must_have_the_certificate_of_its_name(pictures, tmp_path, monkeypatch):
    """The connection goes to a checked number, but the certificate is asked for the name."""
    make = ("openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost "
            "-keyout key -out cert")
    subprocess.run(make.split(), cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with listening(lambda handler: handler.reply(pictures[1].read_bytes()), context) as url:
        port, only = url.rpartition(":")[2], {"127.0.0.1"}.__contains__
        assert serve.fetch(f"https://localhost:{port}/x.png", 10 ** 6, only) == pictures[1].read_bytes()
        with pytest.raises(serve.Refusal, match="doesn.t match"):
            serve.fetch(f"https://127.0.0.1:{port}/x.png", 10 ** 6, only)


# ---------------------------------------------------------------------------------------------------------------------
# Moderation


def test_moderation_sees_question_and_answer_and_nothing_passes_it_unseen(endless, tmp_path):
    """The broader-impact section's filters: what is flagged is neither answered nor shown, also not its first words; a
    moderation that fails is an error, never a pass."""
    seen, flags, broken = [], set(), []

    def handle(handler):
        seen.append((handler.path, json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))["input"]))
        yes = any(flag in seen[-1][1] for flag in flags)
        result = {"flagged": yes, "categories": {"violence": yes, "hate": False}}
        handler.reply(*(broken or [json.dumps({"results": [result]}).encode()]))
    flags_of = lambda judge: ["--moderation", judge + "/v1", "--max_new_tokens", 20]
    with listening(handle) as judge, server(tmp_path / "m", endless, *flags_of(judge)) as url:
        ask = {"messages": [user("Say it.")]}
        reply = post(url, ask).json()
        said = reply["choices"][0]["message"]["content"]
        assert said.startswith("abc abc") and seen == [("/v1/moderations", "Say it."), ("/v1/moderations", said)]
        assert f'"content": "{said}"' in post(url, ask | {"stream": True}).text, "an answer that passed is not streamed"
        flags.add("Say")
        reply = post(url, ask | {"stream": True})
        assert reply.status_code == 400 and reply.json()["error"]["code"] == "content_filter"
        assert "the question was flagged by moderation (violence)" in reply.text
        flags.clear()
        flags.add("bc")
        for stream in (False, True):
            reply = post(url, ask | {"stream": stream})
            shown = re.sub('"chatcmpl-[0-9a-f]+"', "", reply.text)           # an id may hold these letters by chance
            assert "the answer was flagged by moderation (violence)" in shown and "abc" not in shown
            assert reply.status_code == (200 if stream else 400) and "[DONE]" not in reply.text
        flags.clear()
        for broken[:] in ((b"no", 500), (b"no", 200), (b"{}", 200), (b'{"results": []}', 200), (b'{"results": [{}]}', 200)):
            reply = post(url, ask)
            assert reply.status_code == 502 and "could not be moderated" in reply.json()["error"]["message"], broken
        broken.clear()
        assert post(url, ask).ok
    with server(tmp_path / "gone", endless, "--moderation", judge) as url:
        assert post(url, ask).status_code == 502


# ---------------------------------------------------------------------------------------------------------------------
# The page


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium here (apt-get install chromium)")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """tab(url) opens the page; in the end nothing in it has failed, and nothing was asked of another server."""
    opened = []

    def open_tab(url, **how):
        page = browser.new_page(**how)
        page.set_default_timeout(20_000)
        asked, failed = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(error))
        page.goto(url)
        page.wait_for_selector("#examples img")
        opened.append((page, url, asked, failed))
        return page
    yield open_tab
    for page, url, asked, failed in opened:
        assert not failed, f"a script of the page failed: {failed}"
        foreign = [address for address in asked if not address.startswith((url, "data:"))]
        assert asked and not foreign, f"the page asks other servers: {foreign}"
        if not page.is_closed():
            page.close()


def ask_page(page, question):
    """Type a question, press Enter, and wait for the answer's end; the answer."""
    page.fill("#text", question)
    page.press("#text", "Enter")
    page.wait_for_selector("button:text('Regenerate')")
    return page.evaluate("turns.at(-1).box.querySelector('.answer p').textContent")


def test_the_page_has_a_conversation_about_a_picture(url, talker, pictures, tab):
    """A picture is chosen, an answer streamed; a second turn knows the first; an answer is generated anew, copied, its
    prompt shown, the last question edited: always what the model says to exactly that."""
    page, image = tab(url), [load_image(pictures[1])]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.set_input_files("#file", pictures[1])
    page.wait_for_selector("#new img")
    turns = [talker.ask(QUESTION, 1)]
    first = talker.answers([(turns, image)])[0]
    assert ask_page(page, QUESTION) == first and page.locator(".question img").count() == 1
    turns += [{"from": "gpt", "value": first}]
    second = talker.answers([([*turns, talker.ask("And then?")], image)])[0]
    assert ask_page(page, "And then?") == second, "the second turn does not know the first"
    page.click("button:text('Regenerate')")
    page.wait_for_selector("button:text('Regenerate')")
    assert page.locator(".answer p").all_text_contents()[1] == second
    page.locator("button:text('Copy')").last.click()
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()").strip() == second.replace("\r", "\n").strip()
    page.locator("button:text('Prompt')").last.click()
    page.wait_for_selector(".more pre")
    m = talker.model
    ids = prompt([*turns, talker.ask("And then?")], image, m.tokenizer, talker.template, m.view)["input_ids"]
    assert page.locator(".more pre").all_text_contents()[1] == " ".join(map(str, ids))
    page.click("button:text('Edit')")
    assert page.input_value("#text") == "And then?" and page.locator(".turn").count() == 1
    assert ask_page(page, "And now?") == talker.answers([([*turns, talker.ask("And now?")], image)])[0]


def test_sampling_controls_reach_the_model(url, tab, talker):
    """The fields are what the request says."""
    page = tab(url)
    page.click("summary:text('Sampling')")
    for name, value in (("temperature", "1"), ("max_tokens", "5"), ("seed", "3")):
        page.fill(f"#{name}", value)
    want = post(url, {"messages": [user(QUESTION)], "temperature": 1, "max_tokens": 5, "seed": 3}).json()
    assert ask_page(page, QUESTION) == want["choices"][0]["message"]["content"]
    assert "cut off" in page.inner_text("#status"), "an answer that the limit ended looks like a whole one"


def test_stop_and_a_closed_tab_end_the_answer_on_the_server(slow, tab):
    """Stop keeps what has come, by button or Escape, and a tab that is closed needs no more: the next one is served."""
    page = tab(slow)
    for stop in (lambda: page.click("#stop"), lambda: page.press("#text", "Escape")):
        page.fill("#text", "Say it.")
        page.click("#send")
        wait_until(lambda: page.evaluate("turns.at(-1)?.answer.startsWith('abc abc')"))
        stop()
        page.wait_for_selector("text=Stopped")
        assert page.evaluate("turns.at(-1).answer").startswith("abc abc")
        still_answers(slow)
    page.fill("#text", "Say it.")
    page.press("#text", "Enter")
    wait_until(lambda: page.evaluate("turns.at(-1)?.answer.startsWith('abc abc')"))
    page.close()
    still_answers(slow)


def test_the_page_shows_the_place_in_the_queue(slow, tab):
    """Who waits is told how many are before them, and answered when these are gone."""
    page, (first, lines) = tab(slow), stream_of(slow)
    next(lines)
    page.click("summary:text('Sampling')")
    page.fill("#max_tokens", "5")
    page.fill("#text", "Say it.")
    page.press("#text", "Enter")
    page.wait_for_selector("text=In the queue: 1 before you")
    first.close()
    page.wait_for_selector("button:text('Regenerate')")
    assert page.evaluate("turns.at(-1).answer")


def test_the_page_says_what_is_wrong_and_goes_on(url, tab, tmp_path):
    """A broken file, no picture at all, an empty question, a server that is gone: each is said, and the chat goes on."""
    (tmp_path / "torn.png").write_bytes(picture_file((50, 50))[:60])
    (tmp_path / "text.txt").write_text("not a picture")
    page = tab(url)
    page.click("#send")
    page.wait_for_selector("#problem:text('Write a question first.')")
    page.set_input_files("#file", tmp_path / "text.txt")
    page.wait_for_selector("#problem:text('text.txt is not a picture')")
    page.set_input_files("#file", tmp_path / "torn.png")
    page.wait_for_selector("#new img")
    ask_page(page, QUESTION)
    assert "picture 1: not a readable picture" in page.inner_text(".turn .error")
    assert ask_page(page, QUESTION) and page.locator(".turn .error").count() == 1, "a failed question spoils the next"
    page.context.set_offline(True)
    ask_page(page, QUESTION)
    assert "cannot be reached" in page.locator(".turn .error").last.inner_text()


def test_pictures_are_dropped_pasted_taken_from_the_examples_and_removed(url, tab, pictures):
    """Every way in leads to the same place."""
    page = tab(url)
    into = """([kind, data]) => {
        const transfer = new DataTransfer()
        transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], "x.png", {type: "image/png"}))
        const more = {bubbles: true, cancelable: true}
        document.body.dispatchEvent(kind == "drop" ? new DragEvent("drop", {dataTransfer: transfer, ...more})
                                                   : new ClipboardEvent("paste", {clipboardData: transfer, ...more}))}"""
    for n, kind in enumerate(("drop", "paste"), 1):
        page.evaluate(into, [kind, base64.b64encode(pictures[1].read_bytes()).decode()])
        page.wait_for_selector(f"#new img >> nth={n - 1}")
    page.click("#examples button >> nth=2")
    assert page.locator("#new img").count() == 3
    page.click("#new button >> nth=0")
    assert page.locator("#new img").count() == 2
    assert ask_page(page, QUESTION) and page.locator(".question img").count() == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"viewport": {"width": 360, "height": 640}, "has_touch": True, "color_scheme": "dark"},
                                 {"viewport": {"width": 1200, "height": 800}, "color_scheme": "light"}])
def test_the_page_fits_a_phone_and_a_keyboard(how, url, tab):
    """Nothing is wider than the screen, everything has a name and can be reached by Tab, text stands out from its ground."""
    page = tab(url, **how)
    assert page.evaluate("document.activeElement.id") == "text", "one cannot type at once"
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent || "
                                  "document.activeElement.ariaLabel"))
    assert reached >= {"fresh", "text", "file", "Sampling", "send", "Take example picture 1"}, reached
    page.focus("#examples button >> nth=0")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "text" and page.locator("#new img").count() == 1
    page.keyboard.type("x" * 300)
    page.keyboard.press("Enter")
    page.wait_for_selector("button:text('Regenerate')")
    page.click("summary:text('Sampling')")
    for side, window in (("scrollWidth", "innerWidth"), ("scrollHeight", "innerHeight")):
        assert page.evaluate(f"document.documentElement.{side} <= {window}"), f"{side} is more than the screen has"
    unnamed = page.evaluate("""[...document.querySelectorAll("button, input, textarea")].filter(
        e => !(e.textContent.trim() || e.ariaLabel || e.labels?.[0]?.textContent.trim())).map(e => e.outerHTML)""")
    assert not unnamed, f"no name for a screen reader: {unnamed}"
    light = [sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{what}"))[:3])) / 765
             for what in ("color", "backgroundColor")]
    assert (light[0] > 0.8 and light[1] < 0.2) if how["color_scheme"] == "dark" else (light[0] < 0.2 and light[1] > 0.8), light


def test_the_page_shows_where_the_model_looked(url, tab):
    """Of every word of the answer there is a picture with the weights laid over it."""
    page = tab(url)
    page.click("#examples button >> nth=0")
    ask_page(page, QUESTION)
    page.click("button:text('Where it looked')")
    page.wait_for_selector(".more img")
    words = page.locator(".more button")
    assert words.count() >= 1 and words.first.get_attribute("aria-pressed") == "true"
    assert page.evaluate("document.querySelector('.more img').decode().then(() => true)")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_a_server_is_held_against_what_the_checkpoint_says(checkpoint, chats, tmp_path, capsys):
    """sample.py --parity and --check: the same answers, or an error that shows which differ."""
    folder, questions = tmp_path / "served", tmp_path / "q.jsonl"
    shutil.copytree(checkpoint, folder)
    questions.write_text("".join(json.dumps({"question_id": n, "text": text, "image": "0_0.tiff"}) + "\n"
                                 for n, text in enumerate(["Who?", "What is 0.0?", "Not asked"])))
    sample.main(["--model", str(folder), "--questions", str(questions), "--images", str(chats / "images"), "--parity", "2",
                 "--max_new_tokens", "12"])
    parity = json.loads((folder / "parity.json").read_text())
    assert len(parity["samples"]) == 2 and all(len(s["ids"]) > 10 and s["answer"] for s in parity["samples"])
    with server(tmp_path / "p", folder) as url:
        sample.main(["--model", str(folder), "--check", url])
        assert capsys.readouterr().out.count("the same") == 2
        parity["samples"][1]["answer"] = "another"
        (folder / "parity.json").write_text(json.dumps(parity))
        with pytest.raises(ValueError, match="1 of 2 answers of .* differ"):
            sample.main(["--model", str(folder), "--check", url + "/v1"])
    with pytest.raises(FileNotFoundError, match="--parity 4 writes it"):
        sample.main(["--model", str(checkpoint), "--check", url])


@pytest.mark.slow
def test_transformers_serve_gives_the_same_answers(chats, tmp_path, capsys):
    """A checkpoint of a v1 template is what `transformers serve` takes: the same greedy answers, as many prompt tokens."""
    pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
    folder, questions = save(tiny_llava(), tmp_path / "model", "vicuna_v1"), tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps({"question_id": n, "text": text, "image": "0_0.tiff"}) + "\n"
                                 for n, text in enumerate(["Who?", "What is 0.0?"])))
    sample.main(["--model", str(folder), "--questions", str(questions), "--images", str(chats / "images"), "--parity", "2",
                 "--max_new_tokens", "12"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, "serve", str(folder), "--port", str(port), "--device", "cpu"],
                               env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.5)
        capsys.readouterr()
        sample.main(["--model", str(folder), "--check", f"http://127.0.0.1:{port}"])
    finally:
        process.kill()
    out = capsys.readouterr().out
    tokens = re.findall(r"the same \((\d+) prompt tokens, here (\d+)\)", out)
    assert len(tokens) == 2 and all(used == ours for used, ours in tokens)


def test_what_stops_the_server_from_starting_is_a_plain_error(checkpoint, url, tmp_path):
    """A missing library, a port in use, examples without pictures: what is wrong and what to do, no traceback."""
    code = "import sys, runpy; sys.modules['starlette'] = None; runpy.run_path('serve.py', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "pip install starlette uvicorn" in run.stderr and "Traceback" not in run.stderr
    with pytest.raises(ValueError, match="take another port"):
        serve.main(["--model", str(checkpoint), "--port", url.rpartition(":")[2]])
    with pytest.raises(ValueError, match="no pictures in it"):
        serve.main(["--model", str(checkpoint), "--port", "0", "--examples", str(tmp_path)])


def test_examples_of_a_folder_are_on_the_page(checkpoint, chats, tmp_path):
    """--examples shows the pictures of a folder, in any form, as what every browser shows."""
    with server(tmp_path / "e", checkpoint, "--examples", chats / "images") as url:
        examples = requests.get(url + "/settings", timeout=10).json()["examples"]
    assert len(examples) == 8
    for example in examples:
        assert example.startswith("data:image/jpeg;base64,")
        load_image(io.BytesIO(base64.b64decode(example.partition(",")[2])), "an example")


# ---------------------------------------------------------------------------------------------------------------------
# What the README shows


def take_picture(model, picture, to):
    """The page after two questions about a picture, as a PNG; and how long the first word took."""
    from playwright.sync_api import sync_playwright
    with server(Path(tempfile.mkdtemp()), model, "--temperature", 0) as url, sync_playwright() as play:
        page = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page(
            viewport={"width": 900, "height": 820}, color_scheme="light", device_scale_factor=1)
        page.goto(url)
        page.set_input_files("#file", picture)
        page.wait_for_selector("#new img")
        page.fill("#text", "Describe the image in detail.")
        took = page.evaluate("""() => new Promise(resolve => {
            const began = performance.now()
            new MutationObserver(() => { if (turns[0]?.answer) resolve(performance.now() - began) }).observe(
                document.getElementById("log"), {subtree: true, childList: true, characterData: true})
            document.getElementById("send").click()})""")
        page.wait_for_selector("button:text('Regenerate')")
        ask_page(page, "How many things are there?")
        page.locator("button:text('Prompt')").last.click()
        page.wait_for_selector(".more pre")
        page.screenshot(path=to)
    print(f"{to}; the first word was on the page after {took:.0f} ms")


def measure_crowd(model, seconds):
    """50 clients for so many seconds: counts, latencies, and the server's memory."""
    folder = Path(tempfile.mkdtemp())
    with server(folder, model, "--max_per_client", 50) as url:
        pid = int((folder / "pid").read_text())
        memory = lambda: int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
        name = Path(model).name
        crowd(url, name, 2)
        before = memory()
        asked = crowd(url, name, seconds)
        after = memory()
    talker = sample.Talker(sample.Config(str(model), temperature=0, max_new_tokens=12))
    wrong = sum(talker.answers([([talker.ask(question, 1)], [picture])]) != [answer] for question, picture, answer, _ in asked)
    took = sorted(seconds for *_, seconds in asked)
    print(f"50 clients, {seconds} s: {len(asked)} requests answered, none dropped, {wrong} with another answer than alone; "
          f"latency median {took[len(took) // 2]:.2f} s, largest {took[-1]:.2f} s; "
          f"memory {before:.0f} MB after 2 s, {after:.0f} MB at the end")


if __name__ == "__main__":
    if sys.argv[1] == "picture":
        take_picture(*sys.argv[2:5])
    else:
        measure_crowd(sys.argv[2], float((sys.argv + ["60"])[3]))
