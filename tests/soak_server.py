"""
The server among fifty clients, of whom twenty mean no good.

    python tests/soak_server.py 180        for so many seconds, with a tiny model of its own

Each client has an address of its own (127.0.0.2 and so on: Linux), so the limits are the server's
own. Thirty ask, each about a picture of its own, and compare with the answer that they get alone.
"""
import base64
import json
import random
import re
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import numpy as np
from conftest import ROOT, tiny_llava
from PIL import Image
from test_sample import save_checkpoint

import sample
from parts.pictures import data_url

N_GOOD, N_BAD = 30, 20
COUNTS = Counter()       # what became of all that was sent
PATH = "/v1/chat/completions"


def body_of(text, *addresses, **more):
    parts = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return {"messages": [message], "temperature": 0, "max_tokens": 12} | more


class Client:
    """One address, and what it does again and again."""

    def __init__(self, port, number):
        self.port = port
        self.number = number
        self.random = random.Random(number)
        self.source = (f"127.0.0.{2 + number}", 0)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        self.picture = Image.fromarray(pixels)
        self.body = body_of(f"What is {number}?", data_url(self.picture))

    def send(self, data, path=PATH, **headers):
        """(status, what was answered) of one request, which is counted."""
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        connection = HTTPConnection("127.0.0.1", self.port, 60, source_address=self.source)
        try:
            connection.request("POST", path, data, {"Content-Type": "application/json"} | headers)
            reply = connection.getresponse()
            COUNTS[f"status {reply.status}"] += 1
            return reply.status, reply.read().decode()
        finally:
            connection.close()

    def send_raw(self, *pieces, pause=1):
        """Send pieces with pauses between them; count the status that comes back, if one does."""
        with socket.create_connection(("127.0.0.1", self.port), 60, self.source) as raw:
            for piece in pieces:
                raw.sendall(piece)
                time.sleep(pause)
                if select.select([raw], [], [], 0)[0]:
                    break
            status = re.match(rb"HTTP/1.1 (\d+)", raw.recv(100))
            COUNTS[f"status {status[1].decode()}" if status else "connections cut off"] += 1

    def ask(self, expected):
        """A good client, with or without a stream."""
        stream = self.random.random() < 0.5
        status, text = self.send(self.body | {"stream": stream})
        if status != 200:
            COUNTS["good clients refused"] += 1
            return
        if stream:
            events = re.findall("data: ({.*})", text)
            deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
            answer = "".join(delta.get("content", "") for delta in deltas)
        else:
            answer = json.loads(text)["choices"][0]["message"]["content"]
        COUNTS["answers"] += 1
        COUNTS["mixed-up answers"] += answer != expected


