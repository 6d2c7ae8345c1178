"""A soak of generate_data.py: thousands of requests to a server that lies, killed again and again.

    python tests/soak_generate.py --requests 2000 --kills 17

It takes minutes, so it is no test of the suite. The server is tests/chat_server.py: three of ten
replies are an error, a lost connection, torn, foreign, empty, or drip until the deadline. SIGKILL
meets the generating process at a random moment, and each time the same command starts again. Then
every request must have its own reply, once, and the records must be those of an undisturbed run.
"""
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from parts.files import run_main, typed_flags, write_lines  # noqa: E402

LIES = {"429": 0.02, "500": 0.06, "503": 0.04, "reset": 0.05, "half": 0.04, "garbage": 0.05,
        "empty": 0.02, "drip": 0.01, "drip_header": 0.01}


@dataclass(frozen=True)
class Config:
    requests: int = 2000       # pictures, each with one request
    kills: int = 17            # SIGKILLs of the generating process
    workers: int = 16          # requests at a time
    seed: int = 0              # of the lies and of the moments of the kills


def start_server(log, **settings):
    """A server with some faults; returns (process, address)."""
    command = [sys.executable, ROOT / "tests" / "chat_server.py",
               json.dumps({"log": str(log), "seconds": 0.05, **settings})]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return server, f"http://127.0.0.1:{int(server.stdout.readline())}/v1"


def start_run(folder, name, url, config):
    """The generating process; what it prints is appended to NAME.txt."""
    command = [sys.executable, ROOT / "generate_data.py", "instruct", "--captions",
               folder / "captions.jsonl", "--out", folder / name, "--base_url", url,
               "--mix", "conversation=1", "--workers", config.workers, "--timeout", 3,
               "--attempts", 30]
    with open(folder / f"{name}.txt", "a") as output:
        return subprocess.Popen(list(map(str, command)), stdout=output, stderr=output)


def count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(process, raw, target):
    """SIGKILL once there are so many replies; returns whether it met the process alive."""
    while process.poll() is None and count_lines(raw) < target:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def soak(folder, config):
    """Run, kill, go on; then compare with a run that nothing disturbs. Returns the figures."""
    rows = [{"id": f"p{i}", "image": f"p{i}.jpg", "captions": [f"number {i}"]}
            for i in range(config.requests)]
    write_lines(folder / "captions.jsonl", rows)
    server, url = start_server(folder / "asked.jsonl", faults=LIES, seed=config.seed)
    raw = folder / "soaked" / "raw.jsonl"
    start = time.monotonic()
    rng = random.Random(config.seed)
    targets = sorted(rng.sample(range(1, config.requests * 9 // 10), config.kills))
    kills = 0
    for target in targets:
        kills += kill_after(start_run(folder, "soaked", url, config), raw, target)
    assert kills == config.kills, f"{config.kills - kills} runs ended before their kill"
    status = start_run(folder, "soaked", url, config).wait()
    seconds = time.monotonic() - start
    server.kill()
    assert status == 0, (folder / "soaked.txt").read_text()[-2000:]
    server, url = start_server(folder / "honest.jsonl")
    status = start_run(folder, "honest", url, config).wait()
    server.kill()
    assert status == 0, (folder / "honest.txt").read_text()[-2000:]
    return {"kills": kills, "seconds": round(seconds), **check(folder, config)}


def check(folder, config):
    """The figures of a soak, if nothing is lost, doubled or mixed up."""
    replies = [json.loads(line) for line in open(folder / "soaked" / "raw.jsonl")]
    ids = Counter(row["id"] for row in replies)
    assert len(ids) == config.requests, f"{config.requests - len(ids)} replies are lost"
    assert max(ids.values()) == 1, f"doubled: {ids.most_common(3)}"
    for row in replies:
        text = row["reply"]["choices"][0]["message"]["content"]
        number = row["id"].removeprefix("p").removesuffix("-conversation")
        assert text.endswith(f"It is about number {number}."), f"{row['id']} has another's reply"
    soaked, honest = ((folder / name / "instruct.json").read_bytes()
                      for name in ("soaked", "honest"))
    assert soaked == honest, "the records differ from those of an undisturbed run"
    asked = Counter(json.loads(line)["fault"] for line in open(folder / "asked.jsonl"))
    sent = sum(asked.values())
    again = asked["good"] - config.requests
    assert again <= config.kills * config.workers, "more is asked again than what a kill cut off"
    return {"requests": config.requests, "sent": sent, "lies": sent - asked["good"],
            "kept": len(replies), "under way at a kill, asked again": again}


def main(argv=None):
    config = Config(**typed_flags(Config, argv, __doc__))
    with tempfile.TemporaryDirectory() as folder:
        for what, n in soak(Path(folder), config).items():
            print(f"{what:<40}{n:>9,}")
        print("none lost, none doubled, none mixed; the records equal those of an undisturbed run")


if __name__ == "__main__":
    run_main(main)
