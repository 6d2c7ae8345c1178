"""Letting others ask: the API by OpenAI's own client, the page by Chromium, real processes."""
import base64
import http.server
import importlib
import io
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np
import openai
import pytest
import requests
from conftest import (
    ROOT,
    byte_tokenizer,
    scripted_llm,
    start_script,
    tiny_clip,
    tiny_llava,
    wait_until,
)
from PIL import Image
from test_sample import save_checkpoint

import sample
from extras import serve
from model import LLaVA
from parts.pictures import data_url, load_image

CHROMIUM = (shutil.which("chromium") or shutil.which("chromium-browser")
            or shutil.which("google-chrome"))
QUESTION = "What is 0.0?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model whose answers depend on all of its prompt."""
    return save_checkpoint(tiny_llava(), tmp_path_factory.mktemp("serve") / "my_run")


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that says "abc abc abc ..." and has a context of 100,000 tokens to say it in."""
    llm = scripted_llm(": abc abc")
    llm.config.max_position_embeddings = 100_000
    model = LLaVA(tiny_clip(), llm, byte_tokenizer())
    return save_checkpoint(model, tmp_path_factory.mktemp("endless") / "endless")


@contextmanager
def server(folder, model, *flags):
    """The address of `python -m extras.serve`, a process of its own in a folder of its own."""
    folder.mkdir(exist_ok=True)
    output = folder / "output"
    process = start_script(folder, "extras.serve", "--model", model, "--port", 0, *flags)
    try:
        wait_until(lambda: "http://" in output.read_text() or not process.is_alive(), 120)
        yield re.search(r"http://\S+:\d+", output.read_text())[0]
        assert process.is_alive(), "the server did not live to its end: " + output.read_text()
    finally:
        process.terminate()
        process.join(20)
        shown = output.read_text()
    assert not process.is_alive(), "it does not end"
    assert "Traceback" not in shown and "the server failed" not in shown, shown


@pytest.fixture(scope="module")
def url(checkpoint, tmp_path_factory):
    flags = ("--temperature", 0, "--max_new_tokens", 12)
    with server(tmp_path_factory.mktemp("url"), checkpoint, *flags) as url:
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
    return [load_image(chats / "images" / name) for name in ("0_0.tiff", "5_0.png")]


def client_of(url):
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


def user(text, *pictures):
    """A message of the API, with pictures (PIL, or addresses)."""
    urls = [one if isinstance(one, str) else data_url(one) for one in pictures]
    parts = [{"type": "image_url", "image_url": {"url": address}} for address in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def post(url, body, path="/v1/chat/completions", **more):
    return requests.post(url + path, **({"json": body, "timeout": 60} | more))


def still_answers(url):
    assert post(url, {"messages": [user("Well?")], "max_tokens": 3}).ok


# -----------------------------------------------------------------------------
# The endpoint


def test_the_official_client_gets_the_models_answer(url, talker, pictures, checkpoint):
    """At once or in pieces: what Talker says of the same turns. /v1/models names the model."""
    client = client_of(url)
    assert [model.id for model in client.models.list()] == [checkpoint.name]
    turns = [sample.human_turn(QUESTION, 2)]
    first, = talker.answers([(turns, pictures)])
    turns += [{"from": "gpt", "value": first}, sample.human_turn("And then?")]
    expected, = talker.answers([(turns, pictures)])
    assert len(expected) > 3, "the model says too little: nothing was tested"
    request = {"model": checkpoint.name, "messages": [
        user(QUESTION, *pictures), {"role": "assistant", "content": first}, user("And then?")]}
    reply = client.chat.completions.create(**request)
    assert reply.choices[0].message.content == expected
    assert reply.choices[0].finish_reason == "length"
    ids = talker.prompt(turns, pictures)["input_ids"]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 12)
    *chunks, last = client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert len(chunks) > 5, "the answer was not sent as it came"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage == reply.usage and not last.choices
    shown = post(url, request, "/prompt").json()
    assert shown["ids"] == ids, "the prompt on demand is not what the model is asked"


def test_a_request_says_how_it_is_sampled(url, talker):
    """Lengths, temperature, top_p, seed and stop hold for the one request that names them."""
    def answer(**how):
        reply = post(url, {"messages": [user(QUESTION)]} | how).json()
        choice = reply["choices"][0]
        usage = reply["usage"]["completion_tokens"]
        return choice["message"]["content"], choice["finish_reason"], usage
    greedy, = talker.answers([([sample.human_turn(QUESTION)], [])])
    assert answer() == (greedy, "length", 12)
    assert answer(temperature=1.5, top_p=0)[0] == answer(temperature=1e-40)[0] == greedy
    assert answer(max_tokens=4)[1:] == answer(max_completion_tokens=4)[1:] == ("length", 4)
    one, again, other = (answer(temperature=1, seed=seed)[0] for seed in (1, 1, 2))
    assert one == again and len({one, other, greedy}) == 3, "seed or temperature has no effect"
    assert len({answer(temperature=1)[0] for _ in range(4)}) > 1, "every draw is the same"
    cut = greedy[:greedy.index(greedy[3:5])].strip()
    for stop in (greedy[3:5], ["never said", greedy[3:5]]):
        assert answer(stop=stop)[:2] == (cut, "stop"), "not cut before the stop string"


ASK = [user("Why?")]
CLAIMED = {"X-Forwarded-For": "10.0.0.1"}
BAD = [
    ({"messages": [user("")]}, 400, "0 characters; 1 to 4000"),
    ({"messages": [{"role": "system"}, user("Why?"), user("?")]}, 400, "system message"),
    ({"messages": [*ASK, user("Why?"), user("Why?")]}, 400, r"messages\[1\] is from 'user'"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "content is nei"),
    ({"messages": [user("x" * 4001)]}, 400, "4001 characters; 1 to 4000"),
    ({"messages": [user("x" * 600)]}, 400, "context is 512"),
    ({"messages": [user("<image>\nWhy?")]}, 400, "<image>"),
    ({"messages": [user("\ud83d")]}, 400, "surrogate"),
    ({"messages": [user("?", "http://127.0.0.1/x.png")]}, 400, "fetches none"),
    ({"messages": [user("?", "data:image/png;base64,@")]}, 400, "base64"),
    ({"messages": ASK, "model": "gpt-4"}, 404, "no model 'gpt-4' here, but 'my_run'"),
    ({"messages": ASK, "temperature": float("nan")}, 400, "temperature nan: it is a number from"),
    ({"messages": ASK, "seed": True}, 400, "seed True"),
    ({"messages": ASK, "answer": "So."}, 400, "'answer' is not supported.* taken are max_compl"),
    ({"messages": ASK, "stream_options": {"include_usage": "yes"}}, 400, "neither true nor false"),
    ({"messages": ASK, "stream_options": {"x": 3}}, 400, "stream_options: 'x' is not supported"),
    ({"messages": ASK, "stop": [""]}, 400, "stop"),
    ({"messages": ASK, "tools": [{"type": "function"}]}, 400, "'tools' is not supported"),
    ("not JSON", 400, "not JSON.*line 1"), ("[" * 10 ** 5, 400, "not JSON.*recursion"),
    ("[]", 400, "not a JSON object")]


@pytest.mark.parametrize("body, status, says", BAD)
def test_what_cannot_be_answered_is_an_error_in_the_form_of_the_api(body, status, says, url):
    """A status before any of a stream is sent, and words that name what is wrong."""
    if isinstance(body, dict):
        body = json.dumps({"stream": True} | body)
    reply = post(url, None, data=body.encode(), headers={"Content-Type": "application/json"})
    error = reply.json()["error"]
    assert reply.status_code == status and re.search(says, error["message"]), reply.text
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    still_answers(url)
    plain = post(url, None, data=body.encode(), headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415, "any page in the same browser could use this server"


def test_other_paths_methods_and_fields_are_refused_in_the_form_of_the_api(url):
    """A client reads `error`, whatever it did wrong; an answer is a field of /attention alone."""
    body = {"messages": ASK, "answer": "So."}
    for reply, status in ((post(url, body, "/v1/completions"), 404),
                          (post(url, body, "/prompt"), 400),
                          (requests.get(url + "/v1/chat/completions", timeout=20), 405),
                          (post(url, {"messages": ASK}, "/attention"), 400)):
        assert reply.status_code == status and reply.json()["error"]["message"], reply.text


def test_options_that_ask_for_nothing_are_taken(url, pictures):
    """Clients name options at their neutral values; some break the lines of base64."""
    head, data = data_url(pictures[1]).split(",")
    address = head + "," + "\r\n".join(data[i:i + 76] for i in range(0, len(data), 76))
    more = {"top_k": -1, "tool_choice": "none", "tools": [], "n": 1, "logprobs": False,
            "response_format": {"type": "text"}, "presence_penalty": 0, "repetition_penalty": 1.0,
            "stream_options": None, "seed": None, "stop": None, "logit_bias": {}, "best_of": 1,
            "service_tier": "auto", "skip_special_tokens": True, "reasoning_effort": "none"}
    reply = post(url, {"messages": [user(QUESTION, address)]} | more)
    assert reply.ok and reply.text.count("content") == 1, reply.text


def test_whatever_is_sent_is_an_answer_or_an_error_in_the_form_of_the_api(url, pictures):
    """Good requests in which bytes were changed: no status 5xx, which the server's end asserts."""
    rng = random.Random(0)
    good = {"messages": [user(QUESTION, pictures[1])], "stop": ["x"], "seed": 1, "answer": "A dog."}
    good = json.dumps(good | {"stream_options": {"include_usage": True}, "model": "my_run"})
    deep = "[" * 900 + "]" * 900
    bodies = [good.replace('"seed": 1', f'"{name}": {deep}') for name in
              ("temperature", "top_k", "stop", "stream_options", "messages", "model", "answer")]
    bodies += ["[" * 10 ** 6, deep, "\0", good.replace('"x"', r'"\ud83d"'), "1" * 5000]
    for _ in range(200):
        at = rng.choice([rng.randrange(len(good)), rng.randrange(40, 80), -rng.randrange(1, 150)])
        piece = rng.choice(["", "null", "-1e999", '"', "{", "\\", "\ufffd", "[[]]", '"a":'])
        bodies.append(good[:at] + piece + good[at:][rng.randrange(20):])
    for body in bodies:
        for path in ("/v1/chat/completions", "/prompt", "/attention"):
            reply = post(url, None, path, data=body.encode(),
                         headers={"Content-Type": "application/json"})
            assert reply.ok or reply.json()["error"]["message"], (path, body)
            assert reply.status_code < 500, (path, body, reply.text)


