"""
The whole paper in one file: *Visual Instruction Tuning* (arXiv 2304.08485v2), on a laptop, in
minutes, with torch alone. In shapes: B samples, T words of each, V words there are.

    python toy/nano.py [seed]

    0  drawn pictures, captions and questions, in the place of COCO and GPT-4
    1  a vision tower g learns which caption belongs to which picture, as CLIP did
    2  a language model f_phi learns to write from notes, without a picture or a question
    3  stage 1: W alone learns to put pictures where the notes were        theta = {W}
    4  stage 2: W and f_phi learn to answer questions                      theta = {W, phi}
    5  held-out pictures: with them, without them, and what stage 1 alone would have said

             X_v --g--> Z_v --W--> H_v --,
                                          >-- f_phi --> X_a               Fig. 1
             X_q -----embedding---> H_q -'
"""
import math
import random
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.1, 0.2, 0.9),
    "yellow": (0.9, 0.9, 0.1),
    "black": (0.0, 0.0, 0.0),
}
SHAPES = ("circle", "square", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")
GRID = 4                             # patches on a side of the picture
PATCH = 12                           # pixels on a side of a patch
N = GRID ** 2                        # 16 visual tokens
S = GRID * PATCH                     # 48 pixels
D_v = 64                             # width of g
D = 128                              # width of f_phi
LAYER = dict(nhead=4, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
IGNORE = -100                        # label of a word that is not scored
IMAGE, STOP = "<image>", "###"
DESCRIBE = "describe the picture ."
WORDS = f"""{STOP} {IMAGE} human : assistant {DESCRIBE} what colour shape is a at where , ?
    top bottom left right blank""".split()
WORDS += [*COLOURS, *SHAPES]
ID = {word: i for i, word in enumerate(WORDS)}


def ids_of(text):
    return [ID[word] for word in text.split()]


def random_scene():
    """0. One to three things: [(colour, shape, number of its patch), ...]."""
    n = random.randint(1, 3)
    things = random.sample(list(COLOURS), n), random.sample(SHAPES, n), random.sample(range(N), n)
    return list(zip(*things, strict=True))


def inside_of(shape, x, y):
    if shape == "circle":
        return x ** 2 + y ** 2 < 25
    if shape == "square":
        return (x.abs() < 4.5) & (y.abs() < 4.5)
    return (y < 4.5) & (y > 2 * x.abs() - 4.5)                            # a triangle


def paint(scene):
    """X_v: the picture of a scene, (3, S, S). Things lie about the middle of their patch."""
    X_v = 0.15 * torch.randn(3, S, S)
    for colour, shape, patch in scene:
        row, column = divmod(patch, GRID)
        y = torch.arange(S)[:, None] - (row + 0.5) * PATCH - random.uniform(-2, 2)
        x = torch.arange(S)[None, :] - (column + 0.5) * PATCH - random.uniform(-2, 2)
        rgb = torch.tensor(COLOURS[colour])
        X_v[:, inside_of(shape, x, y)] = 3 * (rgb[:, None] - 0.8)         # the ground, 0.8, is 0
    return X_v


def place_of(patch):
    row, column = divmod(patch, GRID)
    return PLACES[2 * (row >= GRID // 2) + (column >= GRID // 2)]


def caption_of(scene):
    things = [f"a {colour} {shape} at the {place_of(patch)}" for colour, shape, patch in scene]
    return " , ".join(things)


def ask_about(scene):
    """(X_q, X_a): one thing that can be asked of a scene."""
    colour, shape, patch = random.choice(scene)
    return random.choice([
        (f"what colour is the {shape} ?", f"the {shape} is {colour} ."),
        (f"what shape is {colour} ?", f"the {colour} shape is a {shape} ."),
        (f"where is the {shape} ?", f"the {shape} is at the {place_of(patch)} ."),
    ])


def notes_of(scene):
    """What f_phi reads before it ever sees: for each patch two words on what is there, (N, 2)."""
    notes = torch.full((N, 2), ID["blank"])
    for colour, shape, patch in scene:
        notes[patch] = torch.tensor([ID[colour], ID[shape]])
    return notes


def to_ids(X_q, X_a):
    """(input_ids, labels) of "human : <image> X_q assistant : X_a ###", Table 2 in short.

    X_a and ### are scored. Eq. (2): the picture stands before or after the question, at random.
    """
    asked = [" ".join([IMAGE] * N), X_q]
    random.shuffle(asked)
    prompt = ids_of(f"human : {' '.join(asked)} assistant :")
    answer = ids_of(f"{X_a} {STOP}")
    return torch.tensor(prompt + answer), torch.tensor([IGNORE] * len(prompt) + answer)


class TinyTower(nn.Module):
    """g: a vector for each patch of a picture. Z_v comes from before its last layer."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, D_v, PATCH, stride=PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(N, D_v))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(D_v, dim_feedforward=4 * D_v, **LAYER) for _ in range(3))

    def forward(self, X_v, n_layers=2):
        h = self.patches(X_v).flatten(2).transpose(1, 2) + self.position  # (B, N, D_v)
        for layer in self.layers[:n_layers]:
            h = layer(h)
        return h                                                          # (B, N, D_v)


class TinyLM(nn.Module):
    """f_phi: a hidden state for each word; no word sees a later one. The head names the next."""

    def __init__(self, n_layers=4):
        super().__init__()
        self.embed = nn.Embedding(len(WORDS), D)
        self.position = nn.Parameter(0.02 * torch.randn(64, D))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(D, dim_feedforward=4 * D, **LAYER) for _ in range(n_layers))
        self.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, len(WORDS)))

    def forward(self, H):
        T = H.shape[1]
        later = nn.Transformer.generate_square_subsequent_mask(T)         # (T, T)
        h = H + self.position[:T]                                         # (B, T, D)
        for layer in self.layers:
            h = layer(h, src_mask=later, is_causal=True)
        return h                                                          # (B, T, D)


class TinyLLaVA(nn.Module):

    def __init__(self, g, f_phi):
        super().__init__()
        self.g = g
        self.f_phi = f_phi
        self.W = nn.Linear(D_v, D)

    def encode_images(self, X_v):
        with torch.no_grad():                                             # g is frozen
            Z_v = self.g(X_v)                                             # (B, N, D_v)
        return self.W(Z_v)                                                # H_v (B, N, D)  Eq. (1)


def logits_of(f_phi, input_ids, H_v):
    """Of the word behind each one, (B, T, V); H_v stands where the placeholders are."""
    H_q = f_phi.embed(input_ids)                                          # (B, T, D)
    is_image = input_ids == ID[IMAGE]                                     # (B, T)
    H = H_q.masked_scatter(is_image[..., None], H_v)                      # (B, T, D)
    return f_phi.head(f_phi(H))                                           # (B, T, V)


@torch.no_grad()
def answer_to(model, X_q, X_v):
    """X_a, word by word, each time the likeliest."""
    H_v = model.encode_images(X_v[None])                                  # (1, N, D)
    ids = ids_of(f"human : {' '.join([IMAGE] * N)} {X_q} assistant :")
    X_a = []
    for _ in range(20):
        logits = logits_of(model.f_phi, torch.tensor([ids]), H_v)         # (1, T, V)
        ids.append(logits[0, -1].argmax().item())
        if ids[-1] == ID[STOP]:
            break
        X_a.append(WORDS[ids[-1]])
    return " ".join(X_a)


def percent_exact(model, pairs, X_v):
    """Percent of answers that are right, word for word."""
    n_right = 0
    for (X_q, X_a), picture in zip(pairs, X_v, strict=True):
        n_right += answer_to(model, X_q, picture) == X_a
    return 100 * n_right / len(pairs)


def minimise(name, model, loss_of, steps, lr):
    """AdamW by the paper's schedule: 3% of warm-up, then a cosine to 0."""
    theta = [p for p in model.parameters() if p.requires_grad]
    print(f"{name}: {sum(p.numel() for p in theta):,} parameters train")
    optimizer = torch.optim.AdamW(theta, lr, weight_decay=0.0)
    angles = torch.linspace(0, torch.pi, steps).tolist()
    for step, angle in enumerate(angles):
        warmth = min(1, (step + 1) / (0.03 * steps))
        optimizer.param_groups[0]["lr"] = lr * warmth * (1 + math.cos(angle)) / 2
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 4) == 0 or step == steps - 1:
            print(f"  step {step:4d}: loss {loss.item():.3f}")


def learn_to_see(scenes, X_v, steps=300):
    """1. g beside a reader of captions: each picture of a batch finds its caption, as in CLIP."""
    g = TinyTower()
    reader = TinyLM(n_layers=2)
    of_picture = nn.Linear(D_v, D)

    def loss_of():
        batch = random.sample(range(len(scenes)), 64)
        captions = [torch.tensor(ids_of(f"{caption_of(scenes[i])} {STOP}")) for i in batch]
        ends = [len(ids) - 1 for ids in captions]                         # where ### stands
        H = reader.embed(pad_sequence(captions, batch_first=True))        # (64, T, D)
        h = reader(H)[range(64), ends]                                    # (64, D)
        Z = g(X_v[batch], n_layers=3).mean(1)                             # (64, D_v)
        logits = 20 * F.cosine_similarity(of_picture(Z)[:, None], h[None], dim=-1)   # (64, 64)
        right = torch.arange(64)
        return F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)

    minimise("vision tower", nn.ModuleList([g, reader, of_picture]), loss_of, steps, 1e-3)
    return g


def learn_to_answer(phase, model, scenes, X_v, steps, lr):
    """2. Captions and statements from notes. 3. Captions of pictures. 4. Questions about them."""
    model.requires_grad_(False)
    model.W.requires_grad_(phase != "notes")
    model.f_phi.requires_grad_(phase != "stage 1")

    def pair_of(scene):
        X_q, X_a = ask_about(scene)
        if phase == "stage 2":
            return X_q, X_a
        if phase == "notes" and random.random() < 0.7:
            return DESCRIBE, X_a                                          # without its question
        return DESCRIBE, caption_of(scene)

    def loss_of():
        batch = random.choices(range(len(scenes)), k=64)
        if phase == "notes":
            notes = torch.stack([notes_of(scenes[i]) for i in batch])     # (B, N, 2)
            H_v = model.f_phi.embed(notes).sum(2)                         # (B, N, D)
        else:
            H_v = model.encode_images(X_v[batch])                         # (B, N, D)
        samples = [to_ids(*pair_of(scenes[i])) for i in batch]
        input_ids, labels = zip(*samples, strict=True)
        input_ids = pad_sequence(input_ids, batch_first=True)             # (B, T)
        labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE)
        logits = logits_of(model.f_phi, input_ids, H_v)[:, :-1]           # word t + 1 from word t
        # -log p(X_a | X_v, X_instruct) of a scored word, Eq. (3)
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)

    minimise(phase, model, loss_of, steps, lr)


