"""
The whole paper in one file: *Visual Instruction Tuning* (arXiv 2304.08485v2), on a laptop, in
minutes. It needs torch alone, downloads nothing, and imports nothing of this project.

    python toy/nano.py [seed]

    0  drawn pictures, captions and questions, in the place of COCO and GPT-4
    1  a vision tower g learns which caption belongs to which picture, as CLIP did
    2  a language model f_phi learns to write from notes; it sees no picture and reads no question
    3  stage 1: W alone learns to put pictures where the notes were        theta = {W}
    4  stage 2: W and f_phi learn to answer questions                      theta = {W, phi}
    5  held-out pictures: with them, without them, and what stage 1 alone would have said

             X_v --g--> Z_v --W--> H_v --,
                                          >-- f_phi --> X_a               Fig. 1
             X_q -----embedding---> H_q -'

Letters in shape comments: B samples, T words of each, N = 16 visual tokens, D_v width of g, D of
f_phi, V words there are.
"""
import random
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.1, 0.2, 0.9),
    "yellow": (0.9, 0.9, 0.1),
    "purple": (0.6, 0.1, 0.7),
    "black": (0.0, 0.0, 0.0),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three")
DESCRIBE = "describe the picture ."
GRID = 4                             # patches on a side of the picture
PATCH = 12                           # pixels on a side of a patch
N = GRID ** 2                        # 16 visual tokens
S = GRID * PATCH                     # 48 pixels
PAPER = 0.8                          # the grey of the background
D_v = 64
D = 128
IGNORE = -100                        # label of a word that is not scored
IMAGE, STOP, PAD = "<image>", "###", "<pad>"
OTHER_WORDS = ("human : assistant describe the picture . what colour shape is it a an where how "
               "many things are there of yes no at , only blank ?")
WORDS = list(dict.fromkeys([PAD, STOP, IMAGE, *OTHER_WORDS.split(), *COLOURS, *SHAPES,
                            *" ".join(PLACES).split(), *NUMBERS]))
ID = {word: i for i, word in enumerate(WORDS)}


# -----------------------------------------------------------------------------
# 0. The world. A scene is one to three things: [(colour, shape, (row, column) of its patch), ...].


def random_scene(rng):
    n = rng.randint(1, 3)
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    chosen = rng.sample(cells, n)
    colours = rng.sample(list(COLOURS), n)
    shapes = rng.sample(SHAPES, n)
    return list(zip(colours, shapes, chosen, strict=True))


def inside_of(shape, x, y):
    """Which pixels lie in a shape; x and y are their distances from its middle."""
    if shape == "circle":
        return x ** 2 + y ** 2 < 25
    if shape == "square":
        return (x.abs() < 4.5) & (y.abs() < 4.5)
    if shape == "triangle":
        return (y < 4.5) & (y > 2 * x.abs() - 4.5)
    upright = (x.abs() < 1.6) & (y.abs() < 5)
    across = (y.abs() < 1.6) & (x.abs() < 5)
    return upright | across


def paint(scene, rng):
    """X_v: the picture of a scene, (3, S, S), with some noise; the paper's grey is 0.

    Things lie a little beside the middle of a patch.
    """
    X_v = 0.15 * torch.randn(3, S, S)
    for colour, shape, (row, column) in scene:
        y = torch.arange(S)[:, None] - (row + 0.5) * PATCH - rng.uniform(-2, 2)
        x = torch.arange(S)[None, :] - (column + 0.5) * PATCH - rng.uniform(-2, 2)
        rgb = torch.tensor(COLOURS[colour])
        X_v[:, inside_of(shape, x, y)] = 3 * (rgb[:, None] - PAPER)
    return X_v


