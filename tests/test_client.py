"""One endpoint, asked many times: nothing that is paid is lost, nothing is paid twice."""
import json
import os
import signal
from collections import Counter

import pytest
import soak_generate
from conftest import lines, run_script, start_script, wait_until

import generate_data
from parts import client
from parts.files import write_lines
from parts.replies import content_of, unfinished


class Asker(client.Endpoint):
    """An endpoint with the name of a model, as every command has it."""
    model = "m"


def make_requests(n):
    """n requests whose last message is their id, which the test's server quotes."""
    return [client.Request(f"r{i}", "test", {"model": "m", "messages": client.chat_messages(
        "system", [("q", "a")], f"r{i}")}) for i in range(n)]


def instruct_command(tmp_path, url, n, *flags):
    """The command line of a real run about n pictures."""
    rows = [{"id": f"p{i}", "image": f"p{i}.jpg", "captions": [f"number {i}"]} for i in range(n)]
    write_lines(tmp_path / "c.jsonl", rows)
    return ["generate_data.py", "instruct", "--captions", tmp_path / "c.jsonl", "--out",
            tmp_path / "out", "--base_url", url, "--mix", "conversation=1", *flags]


# --------------------------------------------------------------------------------------------------
# One request


@pytest.mark.parametrize("fault, reason", [
    ("429", "HTTP 429"), ("500", "HTTP 500"), ("reset", "Connection reset by peer"),
    ("half", "^connection lost$"), ("garbage", "not a chat completion"), ("empty", "empty answer"),
    ("hang", "timeout"), ("drip", "timeout"), ("drip_header", "timeout")])
def test_what_may_pass_is_told_apart(serve, fault, reason):
    """A busy server, a torn or foreign reply and silence are tried again; each has its name.

    Bytes that drip are no reply: the deadline is one for the whole of it, headers and body.
    """
    url, _ = serve(faults={fault: 1.0})
    with pytest.raises(client.TryAgain, match=reason) as raised:
        client.ask(url, make_requests(1)[0].body, timeout=0.5)
    assert raised.value.after == (1.0 if fault == "429" else None), "Retry-After is not heeded"


@pytest.mark.parametrize("code", ["400", "401", "403", "404"])
def test_what_will_not_pass_is_an_error_with_the_servers_words_without_the_key(
        serve, code, monkeypatch):
    """A wrong key or model is told at once, and no message shows the key."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1234")
    url, _ = serve(faults={code: 1.0})
    with pytest.raises(ValueError, match=f"HTTP {code}.*{code} it is") as raised:
        client.ask(url, make_requests(1)[0].body)
    assert "secret" not in str(raised.value)


def test_a_dead_or_mistyped_endpoint_is_named():
    """Nobody should have to guess which of two machines does not answer."""
    with pytest.raises(client.TryAgain, match="127.0.0.1.*port=9.*Connection refused"):
        client.ask("http://127.0.0.1:9/v1", make_requests(1)[0].body)
    with pytest.raises(ValueError, match="nonsense"):
        client.ask("nonsense", make_requests(1)[0].body)


def test_a_request_is_found_again_by_its_id_and_body():
    """The key finds replies that were paid with earlier versions; it changes with what is sent."""
    request = client.Request("7", "k", {"model": "m", "messages": []})
    assert request.key == "ee825938e071d735035811f9b51c0308", "paid replies are not found any more"
    assert request.key != request._replace(body={"model": "n", "messages": []}).key
    assert request.key == request._replace(kind="other").key


def test_extra_fields_join_the_request_and_null_removes_one():
    """Endpoints differ in what they take: --extra is for their other fields."""
    endpoint = Asker(extra='{"seed": 0, "temperature": null}')
    body = client.request_body(endpoint, [])
    assert body == {"model": "m", "messages": [], "max_tokens": 1024, "seed": 0}
    for extra in ("[1]", "{"):
        with pytest.raises(ValueError, match="--extra: "):
            Asker(extra=extra)


THOUGHT = "<think>\nQuestion: maybe ask the colour?\nAnswer: brown.\n</think>\n\nA bus."


@pytest.mark.parametrize("content, text", [
    (THOUGHT, "A bus."), (THOUGHT.removeprefix("<think>"), "A bus."), ("<think>and so on", ""),
    ("A <think>b</think>bus.", "A bus."), ("[THINK]x[/THINK]A bus.", "A bus."),
    ("<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>A bus.",
     "A bus."),
    ("```json\nA bus.\n```", "A bus."), ("A bus.<|im_end|>\n</s>", "A bus."),
    ("A bus.<｜end▁of▁sentence｜>", "A bus."), ("A bus.<end_of_turn>\n", "A bus."),
    ("8 9\n[Reasoning] <b>x</b> > y", "8 9\n[Reasoning] <b>x</b> > y"), (None, ""),
    ([{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "A "},
      {"type": "text", "text": "bus."}], "A bus.")])
def test_what_a_model_thinks_aloud_and_how_chats_end_is_no_answer(content, text):
    """Of a teacher and a judge alike; a reply's parts are joined, other fields of it ignored."""
    message = {"content": content, "reasoning_content": "x", "reasoning": "x"}
    assert content_of({"choices": [{"message": message}]}) == text