def main(seed=0):
    torch.manual_seed(seed)
    random.seed(seed)
    scenes = [random_scene() for _ in range(4000)]
    held_out = [random_scene() for _ in range(500)]
    held_out = [scene for scene in held_out if scene not in scenes]
    X_v = torch.stack([paint(scene) for scene in scenes])
    X_new = torch.stack([paint(scene) for scene in held_out])
    pairs = [ask_about(scene) for scene in held_out]

    model = TinyLLaVA(learn_to_see(scenes, X_v), TinyLM())
    learn_to_answer("notes", model, scenes, X_v, steps=500, lr=1e-3)
    learn_to_answer("stage 1", model, scenes, X_v, steps=200, lr=3e-3)
    captioner = percent_exact(model, pairs, X_new)
    learn_to_answer("stage 2", model, scenes, X_v, steps=1000, lr=1e-3)
    seen = percent_exact(model, pairs, X_new)
    blind = percent_exact(model, pairs, torch.zeros_like(X_new))
    for scene, (X_q, _), picture in zip(held_out[:4], pairs, X_new, strict=False):
        print(f"  {caption_of(scene)}: {X_q} -> {answer_to(model, X_q, picture)}")
    print(f"{len(pairs)} questions about held-out pictures, right in percent: {seen:.1f}; "
          f"blind {blind:.1f}; after stage 1 alone {captioner:.1f}")
    return seen, blind, captioner


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
