"""
Talking to it (Sec. 5.1).

    python sample.py --model out/stage2 --image dog.jpg --question "What is unusual here?"     one answer
    python sample.py --model out/stage2 --image dog.jpg                                        a chat
    python sample.py --model out/stage2 --questions q.jsonl --images DIR --answers a.jsonl     a file of questions
    python sample.py --model out/stage2 --image dog.jpg --question "What is it?" --rank "A dog." "A cat."     log p of answers
    python sample.py --model out/stage2 --check http://localhost:8000       does a server of this checkpoint answer the same?

A picture is a path or an http(s) address. The template is the checkpoint's own: the prompt is, id for id, what the
model saw before its answers in training.
"""
import base64
import functools
import hashlib
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

import attention
from data import IGNORE, TEMPLATES, collate, encode, prompt, render
from decode import Past, decoder_of, quantise
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
    show_attn: str = None               # folder for a picture per answer word of where the model looked
    attn_layers: str = None             # of which layers, e.g. 0,5,-1; their mean (default: all)
    attn_heads: str = None              # of which heads, likewise
    top_k_tokens: int = 0               # print so many alternatives at each step, with their probabilities
    rank: list[str] = None              # rank these answers to the question by log p instead of answering
    int8: bool = False                  # f_phi's weights in 8 bits (needs torchao)
    compile: bool = False               # one compiled decoding step: a slow start, for many answers
    parity: int = 0                     # write so many of --questions with their greedy answers to MODEL/parity.json
    check: str = None                   # address of a server whose answers are compared with MODEL/parity.json
    seed: int = 0
    device: str = "auto"                # cuda, mps or cpu
    dtype: str = "auto"                 # bf16, fp16 or fp32


CHOICES = {"template": list(TEMPLATES), "device": ["auto", "cuda", "mps", "cpu"], "dtype": ["auto", *DTYPES]}


PASTS = 4                                                # conversations whose keys and values are kept


