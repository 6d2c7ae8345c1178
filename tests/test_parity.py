"""Holding a server against its checkpoint: our own, and transformers'."""
import json
import os
import socket
import subprocess
import sys
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
        assert capsys.readouterr().out.count("the same") == 2
        written["samples"][1]["answer"] = "another"
        path.write_text(json.dumps(written))
        with pytest.raises(ValueError, match="1 of 2 answers of .* differ"):
            parity.main(check)
        path.write_text("{")
        with pytest.raises(ValueError, match="parity.json"):
            parity.main(check)
        path.unlink()
        with pytest.raises(FileNotFoundError, match="extras.parity write makes it"):
            parity.main(check)


@pytest.mark.slow
def test_transformers_serve_gives_the_same_answers(served, capsys):
    """The same greedy answers, and as many prompt tokens."""
    pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(served), "--port", str(port), "--device", "cpu"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.5)
        capsys.readouterr()
        parity.main(["check", "--model", str(served), "--base_url", f"http://127.0.0.1:{port}/v1"])
    finally:
        process.kill()
    for line in capsys.readouterr().out.splitlines():
        tokens, expected = line.split(": ")[1].split("; ")[0].split(" prompt tokens, here ")
        assert tokens == expected and "the same" in line, line
