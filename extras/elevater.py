"""
A list of data sets to classify, in the shape of ELEVATER, which has 20 (Diss. Table 2.2).

    [{"name": "pets", "train": "pets/train.tsv", "test": "pets/test.tsv", "images": "pets/images",
      "classes": "pets/classes.txt", "templates": "pets/templates.txt"}, ...]

Train and test parts are corpora, as extras/retrieve.py reads them, whose texts are class names.
Paths start at the list's own folder; names in a .tsv or .json start at `images`, if there is one.
`python -m extras.react_eval` compares CLIPs on such a list.
"""
import re
from pathlib import Path
from typing import NamedTuple

import torch

from extras.retrieve import left_out_report, read_pairs, read_templates, read_terms
from parts.files import read_json, typed, typed_fields


class Task(NamedTuple):
    """A data set to classify: pairs of a picture and its class name, and numbers of classes."""
    name: str
    classes: list
    templates: list
    test: list
    y_test: torch.Tensor
    train: list = ()
    y_train: torch.Tensor = None


def read_all(sources, images):
    """The pairs of a corpus. Raises ValueError if one of them cannot be read."""
    left_out = []
    pairs = list(read_pairs(sources, images, left_out))
    if left_out or not pairs:
        raise ValueError(f"{', '.join(sources)}: {len(pairs)} pairs; what is evaluated must be "
                         f"complete: {left_out_report(left_out)}")
    return pairs


def check_apart(train, test):
    """Raises ValueError if a picture to test on is one to learn from, too."""
    both = {pair.where for pair in train} & {pair.where for pair in test}
    if both:
        raise ValueError(f"{len(both)} pictures to test on are among those to learn from, e.g. "
                         f"{min(both)}")


def read_labelled(source, images, classes):
    """(pairs, y (pairs,)) of a part, y the numbers of class names. ValueError for other names."""
    pairs = read_all([source], images)
    number = {name: c for c, name in enumerate(classes)}
    unknown = sorted({pair.text for pair in pairs} - set(classes))
    if unknown:
        raise ValueError(f"{source}: {len(unknown)} class names of the pictures are not among the "
                         f"classes, e.g. {unknown[:3]}")
    return pairs, torch.tensor([number[pair.text] for pair in pairs])


def choose_shots(y, shots, seed):
    """Which examples are learnt from, a tensor of indices: of each class so many ("5"), a share
    ("1%", but one at the least), or "all"."""
    if not re.fullmatch(r"[1-9]\d*%?|all", shots):
        raise ValueError(f"--shots {shots}: a number of pictures a class is needed, as 5, a share "
                         "of them, as 1%, or all")
    if shots == "all":
        return torch.arange(len(y))
    number = int(shots.rstrip("%"))
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for c in y.unique():
        members = (y == c).nonzero().flatten()
        n = number
        if shots.endswith("%"):
            n = max(1, round(number / 100 * len(members)))
        order = torch.randperm(len(members), generator=generator)
        chosen.append(members[order[:n]])
    return torch.cat(chosen)


def read_task(row, where, folder, shots, seed):
    """The data set of one record of a list, which lies in `folder`; without `shots`, to test on."""
    row = {"images": "."} | typed(row, dict, where)
    keys = ["test", "classes", "templates", "images"]
    if shots:
        keys.append("train")
    typed_fields(row, where, **dict.fromkeys([*keys, "name"], str))
    files = {key: str(folder / row[key]) for key in keys}
    classes = read_terms(files["classes"], "class names")
    test, y_test = read_labelled(files["test"], files["images"], classes)
    task = Task(row["name"], classes, read_templates(files["templates"]), test, y_test)
    note = f"{task.name}: {len(test):,} pictures to test on, {len(classes)} classes"
    if shots:
        train, y = read_labelled(files["train"], files["images"], classes)
        check_apart(train, test)
        chosen = choose_shots(y, shots, seed)
        task = task._replace(train=[train[i] for i in chosen], y_train=y[chosen])
        note += (f"; {len(chosen):,} of {len(train):,} pictures to learn from, of "
                 f"{len(y.unique())} classes")
    print(note)
    return task


def read_datasets(path, shots=None, seed=0):
    """The tasks of a list, with the examples of `shots` to learn from, or without any."""
    folder = Path(path).parent
    tasks = [read_task(row, f"{path}[{i}]", folder, shots, seed)
             for i, row in enumerate(read_json(path))]
    names = [task.name for task in tasks]
    if not names or len({*names, "mean"}) <= len(names):
        raise ValueError(f"{path}: data sets {names}; one or more are needed, each with a name of "
                         "its own, and none called mean")
    return tasks
