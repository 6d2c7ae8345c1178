"""Holding a server against its checkpoint: our own, and transformers'."""
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from conftest import tiny_llava
from test_sample import save_checkpoint
from test_serve import server

from extras import parity


@pytest.fixture
def served(chats, tmp_path):
    """A checkpoint with its parity.json. Its template's STOP is the end of sequence."""
    folder = save_checkpoint(tiny_llava(), tmp_path / "served", "vicuna_v1")
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(
        json.dumps({"question_id": n, "text": text, "image": "0_0.tiff"}) + "\n"
        for n, text in enumerate(["Who?", "What is 0.0?", "Not asked"])))
    parity.main(["write", "--model", str(folder), "--questions", str(questions), "--images",
                 str(chats / "images"), "--count", "2", "--max_new_tokens", "12"])
    return folder


def test_our_server_gives_the_answers_of_the_folder_and_another_answer_is_an_error(
        served, tmp_path, capsys):
    """`write`, then `check`: the same answers, or an error that says how many differ."""
    path = served / "parity.json"
    written = json.loads(path.read_text())
    assert len(written["samples"]) == 2
    assert all(len(one["ids"]) > 10 and one["answer"] for one in written["samples"])
    with server(tmp_path / "server", served) as url:
        check = ["check", "--model", str(served), "--base_url", url + "/v1"]
        parity.main(check)
        assert "the same: with pictures 2 of 2" in capsys.readouterr().out
        with pytest.raises(ValueError, match="return_token_ids"):        # which ours does not tell
            parity.main([*check, "--ids"])
        for change in ({"answer": "another"}, {"ids": written["samples"][1]["ids"][1:]}):
            changed = [written["samples"][0], written["samples"][1] | change]
            path.write_text(json.dumps(written | {"samples": changed}))
            with pytest.raises(ValueError, match="with pictures 1 of 2.*<s>, left out or written"):
                parity.main(check)


class Pinned(http.server.BaseHTTPRequestHandler):
    """A server that lists nothing, and takes one model by one name: `transformers serve`."""
    name = None
    reply = None

    def do_GET(self):
        self.send_error(500)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["model"] != self.name:
            self.send_error(400, f"pinned to {self.name}")
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(self.reply).encode())

    def log_message(self, *words):
        pass


def test_a_server_is_asked_by_the_path_as_it_was_typed_and_held_to_its_ids(
        served, monkeypatch, capsys):
    """`transformers serve out/stage2` wants "out/stage2"; vLLM tells the ids of a prompt, which can
    be others where their number and the answer are the same."""
    path = served / "parity.json"
    written = json.loads(path.read_text())
    expected = written["samples"][0]
    path.write_text(json.dumps(written | {"samples": [expected]}))
    Pinned.reply = {"choices": [{"message": {"content": expected["answer"]}}], "usage": None,
                    "prompt_token_ids": expected["ids"]}
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pinned)
    threading.Thread(target=httpd.serve_forever).start()
    monkeypatch.chdir(served.parent)
    check = ["check", "--ids", "--model", served.name, "--base_url",
             f"http://127.0.0.1:{httpd.server_port}/v1"]
    try:
        for name in (served.name, str(served)):
            Pinned.name = name
            parity.main(check)
        Pinned.reply = Pinned.reply | {"prompt_token_ids": [*expected["ids"][:-1], 7]}
        with pytest.raises(ValueError, match="0 of 1"):
            parity.main(check)
        assert f"ids [7] from token {len(expected['ids']) - 1} on" in capsys.readouterr().out
        Pinned.name = "another"
        with pytest.raises(ValueError, match="pinned to another"):
            parity.main(check)
    finally:
        httpd.shutdown()
        httpd.server_close()


@pytest.mark.slow
def test_transformers_serve_gives_the_same_answers(served, monkeypatch, capsys):
    """The same greedy answers, and as many prompt tokens, by a relative path."""
    pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    monkeypatch.chdir(served.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", "./served", "--port", str(port), "--device", "cpu"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.5)
        capsys.readouterr()
        url = f"http://127.0.0.1:{port}/v1"
        parity.main(["check", "--model", "./served", "--base_url", url])
    finally:
        process.kill()
    assert "the same: with pictures 2 of 2" in capsys.readouterr().out
