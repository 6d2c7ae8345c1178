"""
Asking a checkpoint (Sec. 5.1): one question, a chat, or a file of questions.

    python sample.py --model out/stage2 --image dog.jpg --question "What is unusual here?"
    python sample.py --model out/stage2 --image dog.jpg                   # a chat
    python sample.py --model out/stage2 --questions q.jsonl --images DIR --answers a.jsonl

    turns, pictures --Talker.prompt--> a sample --collate--> ids, X_v --Engine--> X_a
"""
import sys
from contextlib import suppress
from dataclasses import dataclass

import torch

from data import collate, render, sample_of
from model import LLaVA
from parts import files
from parts.engine import Engine, content_name
from parts.pictures import open_image
from parts.questions import AnswerFile
from parts.ranks import DTYPES, choose_device, choose_dtype
from parts.templates import TEMPLATES, template_of
from parts.views import view_from


@dataclass(frozen=True)
class Config:
    model: str                           # checkpoint folder
    image: str = None                    # a picture: path or http(s) address
    question: str = None                 # without it, and without --questions: a chat
    questions: str = None                # JSON lines of question_id, image, text
    images: str = "."                    # folder of the questions' images
    answers: str = None                  # JSON lines to write; an unfinished file is resumed
    temperature: float = 0.2             # 0 is greedy
    max_new_tokens: int = 512            # at most, of an answer
    batch_size: int = 16                 # questions answered at once
    template: str = None                 # for a checkpoint that does not name its own
    show_prompt: bool = False            # print the exact prompt, as text and as ids
    seed: int = 0                        # of what is drawn at a temperature above 0
    device: str = "auto"                 # cuda, mps or cpu
    dtype: str = "auto"                  # bf16, fp16, fp32; int8: f_phi's weights (needs torchao)
    CHOICES = {"template": list(TEMPLATES), "device": ["auto", "cuda", "mps", "cpu"],
               "dtype": ["auto", *DTYPES, "int8"]}

    def __post_init__(self):
        files.check_least(self, temperature=0, max_new_tokens=1, batch_size=1)
        if bool(self.questions) != bool(self.answers):
            raise ValueError("--questions FILE and --answers FILE go together; one is missing")
        if self.questions and (self.image or self.question):
            raise ValueError("--questions FILE is asked alone, without --image and --question")


class Talker:
    """A checkpoint, its template and how it is sampled: turns and pictures in, answers out."""

    def __init__(self, config, compile=False):
        self.config = config
        device = choose_device(config.device)
        int8 = config.dtype == "int8"
        dtype, _ = choose_dtype("auto" if int8 else config.dtype, device)     # and why
        self.model = LLaVA.from_pretrained(config.model, dtype).to(device)
        self.engine = Engine(self.model, compile, int8)
        self.view = view_from(self.model.meta, self.model.g.config)      # a picture's squares
        named = config.template or self.model.meta.get("template")
        self.template = template_of(named, config.model)
        self.sampling = {"temperature": config.temperature, "stop": [self.template.STOP],
                         "max_new_tokens": config.max_new_tokens,
                         "generator": torch.Generator(device).manual_seed(config.seed)}
        if self.template.name == "plain":        # on stderr, so that the answer stays alone
            print("notice: template plain shows pictures alone, no question", file=sys.stderr)

    def prompt(self, turns, pictures):
        """A conversation up to a question, as a sample: its ids are training's up to the answer."""
        # by a hash of their content, so that equal pictures are encoded once
        named = [(content_name(picture), picture) for picture in pictures]
        sample = sample_of(turns, named, self.model.tokenizer, self.template, self.view)
        if self.config.show_prompt:
            text = "".join(text for text, _ in render(turns, self.template))
            print(text, sample["input_ids"], sep="\n")
        return sample

    def answers(self, conversations):
        """X_a of each (turns, pictures), in one batch."""
        prompts = [self.prompt(turns, pictures) for turns, pictures in conversations]
        batch = collate(prompts, self.view, side="left")     # all prompts end in the last column
        return self.engine.generate(batch, **self.sampling)

    def stream(self, turns, pictures, ids=None, **more):
        """X_a piece by piece, its tokens in `ids`; what an earlier answer saw is kept (its KV)."""
        prefix, rest = self.engine.recall(self.prompt(turns, pictures), self.view)
        return self.engine.pieces(collate([rest], self.view), prefix, ids, **self.sampling | more)


def human_turn(question, n_images=0):
    """What a person asks. OFFICIAL: its images stand in front, each on a line of its own."""
    return {"from": "human", "value": (f"{files.IMAGE}\n" * n_images + question).strip()}


def print_answer(talker, turns, pictures):
    """Print an answer as it comes, until Ctrl-C; returns what was shown of it."""
    answer = ""
    try:
        for piece in talker.stream(turns, pictures):
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:            # ends this answer, not the chat
        print(" (stopped)", end="")
    print()                              # the answer's line ends here
    return answer


def chat(talker, attached):
    """Questions from the terminal. OURS: /image puts a picture in any turn, not only the first."""
    print("/image PATH adds a picture to the next question, /reset starts over, /quit leaves")
    turns, pictures = [], []             # the conversation so far; `attached`: the next question's
    while True:
        line = input("human: ").strip()
        command, _, path = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/reset":
                turns, pictures, attached = [], [], []
            elif command == "/image":
                attached.append(open_image(path.strip()))
            elif command.startswith("/"):
                print(f"{command} is not one of /image /reset /quit")
            elif line:
                asked = [*turns, human_turn(line, len(attached))]
                print("assistant: ", end="")
                answer = print_answer(talker, asked, pictures + attached)
                turns = [*asked, {"from": "gpt", "value": answer}]       # only now: it may fail
                pictures, attached = pictures + attached, []
        except (ValueError, FileNotFoundError) as error:
            print(f"error: {error}")     # a wrong path, a question that is too long: ask again


def answer_file(talker, config):
    """Answers --questions into --answers; started again, it resumes."""
    if talker.template.name == "plain":
        raise ValueError(f"{config.model}: its template, plain, has no place for a question")
    file = AnswerFile(config.questions, config.images, config.answers, config.model)
    for batch in file.batches(config.batch_size):    # each question has its opened "pictures"
        turns = [[human_turn(question["text"], len(question["pictures"]))] for question in batch]
        pictures = [question["pictures"] for question in batch]
        file.write(batch, talker.answers(zip(turns, pictures, strict=True)))
    file.finish()                        # puts the answers in the questions' order


def main(argv=None):
    config = Config(**files.typed_flags(Config, argv, "Ask a LLaVA checkpoint."))
    pictures = [open_image(config.image)] if config.image else []
    talker = Talker(config)
    if config.questions:
        answer_file(talker, config)
    elif config.question is None:
        with suppress(EOFError):         # of input(): Ctrl-D, or the end of a file
            chat(talker, pictures)
    else:
        print_answer(talker, [human_turn(config.question, len(pictures))], pictures)


if __name__ == "__main__":
    files.run_main(main)
