"""
Holding a server against its checkpoint: does it give the answers that the folder gives here?

    python -m extras.parity write --model out/stage2 --questions q.jsonl --images DIR
    python -m extras.parity check --model out/stage2 --base_url http://localhost:8000/v1

`write` puts questions with their pictures, prompts, ids and greedy answers beside the checkpoint,
in parity.json. `check` asks any server that speaks OpenAI's chat API the same, and fails where a
prompt has another number of tokens there, or an answer is another one.
"""
import os
from dataclasses import dataclass

import requests

import sample
from data import render
from parts.files import read_value, run_command, run_main, write_json
from parts.pictures import data_url, image_path, load_image
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
    ids: bool = False                    # hold the prompts' ids, too, which vLLM tells when asked


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
    """The JSON of a server's reply. Raises ValueError with the server's words if it refuses."""
    reply = requests.request(method, url, timeout=600, **body)
    if not reply.ok:
        raise ValueError(f"{url}: HTTP {reply.status_code}: {reply.text[:500]}")
    return reply.json()


def ask_server(base_url, name, question, pictures=(), **more):
    """A server's reply to a question with its pictures, as data: addresses; greedy."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    content.append({"type": "text", "text": question})
    messages = [{"role": "user", "content": content}]
    return call_server("POST", f"{base_url}/chat/completions", json={
        "model": name, "temperature": 0, "messages": messages, **more})


def name_at_server(base_url, folder):
    """What the server calls the checkpoint: a listed model of the folder's name, or its path, as it
    was typed here or absolute. Raises ValueError if the server takes neither."""
    path = os.path.abspath(folder)
    try:
        listed = call_server("GET", f"{base_url}/models")["data"]
    except ValueError:                   # `transformers serve` lists a cache, or fails without one
        listed = []
    for model in listed:
        if os.path.basename(model["id"]) == os.path.basename(path):
            return model["id"]
    try:
        ask_server(base_url, folder, "Hello", max_tokens=1)      # what `transformers serve` wants
        return folder
    except ValueError:
        ask_server(base_url, path, "Hello", max_tokens=1)
        return path


def differences(reply, expected):
    """In what a server's reply differs from what is expected of it, in words; [] if in nothing."""
    found = []
    n_tokens = (reply.get("usage") or {}).get("prompt_tokens")
    if n_tokens not in (None, len(expected["ids"])):
        found.append(f"{n_tokens} prompt tokens, here {len(expected['ids'])}")
    ids = reply.get("prompt_token_ids")
    if ids not in (None, expected["ids"]):
        n_same = len(os.path.commonprefix([ids, expected["ids"]]))
        theirs, ours = ids[n_same:n_same + 5], expected["ids"][n_same:n_same + 5]
        found.append(f"ids {theirs} from token {n_same} on, here {ours}")
    answer = reply["choices"][0]["message"]["content"].strip()
    if answer != expected["answer"]:
        found.append(f"the answer {answer!r}, here {expected['answer']!r}")
    return found


def check_server(config):
    """Ask a running server what is in MODEL/parity.json. Raises ValueError if a prompt's number of
    tokens, its ids, where the server tells them, or an answer is another one."""
    path = os.path.join(config.model, "parity.json")
    parity = read_value(path)
    base_url = config.base_url.rstrip("/")
    name = name_at_server(base_url, config.model)
    more = {"max_tokens": parity["max_new_tokens"], **parity["stop"]}
    if config.ids:
        more["return_token_ids"] = True
    same = {"text alone": [], "with pictures": []}
    for number, expected in enumerate(parity["samples"]):
        reply = ask_server(base_url, name, expected["question"], expected["images"], **more)
        if config.ids and not reply.get("prompt_token_ids"):
            raise ValueError(f"{base_url}: no prompt_token_ids in its reply; leave out --ids")
        found = differences(reply, expected)
        print(f"{number}: {'DIFFERENT: ' + '; '.join(found) if found else 'the same'}")
        same["with pictures" if expected["images"] else "text alone"].append(not found)
    counts = [f"{kind} {sum(each)} of {len(each)}" for kind, each in same.items() if each]
    print(f"the same: {', '.join(counts)}")
    if not all(sum(same.values(), [])):
        raise ValueError(
            f"{base_url} differs from {path}: the same are {', '.join(counts)}. One token less or "
            "more is usually <s>, left out or written twice; many are a picture that is seen in "
            "another way, or another chat template than the folder's; equal ids and another answer "
            "are other weights, pixels or arithmetic")


COMMANDS = {"write": (write_parity, ParityWriteConfig), "check": (check_server, ParityCheckConfig)}


def main(argv=None):
    return run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