class Talker:
    """A checkpoint with its template and the way it is sampled: turns and pictures in, answers out."""

    def __init__(self, args):
        device = choose_device(args.device)
        dtype, _ = choose_dtype(args.dtype, device)
        self.model = LLaVA.from_pretrained(args.model, dtype).to(device)
        if args.int8:
            quantise(self.model.f_phi)
        self.model.decoder = decoder_of(self.model.f_phi, args.compile)
        self.pasts = []                                  # of the last conversations, the newest last
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

    def batch(self, conversations, skip=0):
        """[(turns, pictures), ...] to what `generate` takes, padded on the left. The same picture (object) is in it once, and
        none of the first `skip` of a conversation."""
        m, pictures = self.model, {id(p): p for _, some in conversations for p in some[skip:]}
        shown = [list(pictures).index(id(p)) for _, some in conversations for p in some[skip:]]
        samples = [prompt(turns, some, m.tokenizer, self.template, m.view, pixels=False) for turns, some in conversations]
        if self.show_prompt:
            for (turns, _), sample in zip(conversations, samples):
                print("".join(text for text, _ in render(turns, self.template)), sample["input_ids"], sep="\n")
        batch = collate(samples, side="left") | {"X_v": m.view.X_v(list(pictures.values()))}
        tensors = {k: batch[k].to(m.device) for k in ("input_ids", "attention_mask", "X_v")}
        return tensors | {"sizes": [p.size for p in pictures.values()], "shown": shown}

    def recall(self, turns, pictures):
        """The `Past` of an earlier answer that has most of this prompt, cut to that (else an empty one), and how many of the
        pictures it has. It is no longer remembered: who uses it gives it back."""
        if not self.model.decoder.reuses:
            return None, 0
        m, counts = self.model, [self.model.view.tokens(*p.size) for p in pictures]
        ids = prompt(turns, pictures, m.tokenizer, self.template, m.view, pixels=False)["input_ids"]
        names = [hashlib.sha256(p.tobytes()).digest() + str(p.size).encode() for p in pictures]
        known = [(past.common(ids, names, counts, m.image_id), past) for past in self.pasts]
        (n, k), past = max(known, key=lambda one: one[0], default=((0, 0), None))
        if n == 0:
            past = Past()
        else:
            self.pasts.remove(past)
        past.cut(n, names)
        return past, k

    def answers(self, conversations):
        """One answer per conversation, all in one batch."""
        return self.model.generate(**self.batch(conversations), stop=self.stop, **self.sampling)

    def stream(self, turns, pictures, stop=(), ids=None, **sampling):
        """The answer piece by piece, held back while it may still turn into a stop string or half a character.

        Strings in `stop` end it, too; `sampling` goes before what was typed; its ids are appended to the list `ids`. What an
        earlier answer has seen of the conversation, pictures first of all, is not computed again.
        """
        ids, shown, stop = [] if ids is None else ids, 0, [*self.stop, *stop]
        past, skip = self.recall(turns, pictures)
        batch = self.batch([(turns, pictures)], skip)
        try:
            for (new,) in self.model.stream(**batch, stop=stop, past=past, **self.sampling | sampling):
                ids.append(new)
                text = self.model.to_text(ids, stop)
                held = max(n for s in stop for n in range(len(s) + 1) if text.endswith(s[:n]))
                sure = len(text[:len(text) - held].rstrip())
                if not text.endswith("\ufffd") and sure > shown:
                    yield text[shown:sure]
                    shown = sure
            yield self.model.to_text(ids, stop)[shown:]
        finally:
            if past is not None and past.ids:
                self.pasts = [*self.pasts, past][-PASTS:]

    def alternatives(self, turns, pictures, K):
        """Greedy or drawn, an answer id by id: yields (id, [(id, p) of the K likeliest])."""
        seen = []
        batch = self.batch([(turns, pictures)])
        for (new,) in self.model.stream(**batch, stop=self.stop, watch=seen.append, **self.sampling):
            p, order = seen.pop()[0].softmax(-1).topk(K)
            yield new, list(zip(order.tolist(), p.tolist()))

    def rank(self, turns, pictures, answers):
        """[(log p, answer), ...] of given answers behind one prompt, the likeliest first; each ends in the template's STOP."""
        m, samples = self.model, []
        start = len(prompt(turns, pictures, m.tokenizer, self.template, m.view, pixels=False)["input_ids"])
        for answer in answers:
            ids, labels = encode(render([*turns, {"from": "gpt", "value": answer}], self.template), m.tokenizer,
                                 [m.view.tokens(*p.size) for p in pictures])
            samples.append({"input_ids": ids, "labels": [IGNORE] * start + labels[start:], "where": answer, "sizes": [],
                            "X_v": m.view.X_v([])})
        batch = collate(samples)
        log_p = m.score(batch["input_ids"].to(m.device), batch["labels"].to(m.device), m.view.X_v(pictures).to(m.device),
                        sizes=[p.size for p in pictures], shown=[*range(len(pictures))] * len(answers))
        return sorted(zip(log_p.tolist(), answers), reverse=True)

    def attention(self, turns, pictures, answer, layers=None, heads=None):
        """Where the model looks at each word of an answer: attention.py's `words_and_attention`."""
        return attention.words_and_attention(self.model, self.template, turns, pictures, answer, layers, heads)


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


def read_questions(args, most=None):
    """The (first `most`) records of --questions, {question_id, image?, text}; ValueError if one lacks what it needs."""
    questions, problem_of = list(read_json(args.questions))[:most], functools.cache(picture_problem)     # read once each
    for i, q in enumerate(questions):
        if not isinstance(q, dict) or "question_id" not in q or not isinstance(q.get("text"), str):
            raise ValueError(f"{args.questions}[{i}]: a question needs question_id and text")
        for name in image_names(q):
            if problem := problem_of(args.images, name):
                raise ValueError(f"{args.questions}[{i}] (id {q['question_id']}): {problem}")
    return questions


def answer_file(talker, args):
    """Answer every record of --questions into --answers, LLaVA's format for both.

    Goes on where an earlier run was stopped. Questions of about the same length (16 tokens more or less) and the same picture
    share a batch, in which it is loaded and encoded once; the file ends up in their order.
    """
    questions = read_questions(args)
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