def completion(content="A bus.", finish="stop", **fields):
    return {"choices": [{"message": {"content": content, **fields}, "finish_reason": finish}]}


@pytest.mark.parametrize("reply, finish, text", [
    ([200, completion([{"type": "text", "text": "A "}, {"type": "text", "text": "bus."}])], "stop",
     "A bus."),
    ([200, completion(None, refusal="No, thank you.")], "refusal", ""),
    ([200, completion(None, "max_tokens")], "max_tokens", ""),
    ([200, {**completion(), "error": None}], "stop", "A bus."),
    ([200, json.dumps(completion(seed=7)).replace("7", "9" * 5000)], "stop", "A bus."),
    ([400, {"error": {"code": "content_filter", "message": "no"}}], "content_filter", "")])
def test_what_is_paid_returns_even_if_it_is_no_answer(serve, reply, finish, text):
    """And what it is, is told by its finish_reason."""
    url, _ = serve(reply=reply)
    found = client.ask(url, make_requests(1)[0].body)
    assert found["choices"][0]["finish_reason"] == finish and content_of(found) == text
    assert unfinished(found) == (None if finish == "stop" else finish)


@pytest.mark.parametrize("reply, says, asked", [
    ([200, {"error": {"message": "no such model"}}], "HTTP 200: no such model", 1),
    ([200, {"error": {"code": 502, "message": "the provider is away"}}], "provider is away", 2),
    ([200, {"error": "the server is overloaded, try again"}], "is overloaded", 2),
    ([307, ""], "HTTP 307: http://elsewhere/v1", 1),
    ([400, {"error": {"message": "'content_filter' is no field of ours"}}], "no field of ours", 1),
    ([429, {"error": {"code": "insufficient_quota", "message": "no credit"}}], "no credit", 1),
    ([200, "x", client.MOST_BYTES + 1], "a reply of more than 16,777,216 bytes", 2)])
def test_the_servers_words_are_shown_and_what_cannot_get_better_is_asked_once(
        serve, tmp_path, reply, says, asked):
    """An error behind a 200 is one, and prose that mentions a filter is no filter's verdict. What
    may get better is asked a bounded number of times."""
    url, log = serve(reply=reply, header={"Location": "http://elsewhere/v1"})
    with pytest.raises(ValueError, match=says):
        client.ask_everything(make_requests(1), tmp_path / "raw", Asker(base_url=url, attempts=2))
    assert len(lines(log)) == asked


@pytest.mark.parametrize("header, says", [
    ({"Retry-After": "86400"}, "a wait of 86400 seconds; --max_wait 600"),
    ({"Retry-After": "9" * 400}, "a wait of 1000000000 seconds"),
    ({"Retry-After": "Tue, 01 Jan 2999 00:00:00 GMT"}, "a wait of 1000000000 seconds"),
    ({"Retry-After": "9" * 5000}, "HTTP 503"), ({"Retry-After": "-inf"}, "HTTP 503"),
    ({"Retry-After": "Tue, 01 Jan 999999 00:00:00 GMT"}, "HTTP 503"),
    ({"Content-Length": "9" * 30}, "no reply yet")])
