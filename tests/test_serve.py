"""Letting others ask: the API by OpenAI's own client, the page by Chromium, real processes."""
import asyncio
import base64
import http.server
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import openai
import pytest
import requests
from conftest import ROOT, byte_tokenizer, scripted_llm, start_script, tiny_clip, tiny_llava
from PIL import Image
from test_sample import save_checkpoint

import sample
from extras import serve
from extras.probe import data_url
from model import LLaVA
from parts.pictures import load_image

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
        assert process.is_alive(), output.read_text()
        yield re.search(r"http://\S+:\d+", output.read_text())[0]
        assert process.is_alive(), "the server did not live to its end: " + output.read_text()
    finally:
        process.terminate()
        process.join(20)
    assert not process.is_alive() and "Traceback" not in output.read_text(), output.read_text()


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


def wait_until(true, seconds=20):
    deadline = time.time() + seconds
    while not true():
        assert time.time() < deadline, "it did not happen"
        time.sleep(0.02)


# -----------------------------------------------------------------------------
# The endpoint


def test_the_official_client_gets_the_models_answer(url, talker, pictures, checkpoint):
    """At once or in pieces: what Talker says of the same turns. /v1/models names the model."""
    client = client_of(url)
    assert [model.id for model in client.models.list()] == [checkpoint.name]
    turns = [talker.ask(QUESTION, 2)]
    first, = talker.answers([(turns, pictures)])
    turns += [{"from": "gpt", "value": first}, talker.ask("And then?")]
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
    assert {chunk.model for chunk in chunks} == {checkpoint.name}
    shown = post(url, request, "/prompt").json()
    assert shown["ids"] == ids, "the prompt on demand is not what the model is asked"


def test_a_request_says_how_it_is_sampled(url, talker, checkpoint):
    """Lengths, temperature, top_p, seed and stop hold for the one request that names them."""
    client = client_of(url)

    def answer(**how):
        reply = client.chat.completions.create(model=checkpoint.name, messages=[user(QUESTION)],
                                               **how)
        choice = reply.choices[0]
        return choice.message.content, choice.finish_reason, reply.usage.completion_tokens
    greedy, = talker.answers([([talker.ask(QUESTION)], [])])
    assert answer() == (greedy, "length", 12)
    assert answer(temperature=1.5, top_p=0)[0] == answer(temperature=1e-40)[0] == greedy
    assert answer(max_tokens=4)[1:] == answer(max_completion_tokens=4)[1:] == ("length", 4)
    one, again, other = (answer(temperature=1, seed=seed)[0] for seed in (1, 1, 2))
    assert one == again and len({one, other, greedy}) == 3, "seed or temperature has no effect"
    assert len({answer(temperature=1)[0] for _ in range(4)}) > 1, "every draw is the same"
    for stop in (greedy[3:5], ["never said", greedy[3:5]]):
        cut = greedy[:greedy.index(greedy[3:5])].strip()
        assert answer(stop=stop)[:2] == (cut, "stop"), "not cut before the stop string"
        chunks = client.chat.completions.create(model=checkpoint.name, messages=[user(QUESTION)],
                                                stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == cut


ASK = [user("Why?")]
BAD = [
    ({"messages": [user("")]}, 400, "question is empty"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "system"}, user("Why?"), user("?")]}, 400, "system message"),
    ({"messages": [*ASK, user("Why?"), user("Why?")]}, 400, r"messages\[1\] is from 'user'"),
    ({"messages": [*ASK, {"role": "assistant", "content": "So."}]}, 400, "ends with one"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "content is nei"),
    ({"messages": [user("x" * 4001)]}, 400, "4001 characters; at most 4000"),
    ({"messages": [user("x" * 600)]}, 400, "context is 512"),
    ({"messages": [user("<image>\nWhy?")]}, 400, "<image>"),
    ({"messages": [user("\ud83d")]}, 400, "surrogates"),
    ({"messages": [user("?", "http://127.0.0.1/x.png")]}, 400, "fetches none"),
    ({"messages": [user("?", "data:image/png;base64,@")]}, 400, "base64"),
    ({"messages": ASK, "model": "gpt-4"}, 404, "no model 'gpt-4' here, but 'my_run'"),
    ({"messages": ASK, "n": 2}, 400, "n 2: it is a number from 1 to 1"),
    ({"messages": ASK, "temperature": -1}, 400, "temperature -1"),
    ({"messages": ASK, "temperature": float("nan")}, 400, "temperature nan"),
    ({"messages": ASK, "max_tokens": 1.5}, 400, "max_tokens 1.5"),
    ({"messages": ASK, "seed": True}, 400, "seed True"),
    ({"messages": ASK, "stop": [""]}, 400, "stop"),
    ({"messages": ASK, "stream": "yes"}, 400, "stream 'yes'"),
    ({"messages": ASK, "tools": [{"type": "function"}]}, 400, "'tools' is not supported"),
    ("not JSON", 400, "not JSON"), ("[" * 100_000, 400, "not JSON"),
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