def head(length, host="127.0.0.1"):
    return (f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {length}\r\n\r\n").encode()


def drip_body(client):
    client.send_raw(head(1000), *[b" "] * 30)


def half_heads(client):
    """A hundred connections with heads that never end."""
    raws = [socket.create_connection(("127.0.0.1", client.port), 60, client.source)
            for _ in range(100)]
    for _ in range(15):
        for raw in raws:
            with suppress(OSError):
                raw.sendall(b"GET / HTTP/1.1\r\nX: ")
        time.sleep(1)
    for raw in raws:
        with suppress(OSError):
            COUNTS["connections cut off"] += raw.recv(10) == b""
        raw.close()


def send_garbage(client):
    client.send_raw(client.random.randbytes(2000) + b"\r\n\r\n", pause=0.1)


def huge_stop(client):
    client.send(client.body | {"stop": "a" * 10 ** 6})
    client.send(client.body | {"stop": ["ab" * 128] * 16})


def huge_pictures(client):
    client.send(body_of("Why?", *[SQUARE] * 16))
    client.send(body_of("Why?", SQUARE))         # which is just below the limit
    time.sleep(5)


def foreign_host(client):
    client.send(client.body, Host="evil.example")


def mutate(client):
    """A good request in which some bytes were changed, cut out or doubled."""
    data = json.dumps(client.body | {"stop": ["x"], "seed": 1, "top_p": 1}).encode()
    for _ in range(client.random.randint(1, 5)):
        at = client.random.randrange(len(data))
        to = at + client.random.randrange(20)
        middle = client.random.choice([b"", data[at:to] * 2, client.random.randbytes(2), b"null"])
        data = data[:at] + middle + data[to:]
    client.send(data, path=client.random.choice([PATH, "/prompt", "/attention"]))


def break_picture(client):
    file = bytearray(base64.b64decode(client.body["messages"][0]["content"][0]["image_url"]["url"]
                                      .partition(",")[2]))
    for _ in range(5):
        file[client.random.randrange(len(file))] = client.random.randrange(256)
    client.send(body_of("Why?", "data:;base64," + base64.b64encode(file).decode()))


def nest(client):
    deep = "[" * 900 + "]" * 900
    for text in (deep, f'{{"messages": {deep}}}', f'{{"temperature": {deep}}}', "[" * 10 ** 6):
        client.send(text.encode())


def hang_up(client):
    data = json.dumps(client.body | {"stream": True, "max_tokens": 400}).encode()
    client.send_raw(head(len(data)) + data, pause=client.random.random() / 10)


def send_too_much(client):
    client.send(b" " * 3 * 10 ** 7)
    client.send(b" " * 10 ** 8)          # of which not all is heard


def take_nothing(client):
    """Ask for the page without end, and read none of it."""
    client.send_raw(*[b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 1000] * 10 ** 6, pause=0)


def crowd(client):
    threads = [threading.Thread(target=one_try, args=(client.send, client.body))
               for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(5)


BAD = [drip_body, half_heads, send_garbage, huge_stop, huge_pictures, foreign_host, mutate,
       break_picture, nest, hang_up, send_too_much, crowd, take_nothing]


def one_try(action, *args):
    try:
        action(*args)
    except (OSError, HTTPException):     # the server hung up, as it may on a bad client
        COUNTS["connections cut off"] += 1


def go_on(seconds, action, *args):
    end = time.time() + seconds
    while time.time() < end:
        one_try(action, *args)
        time.sleep(0.05)


def memory(process, line):
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(rf"{line}:\s*(\d+) kB", text)[1]) // 1000


def main(seconds):
    folder = Path(tempfile.mkdtemp())
    model = save_checkpoint(tiny_llava(), folder / "tiny")
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "extras.serve", "--model", model, "--port", "0"],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    while not (found := re.search(r"http://\S+:(\d+)", (folder / "output").read_text())):
        time.sleep(0.1)
    clients = [Client(int(found[1]), number) for number in range(N_GOOD + N_BAD)]
    talker = sample.Talker(sample.Config(str(model), temperature=0, max_new_tokens=12))
    tasks = []
    for client in clients[:N_GOOD]:
        turns = [sample.human_turn(f"What is {client.number}?", 1)]
        expected, = talker.answers([(turns, [client.picture])])
        client.ask(expected)             # so that memory is compared with a server at work
        tasks.append((client.ask, expected))
    tasks += [(BAD[i % len(BAD)], client) for i, client in enumerate(clients[N_GOOD:])]
    COUNTS.clear()
    COUNTS.update({"good clients refused": 0, "mixed-up answers": 0, "status 500": 0})
    before = memory(process, "VmRSS")
    threads = [threading.Thread(target=go_on, args=(seconds, *task)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, count in sorted(COUNTS.items()):
        print(f"{count:>8}  {name}")
    print(f"memory {before} MB at the start, {memory(process, 'VmRSS')} at the end, "
          f"{memory(process, 'VmHWM')} at most")
    print(f"the server's output: {(folder / 'output').read_text()!r}")
    process.terminate()
    process.wait()
    signs = ("status 5", "mixed", "good clients refused")
    failed = [name for name in COUNTS if name.startswith(signs) and COUNTS[name]]
    sys.exit(", ".join(failed) or None)


if __name__ == "__main__":
    SQUARE = data_url(Image.new("RGB", (7000, 7000)))
    main(float(sys.argv[1]))
