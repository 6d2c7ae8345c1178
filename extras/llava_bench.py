"""
A LLaVA-Bench of one's own pictures: a text-only teacher's reference answers, and its questions if
one has none (Sec. 5.1's construction).

    python -m extras.llava_bench make --bench 30 --captions captions_val2014.json \\
        --instances instances_val2014.json --out data/bench --base_url URL --model gpt-4
    python -m extras.llava_bench references --questions q.jsonl --context context.jsonl \\
        --out reference.jsonl --base_url URL --model gpt-4

    make        captions and boxes --> a question of each type, and its answer, as in COCO's bench
    references  a person's questions, and a description or captions and boxes of each picture -->
                answers, as in the bench In-the-Wild

eval.py reads what they write. Of a picture for which a type is rejected `make` keeps nothing and
takes the next one; `references` asks again.
"""
import json
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import generate_data
from eval import KINDS, context_of
from generate_data import TYPES, Reject, make_request
from parts import client, files, scoring
from parts.client import Endpoint, Request
from parts.files import IMAGE, PROMPTS

CATEGORY = dict(zip(TYPES, KINDS, strict=True))
MOST_TRIES = 3                 # of `references` for one answer, before a person has to look


@dataclass(frozen=True, kw_only=True)
class Teacher(Endpoint):
    model: str = "gpt-4"       # any chat model that the endpoint has
    prompts: str = str(PROMPTS)  # folder of prompts, as for generate_data.py
    language: str = None       # language to write in, by its English name


@dataclass(frozen=True, kw_only=True)
class Make(Teacher):
    bench: int                 # pictures
    out: str                   # folder for questions.jsonl, reference.jsonl, context.jsonl
    captions: str              # COCO's captions_*.json, or JSON lines of id, image, captions, ...
    instances: str = None      # COCO's instances_*.json
    seed: int = 0
    skip_bad: bool = False     # leave out boxes that are outside of their picture, or inverted

    def __post_init__(self):
        super().__post_init__()
        files.check_least(self, bench=1)


@dataclass(frozen=True, kw_only=True)
class References(Teacher):
    questions: str             # JSON lines of question_id, image, text, category
    context: str               # JSON lines of image, and caption, or captions and instances
    out: str                   # JSON lines to write; OUT.raw keeps what is paid


def reference_request(name, known, question, config):
    """The request for a reference answer: the teacher reads what is known of a picture."""
    system = files.read_text(Path(config.prompts, "reference", "system_message.txt"))
    if config.language:
        system += generate_data.WRITE_IN.format(config.language)
    messages = client.chat_messages(system, [], f"{known}\n\n{question}")
    return Request(name, "reference", client.request_body(config, messages))


def reference_of(reply):
    """A reply as a reference answer, which is read like a description. Raises Reject."""
    [(_, text)] = generate_data.read_turns("detail_description", reply)
    return text


def reference_row(question, text, config):
    """The line of reference.jsonl that answers a line of questions.jsonl."""
    i = question["question_id"]
    return {"question_id": i, "category": question["category"], "prompt": question["text"],
            "text": text, "metadata": {}, "answer_id": f"reference-{i}", "model_id": config.model}


# --------------------------------------------------------------------------------------------------
# make: captions and boxes -> questions and reference answers


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


def ask_for_pictures(contexts, prompts, raw, config):
    """{picture: [((kind, question), answer) of each type]} of the pictures that can be used."""
    ways = generate_data.detail_questions(config.prompts)

    def question_of(context, request, reply):
        record = generate_data.make_record(context, request, reply, ways, config.seed)
        first = record["conversations"][0]["value"]
        return request.kind, first.replace(IMAGE, "").strip()

    def answer_of(context, request, reply):
        return reference_of(reply)

    plan = [(context, make_request(kind, context, prompts, config))
            for context in contexts for kind in TYPES]
    questions = usable_replies(plan, question_of, raw, config)
    plan = []
    for context, rows in questions.items():
        known = generate_data.context_text("reference", context)
        for kind, question in rows:
            name = f"{context.id}-reference-{kind}"
            plan.append((context, reference_request(name, known, question, config)))
    answers = usable_replies(plan, answer_of, raw, config)
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


def write_bench(found, out, config):
    """The three files of eval.py."""
    questions, references = [], []
    for context, rows in found.items():
        for (kind, question), text in rows:
            row = {"question_id": len(questions), "category": CATEGORY[kind],
                   "image": context.image, "text": question}
            questions.append(row)
            references.append(reference_row(row, text, config))
    files.write_lines(out / "questions.jsonl", questions)
    files.write_lines(out / "reference.jsonl", references)
    files.write_lines(out / "context.jsonl", [context_record(context) for context in found])
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
        write_bench(found, out, config)


# --------------------------------------------------------------------------------------------------
# references: questions that there are already -> reference answers


def read_known(path):
    """{image: what the teacher reads of it}: a description, or captions and boxes."""
    counts = Counter()                   # of what is left out or changed
    known = {}
    for image, record in scoring.read_by_id(path, key="image").items():
        try:
            if "caption" in record:
                record["captions"] = [context_of(record)[0]]
            context = generate_data.from_record({"id": image} | record, counts)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: {image}: {type(error).__name__} {error}; caption, or "
                             "captions and instances: [{category, bbox}], is needed") from error
        known[image] = generate_data.context_text("reference", context)
    for what, n in (+counts).items():
        print(f"{path}: {n:,} {what}")
    return known


def ask_for_references(request_of, names, config):
    """{id: reference answer} of all these questions; request_of(id, try) asks for one."""
    texts, left = {}, names
    for attempt in range(MOST_TRIES):
        requests = {name: request_of(name, attempt) for name in left}
        replies = scoring.replies_for(list(requests.values()), config.out, config)
        left = []
        for name, request in requests.items():
            try:
                texts[name] = reference_of(replies[request.key])
            except Reject as reject:
                print(f"{name}, try {attempt + 1} of {MOST_TRIES}: {reject}")
                left.append(name)
        if not left:
            return texts
    raise ValueError(
        f"{config.questions}: {len(left)} of {len(names)} questions have no usable answer after "
        f"{MOST_TRIES} tries{scoring.examples(left)}. Leave them out of a copy of --questions: the "
        f"other answers are kept in {config.out}.raw")


def write_references(config):
    """A teacher's reference answers to a person's questions. Started again, it goes on."""
    questions = scoring.read_by_id(config.questions, "image", "text", "category")
    known = read_known(config.context)
    absent = [name for name, question in questions.items() if question["image"] not in known]
    if absent:
        raise ValueError(f"{config.context}: nothing about the pictures of {len(absent)} questions"
                         f"{scoring.examples(absent)}; the names of `image` must be equal")

    def request_of(name, attempt):
        question = questions[name]
        name = f"{name}-{attempt}"       # a second try is another request
        return reference_request(name, known[question["image"]], question["text"], config)

    if client.is_preview([request_of(name, 0) for name in questions], config):
        return
    texts = ask_for_references(request_of, list(questions), config)
    files.write_lines(config.out, [reference_row(question, texts[name], config)
                                   for name, question in questions.items()])
    print(f"{len(texts)} reference answers: {config.out}")


COMMANDS = {"make": (make_bench, Make), "references": (write_references, References)}


def main(argv=None):
    files.run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    files.run_main(main)
