"""
A LLaVA-Bench of one's own pictures, as LLaVA-Bench (COCO) was made: questions of a text-only
teacher, and its reference answers (Sec. 5.1's construction).

    python -m extras.llava_bench --bench 30 --captions captions_val2014.json \\
        --instances instances_val2014.json --out data/bench --base_url URL --model gpt-4

It writes what eval.py reads: questions.jsonl, reference.jsonl, context.jsonl; a question of each of
the three types about each picture. A picture for which a type is rejected makes room for the next.
"""
import json
import random
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import generate_data
from generate_data import TYPES, Reject, make_request
from parts import client, files
from parts.client import Endpoint, Request
from parts.files import IMAGE, PROMPTS

CATEGORY = dict(zip(TYPES, ("conv", "detail", "complex"), strict=True))


@dataclass(frozen=True, kw_only=True)
class Config(Endpoint):
    bench: int                 # pictures
    out: str                   # folder for questions.jsonl, reference.jsonl, context.jsonl
    captions: str              # COCO's captions_*.json, or JSON lines of id, image, captions, ...
    instances: str = None      # COCO's instances_*.json
    model: str = "gpt-4"       # any chat model that the endpoint has
    prompts: str = str(PROMPTS)  # folder of prompts, as for generate_data.py
    language: str = None       # language to write in, by its English name
    seed: int = 0
    skip_bad: bool = False     # leave out boxes that are outside of their picture, or inverted

    def __post_init__(self):
        super().__post_init__()
        files.check_least(self, bench=1)


def reference_request(context, kind, question, config):
    """The request for a reference answer: the teacher reads captions and boxes, no picture."""
    system = Path(config.prompts, "reference", "system_message.txt").read_text()
    if config.language:
        system += generate_data.WRITE_IN.format(config.language)
    text = f"{generate_data.context_text('reference', context)}\n\n{question}"
    body = client.request_body(config, client.chat_messages(system, [], text))
    return Request(f"{context.id}-reference-{kind}", "reference", body)


def usable_replies(plan, read, raw, config):
    """{picture: [read(context, request, reply) of each type]} where no reply is rejected.

    plan   [(context, request), ...]
    """
    replies = client.ask_everything([request for _, request in plan], raw, config)
    found = defaultdict(list)
    for context, request in plan:
        try:
            found[context].append(read(context, request, replies[request.key]))
        except Reject as reject:
            print(f"{request.id}: {reject}; another picture takes its place")
    return {context: rows for context, rows in found.items() if len(rows) == len(TYPES)}


def reference_of(context, request, reply):
    """A reply as a reference answer, which is read like a description. Raises Reject."""
    [(_, text)] = generate_data.read_turns("detail_description", reply)
    return text


def ask_for_pictures(contexts, prompts, raw, config):
    """{picture: [((kind, question), answer) of each type]} of the pictures that can be used."""
    ways = generate_data.detail_questions(config.prompts)

    def question_of(context, request, reply):
        record = generate_data.make_record(context, request, reply, ways, config.seed)
        first = record["conversations"][0]["value"]
        return request.kind, first.replace(IMAGE, "").strip()

    plan = [(context, make_request(kind, context, prompts, config))
            for context in contexts for kind in TYPES]
    questions = usable_replies(plan, question_of, raw, config)
    plan = [(context, reference_request(context, kind, question, config))
            for context, rows in questions.items() for kind, question in rows]
    answers = usable_replies(plan, reference_of, raw, config)
    return {context: list(zip(questions[context], texts, strict=True))
            for context, texts in answers.items()}


def context_record(context):
    """A Context as a line of context.jsonl."""
    instances = []
    for line in context.boxes.splitlines():
        category, _, box = line.rpartition(": ")
        instances.append({"category": category, "bbox": json.loads(box)})
    return {"id": context.id, "image": context.image, "captions": context.captions.split("\n"),
            "instances": instances}


def write_bench(found, tried, out, config):
    """The three files of eval.py, and metadata.json."""
    questions, references = [], []
    for context, rows in found.items():
        for (kind, question), text in rows:
            i = len(questions)
            row = {"question_id": i, "category": CATEGORY[kind]}
            questions.append({**row, "image": context.image, "text": question})
            references.append({**row, "prompt": question, "text": text, "metadata": {},
                               "answer_id": f"reference-{i}", "model_id": config.model})
    files.write_lines(out / "questions.jsonl", questions)
    files.write_lines(out / "reference.jsonl", references)
    files.write_lines(out / "context.jsonl", [context_record(context) for context in found])
    prompts = generate_data.read_prompts(config.prompts)
    files.write_json(out / "metadata.json", {
        "pictures": len(found), "tried": tried, "date": str(date.today()),
        "settings": asdict(config), "prompts": client.hash_of(prompts)})
    print(f"{len(questions)} questions about {len(found)} pictures and their reference answers: "
          f"{out}/questions.jsonl, reference.jsonl, context.jsonl")


def make_bench(config):
    """Ask until there are enough pictures; go on after an interruption, nothing is paid twice."""
    prompts = generate_data.read_prompts(config.prompts)
    contexts = generate_data.read_contexts(config.captions, config.instances, config.skip_bad)
    if config.bench > len(contexts):
        raise ValueError(f"--bench {config.bench}: {config.captions} has {len(contexts)} pictures")
    order = random.Random(config.seed).sample(contexts, len(contexts))
    first = [make_request(kind, context, prompts, config)
             for context in order[:config.bench] for kind in TYPES]
    if client.is_preview(first, config):     # of the questions; their answers are asked behind them
        return
    found, tried = {}, 0
    with files.lock_folder(config.out) as out:
        while len(found) < config.bench:
            chosen = order[tried:tried + config.bench - len(found)]
            if not chosen:
                raise ValueError(f"--bench {config.bench}: {len(found)} of {len(order)} pictures "
                                 "have a usable question and answer of each type")
            tried += len(chosen)
            found |= ask_for_pictures(chosen, prompts, out / "raw.jsonl", config)
        write_bench(found, tried, out, config)


def main(argv=None):
    make_bench(Config(**files.typed_flags(Config, argv, "Make a LLaVA-Bench.")))


if __name__ == "__main__":
    files.run_main(main)