def test_a_server_that_asks_for_a_day_stops_the_run(serve, tmp_path, header, says):
    """It says so at once, rather than to hang; and no number in a header breaks the client."""
    url, log = serve(reply=[503, "busy"], header=header)
    endpoint = Asker(base_url=url, attempts=1, workers=1, timeout=1)
    with pytest.raises(ValueError, match=says):
        client.ask_everything(make_requests(1), tmp_path / "raw.jsonl", endpoint)
    assert len(lines(log)) == 1


@pytest.mark.parametrize("usage, model", [
    ("many", "m"), ({"prompt_tokens": "7"}, None), ({}, {"name": "m"})])
def test_odd_fields_beside_an_answer_are_told_and_left_out(serve, tmp_path, capsys, usage, model):
    """The answer is paid, and stays."""
    url, _ = serve(reply=[200, {**completion(), "usage": usage, "model": model}])
    request, = make_requests(1)
    reply = client.ask_everything([request], tmp_path / "raw.jsonl", Asker(base_url=url))[
        request.key]
    assert content_of(reply) == "A bus." and not reply["usage"] and reply["model"] in (None, "m")
    assert "is odd, and left out" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Many requests


def test_a_budget_holds(serve, tmp_path):
    """At most `rpm` requests a minute are sent, evenly spaced."""
    url, log = serve()
    endpoint = Asker(base_url=url, workers=8, rpm=1200)
    client.ask_everything(make_requests(9), tmp_path / "raw.jsonl", endpoint)
    times = sorted(row["time"] for row in lines(log))
    assert times[-1] - times[0] > 0.35, f"9 requests in {times[-1] - times[0]:.2f} s"


def test_a_permanent_error_stops_the_run_and_keeps_what_is_under_way(serve, tmp_path):
    """What was sent is paid: its reply is waited for, and the message says how many there are."""
    url, log = serve(seconds=0.3, faults={"404": 0.1}, seed=2)
    raw = tmp_path / "raw.jsonl"
    with pytest.raises(ValueError, match="HTTP 404") as raised:
        client.ask_missing(make_requests(100), raw, Asker(base_url=url, workers=8))
    asked = Counter(row["fault"] for row in lines(log))
    assert sum(asked.values()) < 100, "it went on after an error that will not pass"
    assert len(lines(raw)) == asked["good"] > 0, "a reply that was on its way is lost"
    assert f"{asked['good']} of 100 replies are kept in {raw}" in str(raised.value)


def test_a_torn_line_is_cut_or_told_and_its_request_asked_again(serve, tmp_path, capsys):
    """A kill tears the last line; a line in the middle is torn by what we do not know."""
    url, log = serve()
    raw = tmp_path / "raw.jsonl"
    requests = make_requests(4)
    client.ask_everything(requests, raw, Asker(base_url=url, workers=1))
    first, second, third, fourth = raw.read_bytes().splitlines(keepends=True)
    raw.write_bytes(first + second[:40] + b"\n" + third + fourth[:50])
    client.ask_everything(requests, raw, Asker(base_url=url))
    assert len(lines(log)) == 6
    told = capsys.readouterr().out
    assert "torn, or no reply" in told and "2 of them to these 4 requests; 2 are new" in told


KEY = 'sk-"secret-1234'