def place_of(cell):
    row, column = cell
    return PLACES[2 * (row >= GRID // 2) + (column >= GRID // 2)]


def caption_of(scene):
    things = []
    for colour, shape, cell in scene:
        things.append(f"a {colour} {shape} at the {place_of(cell)}")
    return " , ".join(things)


def ask_about(scene, rng):
    """(X_q, X_a): one thing that can be asked of a scene."""
    colour, shape, cell = rng.choice(scene)
    other = (rng.choice(list(COLOURS)), rng.choice(SHAPES))
    asked = rng.choice([(colour, shape), other])
    is_there = asked in [thing[:2] for thing in scene]
    pairs = [
        (f"what colour is the {shape} ?", f"the {shape} is {colour} ."),
        (f"what shape is {colour} ?", f"the {colour} shape is a {shape} ."),
        (f"where is the {shape} ?", f"the {shape} is at the {place_of(cell)} ."),
        ("how many things are there ?", f"there are {NUMBERS[len(scene)]} things ."),
        (f"is there a {asked[0]} {asked[1]} ?", "yes ." if is_there else "no ."),
    ]
    return rng.choice(pairs)


def notes_of(scene):
    """What f_phi reads before it ever sees: for each patch two words on what is there, (N, 2)."""
    notes = torch.full((N, 2), ID["blank"])
    for colour, shape, (row, column) in scene:
        notes[GRID * row + column] = torch.tensor([ID[colour], ID[shape]])
    return notes


# -----------------------------------------------------------------------------
# From words to ids and labels


def to_ids(X_q, X_a, rng):
    """(input_ids, labels) of "human : <image> X_q assistant : X_a ###", Table 2 in short.

    X_a and ### are scored. Eq. (2): the picture stands before or after the question, at random.
    """
    asked = [" ".join([IMAGE] * N), X_q]
    if rng.random() < 0.5:
        asked.reverse()
    prompt = f"human : {asked[0]} {asked[1]} assistant :"
    prompt_ids = [ID[word] for word in prompt.split()]
    answer_ids = [ID[word] for word in f"{X_a} {STOP}".split()]
    return prompt_ids + answer_ids, [IGNORE] * len(prompt_ids) + answer_ids


def pad_batch(samples):
    """[(ids, labels), ...] -> input_ids (B, T), labels (B, T), padded on the right."""
    T = max(len(ids) for ids, _ in samples)
    input_ids = []
    labels = []
    for ids, scored in samples:
        input_ids.append(ids + [ID[PAD]] * (T - len(ids)))
        labels.append(scored + [IGNORE] * (T - len(scored)))
    return torch.tensor(input_ids), torch.tensor(labels)


# -----------------------------------------------------------------------------
# The networks


class Block(nn.Module):
    """One layer of a transformer; in a causal one, no word sees a later one."""

    def __init__(self, width, causal):
        super().__init__()
        self.causal = causal
        self.norm_1 = nn.LayerNorm(width)
        self.norm_2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, h):                                                 # (B, T, width)
        qkv = self.qkv(self.norm_1(h))                                    # (B, T, 3 width)
        heads = qkv.unflatten(-1, (3, 4, -1))                             # (B, T, 3, 4, width / 4)
        q, k, v = heads.permute(2, 0, 3, 1, 4)                            # (B, 4, T, width / 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        h = h + self.out(a.transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm_2(h))


class TinyTower(nn.Module):
    """g: a vector for each patch of a picture. Z_v comes from before its last layer."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, D_v, PATCH, stride=PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(N, D_v))
        self.layers = nn.ModuleList(Block(D_v, causal=False) for _ in range(3))

    def forward(self, X_v, n_layers=2):
        h = self.patches(X_v).flatten(2).transpose(1, 2)                  # (B, N, D_v)
        h = h + self.position
        for layer in self.layers[:n_layers]:
            h = layer(h)
        return h                                                          # (B, N, D_v)


class TinyLM(nn.Module):
    """f_phi: embeddings in, logits of the next word out."""

    def __init__(self, n_layers=4):
        super().__init__()
        self.embed = nn.Embedding(len(WORDS), D)
        self.position = nn.Parameter(0.02 * torch.randn(64, D))
        blocks = [Block(D, causal=True) for _ in range(n_layers)]
        self.layers = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, len(WORDS)))

    def states(self, H):
        T = H.shape[1]
        return self.layers(H + self.position[:T])                         # (B, T, D)

    def forward(self, H):
        return self.head(self.states(H))                                  # (B, T, V)


class TinyLLaVA(nn.Module):

    def __init__(self, g, f_phi):
        super().__init__()
        self.g = g
        self.f_phi = f_phi
        self.W = nn.Linear(D_v, D)

    def encode_images(self, X_v):
        with torch.no_grad():                                             # g is frozen
            Z_v = self.g(X_v)                                             # (B, N, D_v)
        H_v = self.W(Z_v)                                                 # (B, N, D)   Eq. (1)
        return H_v

    def set_stage(self, stage):
        """theta: W in stage 1, W and f_phi in stage 2."""
        self.requires_grad_(False)
        self.W.requires_grad_(True)
        self.f_phi.requires_grad_(stage == 2)
        return [p for p in self.parameters() if p.requires_grad]


def splice_in(f_phi, input_ids, H_v):
    """Word embeddings, with H_v where the placeholders stand: (B, T, D)."""
    H_q = f_phi.embed(input_ids)                                          # (B, T, D)
    is_image = input_ids == ID[IMAGE]                                     # (B, T)
    return H_q.masked_scatter(is_image[..., None], H_v)


def answer_loss(f_phi, input_ids, labels, H_v):
    """-log p(X_a | X_v, X_instruct) of a scored word, Eq. (3)."""
    H = splice_in(f_phi, input_ids, H_v)                                  # (B, T, D)
    logits = f_phi(H)                                                     # (B, T, V)
    predicted = logits[:, :-1].flatten(0, 1)                              # word t + 1 from word t
    return F.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=IGNORE)


@torch.no_grad()
def answers_to(f_phi, questions, H_v, n_words=12):
    """X_a, greedy; the picture stands in front. Questions of one length are answered at once."""
    answers = [""] * len(questions)
    for T in {len(question.split()) for question in questions}:
        rows = [i for i, question in enumerate(questions) if len(question.split()) == T]
        ids = []
        for i in rows:
            prompt = f"human : {' '.join([IMAGE] * N)} {questions[i]} assistant :"
            ids.append([ID[word] for word in prompt.split()])
        ids = torch.tensor(ids)
        for _ in range(n_words):
            H = splice_in(f_phi, ids, H_v[rows])                          # (B, T, D)
            logits = f_phi(H)[:, -1]                                      # (B, V)
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        for i, row in zip(rows, ids[:, -n_words:].tolist(), strict=True):
            text = " ".join(WORDS[k] for k in row)
            answers[i] = text.split(STOP)[0].strip()
    return answers


# -----------------------------------------------------------------------------
# Training


def minimise(name, theta, loss_of, steps, lr):
    """AdamW by the paper's schedule: 3% of warm-up, then a cosine to 0."""
    optimizer = torch.optim.AdamW(theta, lr, weight_decay=0.0)
    angle = torch.linspace(0, torch.pi, steps)
    share = torch.cos(angle) / 2 + 0.5
    began = time.time()
    for step in range(steps):
        warmth = min(1, (step + 1) / (0.03 * steps))
        optimizer.param_groups[0]["lr"] = lr * float(share[step]) * warmth
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 4) == 0 or step == steps - 1:
            seconds = time.time() - began
            print(f"  {name}, step {step:4d}: loss {loss.item():.3f}, {seconds:.0f} s")