def data_url(picture, kind="PNG"):
    """A picture as an address that holds it."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def write_parity(talker, args):
    """The first questions with their pictures, prompts, ids and greedy answers, beside the checkpoint: parity.json, by which
    another program that serves this folder can be held against it (`check`)."""
    samples = []
    for q in read_questions(args, args.parity):
        pictures = [load_image(image_path(args.images, name)) for name in image_names(q)]
        turns = [talker.ask(q["text"], len(pictures))]
        batch = talker.batch([(turns, pictures)])
        answer, = talker.model.generate(**batch, stop=talker.stop, max_new_tokens=args.max_new_tokens)
        samples.append({"question": q["text"], "images": [data_url(p) for p in pictures], "answer": answer,
                        "prompt": "".join(text for text, _ in render(turns, talker.template)),
                        "ids": batch["input_ids"][0].tolist()})
    path, eos = os.path.join(args.model, "parity.json"), talker.model.tokenizer.eos_token
    stop = {} if talker.template.STOP == eos else {"stop": [talker.template.STOP]}           # a server knows the former itself
    with open(path, "w", encoding="utf-8") as f:
        json.dump({"max_new_tokens": args.max_new_tokens, "stop": stop, "samples": samples}, f, indent=1, ensure_ascii=False)
    print(f"{len(samples)} questions and answers in {path}")


def check(args):
    """Ask a running server (OpenAI's chat API) what is in parity.json, greedily. ValueError if an answer is another one."""
    path, base, differ = os.path.join(args.model, "parity.json"), args.check.rstrip("/").removesuffix("/v1") + "/v1", 0
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; sample.py --model {args.model} --questions FILE --images DIR "
                                "--parity 4 writes it")
    with open(path, encoding="utf-8") as f:
        parity = json.load(f)

    def api(method, route, **body):
        try:
            return requests.request(method, base + route, timeout=600, **body)
        except requests.RequestException as error:
            raise ValueError(f"{base}{route}: {error}") from error

    folder = os.path.abspath(args.model)
    listed = api("GET", "/models")                       # `transformers serve` lists a cache instead, or fails without one,
    names = [m["id"] for m in listed.json()["data"]] if listed.ok else []    # and takes the folder's path
    name = next((one for one in names if os.path.basename(one) == os.path.basename(folder)), folder)
    for n, s in enumerate(parity["samples"]):
        content = [{"type": "image_url", "image_url": {"url": url}} for url in s["images"]]
        reply = api("POST", "/chat/completions", json={
            "model": name, "temperature": 0, "max_tokens": parity["max_new_tokens"], **parity["stop"],
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": s["question"]}]}]})
        if not reply.ok:
            raise ValueError(f"{base}: HTTP {reply.status_code} for model {name!r}: {reply.text[:500]}")
        reply = reply.json()
        answer, used = reply["choices"][0]["message"]["content"].strip(), reply.get("usage", {}).get("prompt_tokens")
        same, differ = answer == s["answer"], differ + (answer != s["answer"])
        print(f"{n}: {'the same' if same else 'ANOTHER ANSWER'} ({used} prompt tokens, here {len(s['ids'])}): {answer!r}"
              + ("" if same else f", here {s['answer']!r}"))
    if differ:
        raise ValueError(f"{differ} of {len(parity['samples'])} answers of {base} differ from {path}")


def numbers(text, flag):
    """"0,5,-1" to [0, 5, -1]; None stays None."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{flag} {text!r}: numbers with commas between them, e.g. 0,5,-1") from None


def answer_one(talker, args):
    """One question: the answer, what else it could have said, or where it looked."""
    pictures = [open_picture(args.image)] if args.image else []
    turns, model = [talker.ask(args.question, len(pictures))], talker.model
    spell = lambda i: repr(model.tokenizer.decode([i]))
    if args.rank:
        for log_p, answer in talker.rank(turns, pictures, args.rank):
            print(f"{log_p:10.3f}  {answer}")
        return
    if args.top_k_tokens:
        ids = []
        for new, some in talker.alternatives(turns, pictures, args.top_k_tokens):
            ids.append(new)
            print(f"{spell(new):<16}" + "  ".join(f"{spell(i)} {p:.3f}" for i, p in some), flush=True)
        answer = model.to_text(ids, talker.stop)
    else:
        answer = ""
        for piece in talker.stream(turns, pictures):
            answer += piece
            print(piece, end="", flush=True)
        print()
    if args.show_attn:
        words = talker.attention(turns, pictures, answer, numbers(args.attn_layers, "attn_layers"),
                                 numbers(args.attn_heads, "attn_heads"))
        for path in attention.save_overlays(words, pictures, args.show_attn):
            print(path)


def main(argv=None):
    args = Config(**typed_flags(Config, argv, "Ask a LLaVA checkpoint.", CHOICES))
    if args.check:
        return check(args)
    if bool(args.answers) + bool(args.parity) != bool(args.questions):
        raise ValueError("--questions goes with --answers or with --parity, and each of these with it")
    if (args.rank or args.top_k_tokens or args.show_attn) and args.question is None:
        raise ValueError("--rank, --top_k_tokens and --show_attn need a --question")
    if args.show_attn and not args.image:
        raise ValueError("--show_attn needs an --image")
    talker = Talker(args)
    if args.parity:
        write_parity(talker, args)
    elif args.questions:
        answer_file(talker, args)
    elif args.question is None:
        chat(talker, args.image)
    else:
        answer_one(talker, args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