def test_errors_arrive_as_exceptions_of_the_official_client(url, checkpoint):
    """The client knows an error by its status, and shows its message and code."""
    client = client_of(url)
    with pytest.raises(openai.NotFoundError, match="no model 'other'") as error:
        client.chat.completions.create(model="other", messages=ASK)
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="context is 512") as error:
        client.chat.completions.create(model=checkpoint.name, messages=[user("x" * 600)])
    assert error.value.code == "context_length_exceeded"
    reply = post(url, None, data='{"messages": []}', headers={"Content-Type": "text/plain"})
    assert reply.status_code == 415, "any page in the same browser could use this server"


def png_of(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_a_picture_may_be_small_but_not_broken_and_not_too_large(url, pictures):
    """20,000 x 20,000 pixels are refused by their head, before they are decoded."""
    noise = np.random.default_rng(0).integers(0, 256, (2000, 4000, 3), dtype=np.uint8)
    huge = png_of(Image.new("RGB", (2, 2)))
    huge = huge[:16] + (20_000).to_bytes(4, "big") * 2 + huge[24:]
    huge = huge[:29] + zlib.crc32(huge[12:29]).to_bytes(4, "big") + huge[33:]    # of a PNG's head
    where = r"messages\[0\], picture 1: "
    for file, status, says in (
            (png_of(Image.new("RGB", (1, 1))), 200, ""),
            (huge, 400, where + ".*400000000 pixels.*50000000"),
            (b"<html>", 400, where + "not a readable picture"),
            (png_of(pictures[1])[:-200], 400, where + "not a readable picture"),
            (png_of(Image.fromarray(noise)), 413, r"\d\d\.\d MB; at most 20 are taken")):
        address = "data:image/png;base64," + base64.b64encode(file).decode()
        reply = post(url, {"messages": [user(QUESTION, address)]})
        assert reply.status_code == status and re.search(says, reply.text), reply.text
        still_answers(url)


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
    with pytest.raises(requests.ReadTimeout):                # does not stream, and leaves the line
        post(slow, {"messages": [user("Say it.")]}, timeout=0.5)
    _, waiting_longer = stream_of(slow, max_tokens=3)
    next(waiting_longer)
    assert next(waiting_longer) in (": 1 before you", ": 2 before you", ": 3 before you")
    first.close()
    rest = list(waiting)
    assert rest[-1] == "data: [DONE]" and "length" in rest[-2]
    assert list(waiting_longer)[-1] == "data: [DONE]"
    with pytest.raises(requests.ReadTimeout):                # leaves while it is answered
        post(slow, {"messages": [user("Say it.")]}, timeout=0.5)
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
        stream.close()
        wait_until(lambda: post(url, {"messages": [user("?")]}, "/prompt").ok)
        still_answers(url)


@pytest.mark.slow
def test_fifty_clients_at_once_all_get_their_own_answers(checkpoint, talker, tmp_path):
    """Two questions each, about a picture of its own: none is dropped or gets another's answer."""
    def ask_twice(number):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        questions = [f"What is {number}.{k}?" for k in range(2)]
        answers = [client_of(url).chat.completions.create(
            model=checkpoint.name, messages=[user(question, picture)], temperature=0,
            max_tokens=12).choices[0].message.content for question in questions]
        return picture, questions, answers

    with server(tmp_path / "crowd", checkpoint, "--max_per_client", 50) as url:
        with ThreadPoolExecutor(50) as pool:
            done = list(pool.map(ask_twice, range(50)))
    for picture, questions, answers in done:
        assert answers == talker.answers([([talker.ask(text, 1)], [picture]) for text in questions])
    assert len({answers[0] for _, _, answers in done}) > 5, "always the same: nothing was tested"


def test_who_listens_slowly_holds_up_nobody():
    """The model goes on while an answer is still being read; one that is not read is closed."""
    line, closed = serve.Line(), []

    def says(text):
        try:
            yield from text
        finally:
            closed.append(text)

    async def clients():
        slow = line.run(says("slow"))
        heard = [await anext(slow)]
        quick = [piece async for piece in line.run(says("quick")) if isinstance(piece, str)]
        heard += [piece async for piece in slow]
        gone = line.run(says(itertools.repeat("on ")))
        await anext(gone)
        await gone.aclose()
        await asyncio.sleep(0.1)
        return "".join(heard), "".join(quick)
    assert asyncio.run(asyncio.wait_for(clients(), 60)) == ("slow", "quick")
    assert not line.tickets and len(closed) == 3


def test_moderation_sees_question_and_answer_and_nothing_passes_it_unseen(endless, tmp_path):
    """App. A's filter: what is flagged is neither answered nor shown, not even its first words."""
    seen, flags, broken = [], set(), []

    class Judge(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body["input"]))
            flagged = any(flag in body["input"] for flag in flags)
            result = {"flagged": flagged, "categories": {"violence": flagged, "hate": False}}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(broken[0] if broken else json.dumps({"results": [result]}).encode())

    judge = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=judge.serve_forever, daemon=True).start()
    flags_of_server = ("--moderation", f"http://127.0.0.1:{judge.server_port}/v1",
                       "--max_new_tokens", 20)
    with server(tmp_path / "m", endless, *flags_of_server) as url:
        body = {"messages": [user("Say it.")]}
        answer = post(url, body).json()["choices"][0]["message"]["content"]
        assert answer.startswith("abc abc")
        assert seen == [("/v1/moderations", "Say it."), ("/v1/moderations", answer)]
        assert f'"content": "{answer}"' in post(url, body | {"stream": True}).text
        flags.add("Say")
        reply = post(url, body | {"stream": True})
        assert reply.status_code == 400 and reply.json()["error"]["code"] == "content_filter"
        assert "the question was flagged by moderation (violence)" in reply.text
        flags.clear()
        flags.add("bc")
        for stream in (False, True):
            reply = post(url, body | {"stream": stream})
            shown = re.sub('"chatcmpl-[0-9a-f]+"', "", reply.text)   # may hold these letters
            assert "the answer was flagged by moderation (violence)" in shown
            assert "abc" not in shown and "[DONE]" not in shown
        flags.clear()
        for broken[:] in ([b"no"], [b"{}"], [b'{"results": []}'], [b'{"results": [{}]}']):
            reply = post(url, body)
            assert reply.status_code == 502 and "could not be moderated" in reply.text, broken
        judge.shutdown()
        judge.server_close()
        assert post(url, body).status_code == 502, "without a judge the text passes unseen"


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
    opened = []

    def open_tab(url, **how):
        page = browser.new_page(**how)
        page.set_default_timeout(20_000)
        asked, failed = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(error))
        page.goto(url)
        wait_until(lambda: page.evaluate("settings.model"))
        opened.append((page, url, asked, failed))
        return page
    yield open_tab
    for page, url, asked, failed in opened:
        assert not failed, f"a script of the page failed: {failed}"
        assert asked and all(address.startswith((url, "data:")) for address in asked), asked
        if not page.is_closed():
            page.close()


