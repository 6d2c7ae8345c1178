"""An OpenAI-compatible endpoint that misbehaves, as a process of its own.

    python chat_server.py '{"seconds": 1, "faults": {"429": 0.1}, "log": "asked.jsonl"}'

It prints its port. A good reply comes after `seconds`; each fault comes with its probability. Every
reply is `reply`, [status, JSON or text, how often], if set, and has the fields of `header`. Every
request goes to the log, with what became of it. The answer quotes the last line of the request, so
that a test can tell whose it is; or it is the one that `says` has for a text that the request's
last message contains.
"""
import http.server
import json
import random
import socket
import struct
import sys
import threading
import time

SETTINGS = {"seconds": 0.0, "faults": {}, "log": None, "key": None, "text": None, "says": {},
            "finish": "stop", "seed": 0, "reply": None, "header": {}}
SETTINGS |= json.loads(sys.argv[1])
FAULTS = SETTINGS["faults"]
TEXTS = {"empty": " ", "refuses": "I'm sorry, I cannot help with that."}
RNG = random.Random(SETTINGS["seed"])
LOCK = threading.Lock()
LOG = open(SETTINGS["log"], "a", buffering=1) if SETTINGS["log"] else None


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        last_message = asked["messages"][-1]["content"]
        last = last_message.splitlines()[-1]
        with LOCK:
            chances = [*FAULTS.values(), 1 - sum(FAULTS.values())]
            fault = RNG.choices([*FAULTS, "good"], chances)[0]
            if LOG:
                row = {"last": last, "fault": fault, "time": time.time(), "body": asked}
                LOG.write(json.dumps(row) + "\n")
        sent = self.headers.get("Authorization")
        if SETTINGS["key"] and sent != f"Bearer {SETTINGS['key']}":
            fault = "401"
        if SETTINGS["reply"]:
            code, value, *times = SETTINGS["reply"]
            text = value if isinstance(value, str) else json.dumps(value)
            return self.reply(code, text * (times or [1])[0])
        if fault in ("drip", "drip_header"):
            return self.drip(fault)
        if fault == "reset":
            return self.reset()
        if fault == "hang":
            time.sleep(30)
        if fault.isdigit():
            error = json.dumps({"error": {"message": f"{fault} it is; you sent {sent}"}})
            return self.reply(int(fault), error, {"Retry-After": "1"} if fault == "429" else {})
        time.sleep(SETTINGS["seconds"])
        if fault == "garbage":
            return self.reply(200, "<html>we will be back soon</html>")
        text = TEXTS.get(fault) or self.answer(last_message, last)
        completion = json.dumps({
            "model": asked["model"],
            "choices": [{"message": {"role": "assistant", "content": text},
                         "finish_reason": SETTINGS["finish"]}],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 100}})
        if fault == "half":
            return self.half(completion)
        return self.reply(200, completion)

    def answer(self, last_message, last):
        for part, text in SETTINGS["says"].items():
            if part in last_message:
                return text
        return SETTINGS["text"] or (f"Question:\nWhat does it say about {last}?\n===\n"
                                    f"Answer:\nIt is about {last}.")

    def reset(self):
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True

    def half(self, text):
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text[:len(text) // 2].encode())
        self.close_connection = True

    def drip(self, fault):
        """A byte every 50 ms, within any time between bytes, and never an end."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"X: " if "header" in fault else b"\r\n"))
        while True:
            self.wfile.write(b"x")
            time.sleep(0.05)

    def reply(self, code, text, headers=()):
        self.send_response(code)
        for name, value in {**dict(headers), **SETTINGS["header"]}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass                             # a client that was killed


server = Server(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