@pytest.mark.parametrize("echo", [KEY.replace('"', '\\"'), KEY.replace('"', "\\u0022")])
def test_the_key_is_sent_but_never_written(serve, tmp_path, monkeypatch, capfd, echo):
    """Not in a file, not on the screen; neither if a reply has it, however it is spelt in JSON."""
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    url, log = serve(key=KEY, faults={"500": 0.3})
    raw = tmp_path / "raw.jsonl"
    client.ask_everything(make_requests(12), raw, Asker(base_url=url, attempts=20))
    assert "good" in str(lines(log)), "the key was not sent"
    url, _ = serve(reply=[200, json.dumps(completion("KEY", system=KEY)).replace("KEY", echo)])
    client.ask_everything(make_requests(1), tmp_path / "echo.jsonl", Asker(base_url=url))
    assert "OPENAI_API_KEY" in (tmp_path / "echo.jsonl").read_text()
    url, _ = serve(reply=[400, "x" * (500 - len(KEY) // 2) + KEY])
    with pytest.raises(ValueError, match="xOPENAI") as raised:
        client.ask_everything(make_requests(1), tmp_path / "no.jsonl", Asker(base_url=url))
    files = "".join(path.read_text() for path in tmp_path.glob("*.jsonl") if "log" not in path.name)
    assert "secret" not in files + "".join(capfd.readouterr()) + str(raised.value), "half a key"


def test_a_word_that_stands_for_a_key_stays_in_answers(serve, monkeypatch):
    """Servers without keys are given one like it, and a word may be part of any answer."""
    monkeypatch.setenv("OPENAI_API_KEY", "anything")
    url, _ = serve(reply=[200, completion("Is anything red?")])
    assert content_of(client.ask(url, make_requests(1)[0].body)) == "Is anything red?"


@pytest.mark.parametrize("key", ["sk-SECRET\n123", "sk-SECRÉT"])
def test_a_key_that_no_header_holds_is_an_error_without_it(serve, monkeypatch, key):
    """And so is one in an address, which would be written into files and messages."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY: line breaks or letters") as raised:
        client.ask(serve()[0], make_requests(1)[0].body)
    assert "SECR" not in str(raised.value)
    for address in ("http://user:SECRET@localhost/v1", "http://localhost/v1?key=SECRET"):
        with pytest.raises(ValueError, match="--base_url: an address without") as raised:
            Asker(base_url=address)
        assert "SECR" not in str(raised.value)


# --------------------------------------------------------------------------------------------------
# Real processes


def test_ctrl_c_waits_for_what_is_under_way(serve, tmp_path):
    """It is paid; and what is kept is told, and written as records."""
    url, log = serve(seconds=1)
    process = start_script(tmp_path, *instruct_command(tmp_path, url, 30, "--workers", 4))
    wait_until(lambda: log.exists() and len(lines(log)) >= 5)    # one is kept, others under way
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    kept = len(lines(tmp_path / "out" / "raw.jsonl"))
    last = (tmp_path / "output").read_text().splitlines()[-1]
    assert process.exitcode == 1 and 4 < kept == len(lines(log)) < 30
    assert last.startswith("stopped") and f"{kept} of 30 replies are kept in" in last, last
    assert len(json.loads((tmp_path / "out" / "instruct.json").read_text())) == kept


def test_a_full_disk_leaves_no_torn_line_and_says_what_is_kept(serve, tmp_path):
    """The run goes on from there when there is room again."""
    url, _ = serve()
    command = instruct_command(tmp_path, url, 30, "--workers", 4)
    raw = tmp_path / "out" / "raw.jsonl"
    code, output = run_script(tmp_path, *command, file_size=4000)
    kept = len(lines(raw))
    assert code == 1 and 0 < kept < 30
    assert f"{kept} of 30 replies are kept in" in output.splitlines()[-1], output
    assert run_script(tmp_path, *command)[0] == 0
    assert len(lines(raw)) == 30


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path):
    """SIGKILL, again and again, and lies in between: none is lost, doubled or another's reply."""
    config = soak_generate.Config(requests=80, kills=3, workers=4)
    assert soak_generate.soak(tmp_path, config)["kept"] == 80


def test_two_processes_on_one_folder_are_refused(serve, tmp_path):
    """They would both ask for everything."""
    url, _ = serve(seconds=1.0)
    command = instruct_command(tmp_path, url, 2, "--workers", 1)
    process = start_script(tmp_path, *command)
    wait_until(lambda: (tmp_path / "out" / "raw.jsonl").exists())
    with pytest.raises(ValueError, match="another process is writing there"):
        generate_data.main([str(word) for word in command[1:]])
    process.join()