def ask_page(page, question):
    """Type a question, press Enter, and wait for the answer's end; the answer."""
    page.fill("#text", question)
    page.press("#text", "Enter")
    page.wait_for_selector("button:text('Regenerate')")
    return page.evaluate("turns.at(-1).box.querySelector('.answer p').textContent")


@pytest.mark.slow
def test_the_page_has_a_conversation_about_a_picture(url, talker, pictures, chats, tab):
    """Ask, go on, regenerate, see prompt and attention, edit: always what the model says to it."""
    page = tab(url)
    page.set_input_files("#file", chats / "images" / "5_0.png")
    page.wait_for_selector("#new img")
    image = pictures[1:]
    turns = [talker.ask(QUESTION, 1)]
    first, = talker.answers([(turns, image)])
    assert ask_page(page, QUESTION) == first and page.locator(".question img").count() == 1
    turns += [{"from": "gpt", "value": first}, talker.ask("And then?")]
    second, = talker.answers([(turns, image)])
    assert ask_page(page, "And then?") == second, "the second turn does not know the first"
    page.click("button:text('Regenerate')")
    page.wait_for_selector("button:text('Regenerate')")
    assert page.locator(".answer p").all_text_contents()[1] == second
    page.locator("button:text('Prompt')").last.click()
    page.wait_for_selector(".more pre")
    ids = talker.prompt(turns, image)["input_ids"]
    assert page.locator(".more pre").all_text_contents()[1] == " ".join(map(str, ids))
    page.locator("button:text('Where it looked')").first.click()
    page.wait_for_selector(".more img")
    assert page.locator(".more button").first.get_attribute("aria-pressed") == "true"
    page.click("button:text('Edit')")
    assert page.input_value("#text") == "And then?" and page.locator(".turn").count() == 1
    turns[-1] = talker.ask("And now?")
    assert ask_page(page, "And now?") == talker.answers([(turns, image)])[0]
    page.click("summary:text('Sampling')")
    page.fill("#max_tokens", "2")
    assert len(ask_page(page, "More?")) <= 2, "the fields do not reach the model"
    assert "cut off" in page.inner_text("#status"), "a cut answer looks like a complete one"


