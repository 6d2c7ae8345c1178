"""
Holding a server against its checkpoint: does it give the answers that the folder gives here?

    python -m extras.parity write --model out/stage2 --questions q.jsonl --images DIR
    python -m extras.parity check --model out/stage2 --base_url http://localhost:8000/v1

`write` puts questions with their pictures, prompts, ids and greedy answers beside the checkpoint,
in parity.json. `check` asks any server that speaks OpenAI's chat API the same.
"""
import os
from dataclasses import dataclass

import requests

import sample
from data import render
from extras.probe import data_url
from parts.files import read_value, run_command, run_main, write_json
from parts.pictures import image_path, load_image
from parts.questions import read_questions
from parts.records import image_names


@dataclass(frozen=True)
class ParityWriteConfig:
    model: str                           # checkpoint folder
    questions: str                       # JSON lines of question_id, image, text
    images: str = "."                    # folder of the questions' images
    count: int = 4                       # how many of them, from the first
    max_new_tokens: int = 64
    template: str = None                 # for a checkpoint that does not name its own


@dataclass(frozen=True)
class ParityCheckConfig:
    model: str                           # checkpoint folder with its parity.json
    base_url: str                        # the server's, http://HOST/v1


def write_parity(config):
    """Write questions and this checkpoint's greedy answers to MODEL/parity.json."""
    talker = sample.Talker(sample.Config(config.model, temperature=0.0, template=config.template,
                                         max_new_tokens=config.max_new_tokens))
    samples = []
    for question in read_questions(config.questions, config.images)[:config.count]:
        paths = [image_path(config.images, name) for name in image_names(question)]
        pictures = [load_image(path) for path in paths]
        turns = [sample.human_turn(question["text"], len(pictures))]
        samples.append({
            "question": question["text"],
            "images": [data_url(picture) for picture in pictures],
            "prompt": "".join(text for text, _ in render(turns, talker.template)),
            "ids": talker.prompt(turns, pictures)["input_ids"],
            "answer": talker.answers([(turns, pictures)])[0]})
    stop = {}
    if talker.template.STOP != talker.model.tokenizer.eos_token:     # which a server knows itself
        stop = {"stop": [talker.template.STOP]}
    path = os.path.join(config.model, "parity.json")
    write_json(path, {"max_new_tokens": config.max_new_tokens, "stop": stop, "samples": samples})
    print(f"{len(samples)} questions and answers in {path}")


def call_server(method, url, **body):
    """The JSON of a server's reply. Raises ValueError with what went wrong."""
    try:
        reply = requests.request(method, url, timeout=600, **body)
    except requests.RequestException as error:
        raise ValueError(f"{url}: {error}") from error
    if not reply.ok:
        raise ValueError(f"{url}: HTTP {reply.status_code}: {reply.text[:500]}")
    return reply.json()


def name_at_server(base_url, folder):
    """What the server calls the checkpoint: a listed model of the folder's name, else its path."""
    try:
        listed = call_server("GET", f"{base_url}/models")["data"]
    except ValueError:                   # `transformers serve` lists a cache, or fails without one
        return folder
    names = [model["id"] for model in listed]
    same = [name for name in names if os.path.basename(name) == os.path.basename(folder)]
    return (same or [folder])[0]


def check_server(config):
    """Ask a running server what is in MODEL/parity.json. Raises ValueError if answers differ."""
    path = os.path.join(config.model, "parity.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; python -m extras.parity write makes it")
    parity = read_value(path)
    base_url = config.base_url.rstrip("/")
    name = name_at_server(base_url, os.path.abspath(config.model))
    n_different = 0
    for number, expected in enumerate(parity["samples"]):
        content = [{"type": "image_url", "image_url": {"url": url}} for url in expected["images"]]
        content.append({"type": "text", "text": expected["question"]})
        reply = call_server("POST", f"{base_url}/chat/completions", json={
            "model": name, "temperature": 0, "max_tokens": parity["max_new_tokens"],
            "messages": [{"role": "user", "content": content}], **parity["stop"]})
        answer = reply["choices"][0]["message"]["content"].strip()
        tokens = reply.get("usage", {}).get("prompt_tokens")
        print(f"{number}: {tokens} prompt tokens, here {len(expected['ids'])}; ", end="")
        if answer == expected["answer"]:
            print(f"the same: {answer!r}")
        else:
            print(f"ANOTHER ANSWER: {answer!r}, here {expected['answer']!r}")
            n_different += 1
    if n_different:
        raise ValueError(f"{n_different} of {len(parity['samples'])} answers of {base_url} differ "
                         f"from {path}")


COMMANDS = {"write": (write_parity, ParityWriteConfig), "check": (check_server, ParityCheckConfig)}


def main(argv=None):
    return run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