def test_a_picture_may_be_small_but_not_broken_and_not_too_large(url, pictures):
    """20,000 x 20,000 pixels are refused by their head, before they are decoded."""
    noise = np.random.default_rng(0).integers(0, 256, (2000, 4000, 3), dtype=np.uint8)
    huge = base64.b64decode(data_url(Image.new("RGB", (2, 2))).partition(",")[2])
    huge = huge[:16] + (20_000).to_bytes(4, "big") * 2 + huge[24:]
    huge = huge[:29] + zlib.crc32(huge[12:29]).to_bytes(4, "big") + huge[33:]    # of a PNG's head
    where = r"messages\[0\], picture 1: "
    for address, status, says in (
            (data_url(Image.new("RGB", (1, 1))), 200, ""),
            ("data:;base64," + base64.b64encode(huge).decode(), 400, "1200 megapixels; at most 50"),
            ("data:;base64,PGh0bWw+", 400, where + "not a readable picture"),
            (data_url(pictures[1])[:-200], 400, where + "not a readable picture"),
            (data_url(Image.fromarray(noise)), 413, r"\d\d\.\d MB; at most 20 are taken"),
            (data_url(Image.new("L", (5000, 4000))), 400, "60 megapixels; at most 50 are taken")):
        n_pictures = 3 if "megapixels" in says else 1
        reply = post(url, {"messages": [user(QUESTION, *[address] * n_pictures)]})
        assert reply.status_code == status and re.search(says, reply.text), reply.text
        still_answers(url)