def learn_to_see(scenes, X_v, rng, steps=600):
    """1. g beside a reader of captions: each picture of a batch finds its caption, as in CLIP."""
    g = TinyTower()
    reader = TinyLM(n_layers=2)
    of_picture = nn.Linear(D_v, D)
    of_caption = nn.Linear(D, D)

    def loss_of():
        batch = rng.sample(range(len(scenes)), 64)
        captions = [[ID[word] for word in caption_of(scenes[i]).split()] for i in batch]
        input_ids, _ = pad_batch([(ids + [ID[STOP]], []) for ids in captions])
        ends = torch.tensor([len(ids) for ids in captions])               # where ### stands
        h = reader.states(reader.embed(input_ids))[range(64), ends]       # (64, D)
        Z = g(X_v[batch], n_layers=3).mean(1)                             # (64, D_v)
        u = F.normalize(of_picture(Z), dim=-1)
        v = F.normalize(of_caption(h), dim=-1)
        logits = 20 * u @ v.T                                             # (64, 64)
        right = torch.arange(64)
        return F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)

    theta = []
    for module in (g, reader, of_picture, of_caption):
        theta += module.parameters()
    minimise("vision tower", theta, loss_of, steps, 1e-3)
    return g.requires_grad_(False)


def learn_to_write(scenes, rng, steps=900):
    """2. f_phi reads notes in the picture's place, and writes captions and statements."""
    f_phi = TinyLM()

    def loss_of():
        batch = rng.choices(scenes, k=64)
        samples = []
        for scene in batch:
            words = caption_of(scene)
            if rng.random() < 0.7:
                _, words = ask_about(scene, rng)                          # the answer alone
            samples.append(to_ids(DESCRIBE, words, rng))
        notes = torch.stack([notes_of(scene) for scene in batch])         # (B, N, 2)
        H_notes = f_phi.embed(notes).sum(2)                               # (B, N, D)
        return answer_loss(f_phi, *pad_batch(samples), H_notes)

    minimise("language model", f_phi.parameters(), loss_of, steps, 1e-3)
    return f_phi


