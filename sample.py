"""
Talking to it (Sec. 5.1).

    python sample.py --model out/stage2 --image dog.jpg --question "What is unusual here?"     one answer
    python sample.py --model out/stage2 --image dog.jpg                                        a chat
    python sample.py --model out/stage2 --questions q.jsonl --images DIR --answers a.jsonl     a file of questions

A picture is a path or an http(s) address. The template is the checkpoint's own: the prompt is, id for id, what the
model saw before its answers in training.
"""
import functools
import io
import json
import os
import random
import sys
import uuid
from collections import Counter
from dataclasses import dataclass

import requests
import torch
from tqdm import tqdm

from data import TEMPLATES, collate, prompt, render
from images import load_image, picture_problem
from model import DTYPES, LLaVA, choose_device, choose_dtype
from records import IMAGE, brief_instructions, image_names, image_path, read_json, typed_flags, whole_lines


def open_picture(source):
    """A picture (PIL) from a path or an http(s) address. ValueError or FileNotFoundError says what is wrong with it."""
    if not source.startswith(("http://", "https://")):
        if not os.path.isfile(source):
            raise FileNotFoundError(f"image {source}: no such file")
        return load_image(source)
    try:
        reply = requests.get(source, timeout=30)
        reply.raise_for_status()
    except requests.RequestException as error:
        raise ValueError(f"image {source}: {error}") from error
    return load_image(io.BytesIO(reply.content), source)


@dataclass(frozen=True)
class Config:
    model: str                          # checkpoint folder
    image: str = None                   # a picture: path or http(s) address
    question: str = None                # without it, and without --questions: a chat
    questions: str = None               # JSON lines of question_id, image, text
    images: str = "."                   # folder of the questions' images
    answers: str = None                 # JSON lines to write; an unfinished file is gone on with
    temperature: float = 0.2            # 0 is greedy, as in all published evaluations
    top_p: float = 1.0
    max_new_tokens: int = 512
    batch_size: int = 16                # questions answered at once
    template: str = None                # for a checkpoint that does not name its own
    show_prompt: bool = False           # print the exact prompt, as text and as ids
    seed: int = 0
    device: str = "auto"                # cuda, mps or cpu
    dtype: str = "auto"                 # bf16, fp16 or fp32


CHOICES = {"template": list(TEMPLATES), "device": ["auto", "cuda", "mps", "cpu"], "dtype": ["auto", *DTYPES]}


class Talker:
    """A checkpoint with its template and the way it is sampled: turns and pictures in, answers out."""

    def __init__(self, args):
        device = choose_device(args.device)
        dtype, _ = choose_dtype(args.dtype, device)
        self.model = LLaVA.from_pretrained(args.model, dtype).to(device)
        if "template" not in self.model.meta and not args.template:
            raise ValueError(f"{args.model} does not say which template it was trained with; --template "
                             + " | ".join(TEMPLATES))
        self.template = TEMPLATES[args.template or self.model.meta["template"]]
        self.stop, self.show_prompt = [self.template.STOP], args.show_prompt
        self.sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p,
                         "generator": torch.Generator(device).manual_seed(args.seed)}
        self.stage_1 = self.model.meta.get("stage") == 1
        if self.stage_1:
            print("notice: a stage-1 checkpoint. Only W is trained, on captions, so every question is replaced by "
                  "stage 1's own: a brief instruction, or none (template plain)", file=sys.stderr)

    def ask(self, question, n_images=0):
        """A human turn: the images first (OFFICIAL: `<image>\\n` + question), in the form that the stage was trained with."""
        if IMAGE in question:
            raise ValueError(f"the question holds {IMAGE}; leave it out, the picture itself stands for it: {question!r}")
        if self.stage_1:
            question = random.Random(0).choice(brief_instructions())
        return {"from": "human", "value": (f"{IMAGE}\n" * n_images + question).strip()}

    def batch(self, conversations):
        """[(turns, pictures), ...] to what `generate` takes, padded on the left. The same picture (object) is in it once."""
        m, pictures = self.model, {id(p): p for _, some in conversations for p in some}
        shown = [list(pictures).index(id(p)) for _, some in conversations for p in some]
        samples = [prompt(turns, some, m.tokenizer, self.template, m.view, pixels=False) for turns, some in conversations]
        if self.show_prompt:
            for (turns, _), sample in zip(conversations, samples):
                print("".join(text for text, _ in render(turns, self.template)), sample["input_ids"], sep="\n")
        batch = collate(samples, side="left") | {"X_v": m.view.X_v(list(pictures.values()))}
        tensors = {k: batch[k].to(m.device) for k in ("input_ids", "attention_mask", "X_v")}
        return tensors | {"sizes": [p.size for p in pictures.values()], "shown": shown}

    def answers(self, conversations):
        """One answer per conversation, all in one batch."""
        return self.model.generate(**self.batch(conversations), stop=self.stop, **self.sampling)

    def stream(self, turns, pictures, stop=(), ids=None, **sampling):
        """The answer piece by piece, held back while it may still turn into a stop string or half a character.

        Strings in `stop` end it, too; `sampling` goes before what was typed; its ids are appended to the list `ids`.
        """
        ids, shown, stop = [] if ids is None else ids, 0, [*self.stop, *stop]
        for (new,) in self.model.stream(**self.batch([(turns, pictures)]), stop=stop, **self.sampling | sampling):
            ids.append(new)
            text = self.model.to_text(ids, stop)
            held = max(n for s in stop for n in range(len(s) + 1) if text.endswith(s[:n]))
            sure = len(text[:len(text) - held].rstrip())
            if not text.endswith("\ufffd") and sure > shown:
                yield text[shown:sure]
                shown = sure
        yield self.model.to_text(ids, stop)[shown:]