# -----------------------------------------------------------------------------
# Bad clients


def test_a_foreign_name_a_foreign_page_and_a_claimed_address_gain_nothing(url, endless, tmp_path):
    """DNS rebinding, CORS and X-Forwarded-For: trusted only as far as a flag says."""
    origin = {"Origin": "https://lab.org"}
    for path in ("/", "/v1/models"):
        for host, status in (("evil.org", 421), ("localhost.evil.org:80", 421), ("", 421),
                             ("evil.org@localhost", 421), ("localhost/evil.org", 421),
                             ("LOCALHOST:1", 200), ("[::1]:8000", 200), ("10.0.0.1", 200)):
            reply = requests.get(url + path, headers={"Host": host} | origin, timeout=20)
            assert reply.status_code == status, host
            assert "Access-Control-Allow-Origin" not in reply.headers
    flags = ["--max_new_tokens", 90_000, "--max_per_client", 1, "--trust_proxy", "127.0.0.1",
             "--allow_host", "llava.org", "--allow_origin", "https://lab.org"]
    with server(tmp_path / "f", endless, *flags) as other:
        stream, _ = stream_of(other)
        reply = post(other, {"messages": ASK}, "/prompt", headers=CLAIMED | origin)
        assert reply.ok and reply.headers["Access-Control-Allow-Origin"] == "https://lab.org"
        stream.close()
        assert requests.get(other, headers={"Host": "llava.org"}, timeout=20).ok


