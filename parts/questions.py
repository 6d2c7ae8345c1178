"""
A file of questions and the file of their answers, in LLaVA's form. No torch here.

    {"question_id": 7, "image": "bus.jpg", "text": "What is it?"}
    {"question_id": 7, "prompt": "What is it?", "text": "A bus.", "answer_id": ..., "model_id": ...}
"""
import fcntl
import json
import os
import uuid
from collections import Counter
from functools import cache

from tqdm import tqdm

from parts.files import read_json, read_lines, typed_fields, write_lines
from parts.pictures import check_image, image_path, load_image
from parts.records import image_names
from parts.scoring import check_ids, id_of


def read_questions(path, folder):
    """The records of a file of questions, whose pictures are in `folder`.

    Raises ValueError with file, index, id and what is wrong, before any question is asked.
    """
    questions = list(read_json(path))
    check = cache(check_image)           # many questions can show one picture
    for i, question in enumerate(questions):
        where = f"{path}[{i}]"
        where = f"{where} (id {id_of(question, 'question_id', where)})"
        typed_fields(question, where, text=str)
        try:
            for name in image_names(question):
                check(folder, name)
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
    if not questions:
        raise ValueError(f"{path}: no question is in it")
    return questions


class AnswerFile:
    """The answers of one model to a file of questions; an unfinished one is resumed.

    questions, path    files: what is asked, and what is written
    folder, model      folders: of the questions' pictures, and of the checkpoint
    Raises ValueError for a file that holds anything else, or that another process is writing.
    """

    def __init__(self, questions, folder, path, model):
        self.path = path
        self.questions = read_questions(questions, folder)
        self.folder = folder
        self.model_id = os.path.basename(os.path.normpath(model))
        self.file = open(path, "a", encoding="utf-8")
        try:                             # the system drops this lock with the process
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = os.path.samestat(os.fstat(self.file.fileno()), os.stat(path))
        except BlockingIOError:
            is_free = False
        if not is_free:                  # or it was finished, and so replaced, just now
            raise ValueError(f"{path}: another process is writing it; wait for it, or name another "
                             "file")
        self.answers = self.read()
        self.left = self.unanswered()
        read_lines(path, repair=True)    # a kill may have torn the last line

    def read(self):
        """What an earlier run left."""
        answers = read_lines(self.path)
        for i, record in enumerate(answers):
            where = f"{self.path} is not an answers file; name another file: record {i}"
            id_of(record, "question_id", where)
            typed_fields(record, where, prompt=str, text=str, model_id=str)
            if record["model_id"] != self.model_id:
                raise ValueError(f"{self.path} holds answers of {record['model_id']}, not of "
                                 f"{self.model_id}; name another file")
        if not answers and os.path.getsize(self.path) > 0:
            raise ValueError(f"{self.path} holds no answer; remove it, or name another file")
        return answers

    def unanswered(self):
        answered = [answer_key(record) for record in self.answers]
        check_ids(self.path, answered, map(question_key, self.questions), partial=True)
        done = Counter(answered)
        left = []
        for question in self.questions:
            done[question_key(question)] -= 1
            if done[question_key(question)] < 0:
                left.append(question)
        return sorted(left, key=likeness)

    def batches(self, size):
        """Yield the questions without an answer, some at a time, with "pictures" (PIL) added.

        Neighbours are alike; a picture of several questions is loaded once.
        """
        with tqdm(total=len(self.questions), initial=len(self.answers), disable=None) as bar:
            for start in range(0, len(self.left), size):
                part = self.left[start:start + size]
                load = cache(load_image)
                batch = []
                for question in part:
                    paths = [image_path(self.folder, name) for name in image_names(question)]
                    batch.append(question | {"pictures": [load(path) for path in paths]})
                yield batch
                bar.update(len(part))

    def write(self, questions, texts):
        """Append the answers to some questions."""
        for question, text in zip(questions, texts, strict=True):
            record = {"question_id": question["question_id"], "prompt": question["text"],
                      "text": text, "answer_id": uuid.uuid4().hex, "model_id": self.model_id,
                      "metadata": {}}
            self.answers.append(record)
            self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def finish(self):
        """Put the answers in the questions' order."""
        place = {question_key(question): i for i, question in enumerate(self.questions)}
        self.answers.sort(key=lambda record: place[answer_key(record)])
        write_lines(self.path, self.answers)
        self.file.close()
        print(f"{len(self.answers)} answers in {self.path}")


def question_key(question):
    return question["question_id"], question["text"]     # MME asks two questions under one id


def answer_key(record):
    return record["question_id"], record["prompt"]


def likeness(question):
    """Sorted by it, a batch shares its pictures and is padded by about 16 tokens at most."""
    names = image_names(question)
    return len(names), len(question["text"]) // 64, names, len(question["text"])