def chat(talker, image):
    """Questions from the terminal, answers as they come; the history is kept in the trained template."""
    print("/image PATH adds a picture to the next question, /reset starts over, /quit leaves")
    turns, pictures, new = [], [], [open_picture(image)] if image else []
    while True:
        try:
            line = input("human: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/reset":
                turns, pictures, new = [], [], []
            elif command == "/image":
                new.append(open_picture(rest.strip()))
            elif command.startswith("/"):
                print(f"{command} is not one of /image /reset /quit")
            elif line or talker.stage_1:
                asked = [*turns, talker.ask(line, len(new))]
                print("assistant: ", end="")
                answer = ""
                try:
                    for piece in talker.stream(asked, pictures + new):
                        answer += piece
                        print(piece, end="", flush=True)
                except KeyboardInterrupt:
                    print(" (stopped)", end="")
                print()
                turns, pictures, new = [*asked, {"from": "gpt", "value": answer}], pictures + new, []
        except (ValueError, FileNotFoundError) as error:
            print(f"error: {error}")                     # the chat goes on


def read_answers(path, model_id):
    """The answers that an earlier, interrupted run left in a file; ValueError if another model gave them."""
    answers = whole_lines(path)
    if not all(isinstance(a, dict) and {"question_id", "prompt", "model_id"} <= a.keys() for a in answers):
        raise ValueError(f"{path} is not an answers file; name another file")
    if others := {a["model_id"] for a in answers} - {model_id}:
        raise ValueError(f"{path} holds answers of {', '.join(sorted(others))}, not of {model_id}; name another file")
    return answers


def answer_file(talker, args):
    """Answer every record of --questions ({question_id, image?, text}) into --answers, LLaVA's format for both.

    Goes on where an earlier run was stopped. Questions of about the same length (16 tokens more or less) and the same picture
    share a batch, in which it is loaded and encoded once; the file ends up in their order.
    """
    questions, problem_of = list(read_json(args.questions)), functools.cache(picture_problem)     # a picture is read once
    for i, q in enumerate(questions):
        if not isinstance(q, dict) or "question_id" not in q or not isinstance(q.get("text"), str):
            raise ValueError(f"{args.questions}[{i}]: a question needs question_id and text")
        for name in image_names(q):
            if problem := problem_of(args.images, name):
                raise ValueError(f"{args.questions}[{i}] (id {q['question_id']}): {problem}")
    model_id = os.path.basename(os.path.normpath(args.model))
    key = lambda record, text: json.dumps([record["question_id"], record[text]])   # MME asks two questions under one id
    done = Counter(key(a, "prompt") for a in read_answers(args.answers, model_id))
    left = []
    for q in questions:
        if done[key(q, "text")]:
            done[key(q, "text")] -= 1
        else:
            left.append(q)
    if +done:
        raise ValueError(f"{args.answers} answers {sum(done.values())} questions that {args.questions} does not ask; "
                         "name another file")
    left.sort(key=lambda q: (len(image_names(q)), len(q["text"]) // 64, image_names(q), len(q["text"])))
    bar = tqdm(total=len(questions), initial=len(questions) - len(left), desc="answering", disable=not sys.stderr.isatty())
    whole_lines(args.answers, repair=True)
    with open(args.answers, "a", encoding="utf-8") as f, bar:
        for at in range(0, len(left), args.batch_size):
            part = left[at:at + args.batch_size]
            pictures = {n: load_image(image_path(args.images, n)) for n in {n for q in part for n in image_names(q)}}
            conversations = [([talker.ask(q["text"], len(image_names(q)))],
                              [pictures[n] for n in image_names(q)]) for q in part]
            for q, text in zip(part, talker.answers(conversations)):
                f.write(json.dumps({"question_id": q["question_id"], "prompt": q["text"], "text": text,
                                    "answer_id": uuid.uuid4().hex, "model_id": model_id, "metadata": {}}) + "\n")
                bar.update()
            f.flush()
    order = {key(q, "text"): i for i, q in enumerate(questions)}
    answers = sorted(read_answers(args.answers, model_id), key=lambda a: order[key(a, "prompt")])
    with open(args.answers + ".sorted", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(a, ensure_ascii=False) + "\n" for a in answers)
    os.replace(args.answers + ".sorted", args.answers)
    print(f"{len(answers)} answers in {args.answers}")


def main(argv=None):
    args = Config(**typed_flags(Config, argv, "Ask a LLaVA checkpoint.", CHOICES))
    if bool(args.questions) != bool(args.answers):
        raise ValueError("--questions and --answers go together")
    talker = Talker(args)
    if args.questions:
        answer_file(talker, args)
    elif args.question is None:
        chat(talker, args.image)
    else:
        pictures = [open_picture(args.image)] if args.image else []
        for piece in talker.stream([talker.ask(args.question, len(pictures))], pictures):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