def test_who_is_slow_on_purpose_is_cut_off_and_fills_no_log(endless, tmp_path):
    """Half heads, dripping bodies, garbage, damaged pictures, answers that nobody takes."""
    with server(tmp_path / "s", endless, "--timeout", 1, "--max_queue", 2) as url:
        before = (tmp_path / "s" / "output").read_text()
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        head = b"POST /prompt HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
        raws = [socket.create_connection(address, 20) for _ in range(12)]
        starts = [head, head + b"\r\n", b"\0garbage\r\n\r\n", b""] * 3
        for raw, start in zip(raws, starts, strict=True):
            raw.sendall(start)
        still_answers(url)               # 3 bodies that drip are no queue of 2
        for _ in range(4):
            for raw in raws:
                with suppress(OSError):
                    raw.sendall(b"x")
            time.sleep(0.4)
        replies = [b"".join(iter(partial(receive, raw), b"")) for raw in raws]
        for reply, says in zip(replies, [b"", b" 408 ", b" 400 ", b""] * 3, strict=True):
            assert says in reply and bool(says) == bool(reply), reply
        torn = data_url(Image.new("P", (50, 50)), "TIFF")    # of which libtiff has much to print
        assert post(url, {"messages": [user("?", torn)]}).status_code == 400
        assert post(url, {"messages": ASK, "stop": "a" * 10 ** 6}).status_code == 400
        still_answers(url)
        assert (tmp_path / "s" / "output").read_text() == before, "bad clients fill the log"