@pytest.mark.slow
def test_the_page_shows_the_queue_and_stops_answers_on_the_server(slow, tab):
    """Who waits is told how many are before them; Stop, Escape and a closed tab end an answer."""
    page = tab(slow)
    first, lines = stream_of(slow)
    next(lines)
    page.fill("#text", "Say it.")
    page.press("#text", "Enter")
    page.wait_for_selector("text=In the queue: 1 before you")
    first.close()
    for stop in (lambda: page.click("#stop"), lambda: page.press("#text", "Escape"), page.close):
        wait_until(lambda: page.evaluate("turns.at(-1)?.answer.startsWith('abc abc')"))
        stop()
        still_answers(slow)
        if not page.is_closed():
            page.wait_for_selector("text=Stopped")
            page.fill("#text", "Say it.")
            page.press("#text", "Enter")


@pytest.mark.slow
def test_the_page_says_what_is_wrong_and_goes_on(url, tab, tmp_path):
    """A broken file, no picture, an empty question, a server that is gone: each is said."""
    (tmp_path / "torn.png").write_bytes(png_of(Image.new("RGB", (50, 50)))[:60])
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
    assert ask_page(page, QUESTION) and page.locator(".turn .error").count() == 1
    page.context.set_offline(True)
    ask_page(page, QUESTION)
    assert "cannot be reached" in page.locator(".turn .error").last.inner_text()


@pytest.mark.slow
@pytest.mark.parametrize("how", [
    {"viewport": {"width": 360, "height": 640}, "has_touch": True, "color_scheme": "dark"},
    {"viewport": {"width": 1200, "height": 800}, "color_scheme": "light"}])
def test_the_page_fits_a_phone_and_a_keyboard(how, url, tab):
    """Nothing is wider than the screen, and everything has a name and can be reached by Tab."""
    page = tab(url, **how)
    assert page.evaluate("document.activeElement.id") == "text", "one cannot type at once"
    reached = set()
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(
            "document.activeElement.id || document.activeElement.textContent"))
    assert reached >= {"fresh", "text", "file", "Sampling", "send"}, reached
    page.focus("#text")
    page.keyboard.type("x" * 300)
    page.keyboard.press("Enter")
    page.wait_for_selector("button:text('Regenerate')")
    page.click("summary:text('Sampling')")
    for side, window in (("scrollWidth", "innerWidth"), ("scrollHeight", "innerHeight")):
        assert page.evaluate(f"document.documentElement.{side} <= {window}"), side
    unnamed = page.evaluate("""[...document.querySelectorAll("button, input, textarea")].filter(
        e => !(e.textContent.trim() || e.ariaLabel || e.labels?.[0]?.textContent.trim())).length""")
    assert unnamed == 0, "what has no name, no screen reader can read"


# -----------------------------------------------------------------------------
# The command


def test_what_stops_the_server_from_starting_is_a_plain_error(checkpoint, url):
    """A missing library, a port in use: what is wrong and what to do, no traceback."""
    code = "import sys; sys.modules['starlette'] = None; import extras.serve"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "pip install starlette uvicorn" in run.stderr
    assert "Traceback" not in run.stderr
    with pytest.raises(ValueError, match="take another port"):
        serve.main(["--model", str(checkpoint), "--port", url.rpartition(":")[2]])