def train_stage(stage, model, scenes, X_v, rng, steps, lr):
    """3 and 4. Captions in stage 1, questions and answers in stage 2; one loss."""
    theta = model.set_stage(stage)

    def loss_of():
        batch = rng.choices(range(len(scenes)), k=64)
        samples = []
        for i in batch:
            pair = (DESCRIBE, caption_of(scenes[i]))
            if stage == 2:
                pair = ask_about(scenes[i], rng)
            samples.append(to_ids(*pair, rng))
        H_v = model.encode_images(X_v[batch])                             # (B, N, D)
        return answer_loss(model.f_phi, *pad_batch(samples), H_v)

    print(f"stage {stage}: {sum(p.numel() for p in theta):,} parameters train")
    minimise(f"stage {stage}", theta, loss_of, steps, lr)


def percent_exact(model, questions, truths, X_v):
    """(percent of answers that are right, word for word; the answers)."""
    H_v = model.encode_images(X_v)
    answers = answers_to(model.f_phi, questions, H_v)
    right = [answer == truth for answer, truth in zip(answers, truths, strict=True)]
    return 100 * sum(right) / len(right), answers


def main(seed=0):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(4000)]
    held_out = [random_scene(rng) for _ in range(700)]
    held_out = [scene for scene in held_out if scene not in scenes]
    X_v = torch.stack([paint(scene, rng) for scene in scenes])
    X_new = torch.stack([paint(scene, rng) for scene in held_out])
    questions, truths = zip(*[ask_about(scene, rng) for scene in held_out], strict=True)

    g = learn_to_see(scenes, X_v, rng)
    model = TinyLLaVA(g, learn_to_write(scenes, rng))
    train_stage(1, model, scenes, X_v, rng, steps=400, lr=3e-3)
    captioner, _ = percent_exact(model, questions, truths, X_new)
    train_stage(2, model, scenes, X_v, rng, steps=1200, lr=1e-3)
    seen, answers = percent_exact(model, questions, truths, X_new)
    blind, _ = percent_exact(model, questions, truths, torch.zeros_like(X_new))
    for i in range(4):
        print(f"  {caption_of(held_out[i])}: {questions[i]} -> {answers[i]}")
    print(f"{len(truths)} questions about held-out pictures, right in percent: {seen:.1f}; "
          f"blind {blind:.1f}; after stage 1 alone {captioner:.1f}")
    return seen, blind, captioner


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