@pytest.mark.slow
def test_fifty_clients_of_whom_twenty_mean_no_good():
    """No good client is refused or gets another's answer, and no status is 5xx."""
    command = [sys.executable, "tests/soak_server.py", "10"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def receive(raw):
    """What comes next over a socket; nothing if it was closed."""
    try:
        return raw.recv(1000)
    except ConnectionError:
        return b""


# -----------------------------------------------------------------------------
# Many at once


def stream_of(url, **more):
    body = {"messages": [user("Say it.")], "stream": True} | more
    reply = post(url, body, stream=True)
    assert reply.status_code == 200, reply.text
    return reply, (line for line in reply.iter_lines(decode_unicode=True, chunk_size=1) if line)


def test_requests_wait_in_line_and_who_goes_away_leaves_it(slow):
    """First come, first served, and the waiting hear their place; who hangs up is forgotten."""
    first, lines = stream_of(slow)
    assert '"content": "' in [next(lines) for _ in range(10)][-1], "the first is not answered"
    _, waiting = stream_of(slow, max_tokens=30)
    next(waiting)
    assert next(waiting) == ": 1 before you", "nobody tells the waiting where they stand"
    for _ in range(2):                   # leaves the line, then while it is answered
        with pytest.raises(requests.ReadTimeout):
            post(slow, {"messages": [user("Say it.")]}, timeout=0.5)
        first.close()
    rest = list(waiting)
    assert rest[-1] == "data: [DONE]" and "length" in rest[-2]
    began = time.time()
    still_answers(slow)
    assert time.time() - began < 10, "an answer that nobody waits for holds up the line"


@pytest.mark.parametrize("flag, says", [("--max_queue", "queue is full: 1 requests"),
                                        ("--max_per_client", "1 requests from 127.0.0.1")])
def test_a_full_queue_and_a_greedy_client_are_told_so(flag, says, endless, tmp_path):
    """Beyond the limit the answer is 429 with a message; with room it is an answer again."""
    with server(tmp_path / "q", endless, flag, 1, "--max_new_tokens", 90_000) as url:
        stream, _ = stream_of(url)
        with pytest.raises(openai.RateLimitError, match=says) as error:
            client_of(url).chat.completions.create(model="endless", messages=[user("Well?")])
        assert error.value.code == "queue_full" and error.value.type == "rate_limit_error"
        reply = post(url, {"messages": ASK}, headers=CLAIMED)
        assert reply.status_code == 429, "an address that anybody claims lifts the limit"
        stream.close()
        wait_until(lambda: post(url, {"messages": [user("?")]}, "/prompt").ok)


def picture_of(content):
    """The picture (PIL) in the image form of a moderation request."""
    part, = content
    address = part["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
    return Image.open(io.BytesIO(base64.b64decode(address)))


class Judge(http.server.BaseHTTPRequestHandler):
    """A moderation endpoint: texts with `flag` and red pictures are violent; or `broken` is all."""
    flag = broken = None
    seen = []                            # texts, and the sizes of pictures

    def do_POST(self):
        assert self.path == "/sk-SECRET/moderations"
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        if isinstance(content, str):
            self.seen.append(content)
            flagged = self.flag is not None and self.flag in content
        else:
            self.seen.append(picture_of(content).size)
            flagged = picture_of(content).getpixel((0, 0))[0] > 200
        result = {"flagged": flagged, "categories": {"violence": flagged, "hate": False}}
        status, text = self.broken or (200, json.dumps({"results": [result]}))
        self.wfile.write(f"HTTP/1.0 {status} -\r\n\r\n{text}".encode())


def address_of(picture, form, **how):
    file = io.BytesIO()
    picture.save(file, form, **how)
    return f"data:image/{form.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def test_moderation_sees_text_and_pictures_and_nothing_passes_it_unseen(endless, tmp_path):
    """App. A's two filters, and the answer: what is flagged is neither answered nor shown, not even
    its first words; pictures are seen as the model sees them; without a verdict nothing passes."""
    judge = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=judge.serve_forever, daemon=True).start()
    red, blue, large = (Image.new("RGB", (w, 30), c)
                        for w, c in ((30, "red"), (40, "blue"), (4000, "blue")))
    turned = Image.Exif()
    turned[0x0112] = 6                   # lies on its side
    animated = address_of(blue, "GIF", save_all=True, append_images=[red.resize(blue.size)])
    lying = address_of(blue, "JPEG", exif=turned)
    flags = ["--moderation", f"http://127.0.0.1:{judge.server_port}/sk-SECRET"]
    with server(tmp_path / "m", endless, *flags, "--max_new_tokens", 20) as url:
        body = {"messages": [user("Say it.", animated, lying, large)]}
        answer = post(url, body).json()["choices"][0]["message"]["content"]
        assert answer.startswith("abc abc")
        assert Judge.seen == ["Say it.", (40, 30), (30, 40), (2048, 15), answer]
        assert f'"content": "{answer}"' in post(url, body | {"stream": True}).text
        asked = [user("Say it.", blue), {"role": "assistant", "content": "abc"}, user("And?", red)]
        for stream in (False, True):
            Judge.flag = "Say"
            reply = post(url, body | {"stream": stream})
            assert "the question was flagged by moderation (violence)" in reply.text
            Judge.flag = None
            refused = post(url, {"messages": asked, "stream": stream})
            assert "picture 2 of 2 was flagged by moderation (violence)" in refused.text
            for one in (reply, refused):
                assert one.status_code == 400 and one.json()["error"]["code"] == "content_filter"
            Judge.flag = "bc"
            reply = post(url, body | {"stream": stream})
            shown = re.sub('"chatcmpl-[0-9a-f]+"', "", reply.text)   # may hold these letters
            assert "the answer was flagged by moderation (violence)" in shown
            assert "abc" not in shown and "[DONE]" not in shown
        Judge.flag = None
        for text in ("no", "{}", '{"results": []}', '{"results": [{}]}'):
            Judge.broken = 200, text
            reply = post(url, body)
            assert reply.status_code == 502 and "could not be moderated" in reply.text, text
        Judge.broken = 400, '{"error": {"message": "input is not a string"}}'
        assert post(url, body).status_code == 502, "what the endpoint does not take passes"
        judge.shutdown()
        judge.server_close()
        reply = post(url, body)
        assert reply.status_code == 502, "without a judge the text passes unseen"
        assert "(ConnectionError)" in reply.text and "sk-SECRET" not in reply.text


# -----------------------------------------------------------------------------
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
    """tab(url) opens the page; in the end nothing has failed, and no other server was asked."""
    page = browser.new_page(viewport={"width": 360, "height": 640}, color_scheme="dark")
    page.set_default_timeout(20_000)
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(error))

    def open_tab(url):
        page.goto(url)
        wait_until(lambda: page.evaluate("settings.model"))
        return page
    yield open_tab
    assert not failed, f"a script of the page failed: {failed}"
    assert all(address.startswith((asked[0], "data:")) for address in asked), asked


def ask_page(page, question):
    """Type a question, press Enter, and wait for the answer's end; the answer."""
    page.fill("#text", question)
    page.press("#text", "Enter")
    page.wait_for_selector("button:text('Regenerate')")
    return page.evaluate("turns.at(-1).box.querySelector('.answer p').textContent")


@pytest.mark.slow
def test_the_page_has_a_conversation_about_a_picture(url, talker, pictures, chats, tab):
    """Ask, go on, see prompt and attention, edit: always what the model says to it."""
    page = tab(url)
    page.click("#send")
    page.wait_for_selector("#problem:text('Write a question first.')")
    page.set_input_files("#file", chats / "images" / "5_0.png")
    page.wait_for_selector("#new img")
    image = pictures[1:]
    turns = [sample.human_turn(QUESTION, 1)]
    first, = talker.answers([(turns, image)])
    assert ask_page(page, QUESTION) == first and page.locator(".question img").count() == 1
    turns += [{"from": "gpt", "value": first}, sample.human_turn("And then?")]
    second, = talker.answers([(turns, image)])
    assert ask_page(page, "And then?") == second, "the second turn does not know the first"
    page.locator("button:text('Prompt')").last.click()
    page.wait_for_selector(".more pre")
    ids = talker.prompt(turns, image)["input_ids"]
    assert page.locator(".more pre").all_text_contents()[1] == " ".join(map(str, ids))
    page.locator("button:text('Where it looked')").first.click()
    page.wait_for_selector(".more img")
    page.click("button:text('Edit')")
    turns[-1] = sample.human_turn("And now?")
    assert ask_page(page, "And now?") == talker.answers([(turns, image)])[0]
    page.click("summary:text('Sampling')")
    page.fill("#max_tokens", "2")
    assert len(ask_page(page, "More?")) <= 2, "the fields do not reach the model"
    assert "cut off" in page.inner_text("#status"), "a cut answer looks like a complete one"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than a phone"
    page.context.set_offline(True)
    ask_page(page, QUESTION)
    assert "cannot be reached" in page.locator(".turn .error").last.inner_text()


@pytest.mark.slow
def test_the_page_shows_the_queue_and_stops_answers_on_the_server(slow, tab):
    """Who waits is told how many are before them; Escape ends an answer, on the server, too."""
    page = tab(slow)
    first, lines = stream_of(slow)
    next(lines)
    page.fill("#text", "Say it.")
    page.press("#text", "Enter")
    page.wait_for_selector("text=In the queue: 1 before you")
    first.close()
    wait_until(lambda: page.evaluate("turns.at(-1)?.answer.startsWith('abc abc')"))
    page.press("#text", "Escape")
    page.wait_for_selector("text=Stopped")
    still_answers(slow)


# -----------------------------------------------------------------------------
# The command


def test_what_stops_the_server_from_starting_is_a_plain_error(checkpoint, url, monkeypatch):
    """A missing library, a port in use: what is wrong and what to do, no traceback."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "starlette.applications", None)
        with pytest.raises(SystemExit, match="error: extras.serve needs them: pip install starl"):
            importlib.reload(serve)
    with pytest.raises(ValueError, match="--port .*already in use.*; take another port"):
        serve.main(["--model", str(checkpoint), "--port", url.rpartition(":")[2]])
    monkeypatch.setenv("OPENAI_API_KEY", "sk-SECRET\n1")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
        serve.main(["--model", str(checkpoint), "--moderation", "http://127.0.0.1:1/v1"])
    assert "SECRET" not in str(error.value)


def test_a_failure_of_the_server_shows_nobodys_words(checkpoint, capsys):
    """Neither the client nor the server's output sees an exception's text; each is told once."""
    here = serve.Server(serve.Config(str(checkpoint)))
    words = "-".join(("sk", "SECRET"))   # no line of code holds them
    for _ in range(2):
        try:
            raise OSError(words)
        except OSError as error:
            assert words not in json.dumps(serve.refusal_of(error).json)
            here.report(error)
    shown = capsys.readouterr().err
    assert shown.count("the server failed, OSError") == 1 and words not in shown
