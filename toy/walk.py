# %% [markdown]
# # A walk: one conversation, from its JSON line to the gradient of W
#
# For those who read with a pencil. Each station prints the real tensors of one toy sample, by the
# project's own functions; change a line and look again. The paper is *Visual Instruction Tuning*,
# arXiv 2304.08485v2. The parts are the toy's pretrained ones, and W is random: no stage has been
# trained yet. It starts in the root of the project.

# %%
import random

import torch

from data import arrange, collate, encode, render, sample_of, show
from model import LLaVA
from parts.files import IGNORE
from parts.templates import TEMPLATES
from parts.views import set_view, view_of
from toy.world import Scene, Thing, draw_scene

torch.manual_seed(0)
torch.set_printoptions(precision=2, sci_mode=False, linewidth=88)

# %% [markdown]
# ## The picture and its JSON line
#
# A red circle at the top left and a blue star below it, on 64 x 64 pixels. What is asked about it
# is one record in the format of the released data.

# %%
circle = Thing("red", "circle", box=(2, 2, 12, 12))
star = Thing("blue", "star", box=(18, 34, 13, 13))
picture = draw_scene(Scene((circle, star)))
record = {
    "id": "walk",
    "image": "walk.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat colour is the star?"},
        {"from": "gpt", "value": "The star is blue."},
    ],
}
print("the picture:", picture.size, picture.mode)
print("the pixel in the middle of the star:", picture.getpixel((24, 41)))

# %% [markdown]
# ## Eq. (2): the picture before or after the question
#
# `data.arrange` draws it anew in each epoch.

# %%
for seed in (0, 1):
    turns = arrange(record["conversations"], "random", random.Random(seed))
    print(repr(turns[0]["value"]))

# %% [markdown]
# ## Table 2: the turns as one text, in pieces
#
# `data.render` says of each piece whether it is scored. Only the answer and its STOP are.

# %%
turns = arrange(record["conversations"], "first", random.Random(0))
template = TEMPLATES["llava_v0"]
for text, scored in render(turns, template):
    print(f"scored {scored!s:5}  {text!r}")

# %% [markdown]
# ## Ids and labels
#
# The picture has 4 x 4 patches of 16 pixels, so `<image>` becomes N = 16 placeholders.
# `data.encode` appends ids and labels together. A label is the id where it is scored, and -100
# where it is not.

# %%
model = LLaVA.from_parts("toy/pretrained/clip", "toy/pretrained/llm")
view = set_view(model, "crop")
ids, labels = encode(render(turns, template), model.tokenizer, [view.N])
n_scored = sum(label != IGNORE for label in labels)
print(len(ids), "ids,", n_scored, "of them scored; the last eight:")
words = model.tokenizer.convert_ids_to_tokens(ids)
for place in range(len(ids) - 8, len(ids)):
    print(f"id {ids[place]:4}  label {labels[place]:4}  {words[place]!r}")
print(show(ids, labels, model.tokenizer))

# %% [markdown]
# ## A batch: X_v, `visual_index` and `answer_index`
#
# `data.collate` makes pixels of the picture, normalised as CLIP wants them. `visual_index` says
# which row of H_v each placeholder gets; for one square these are 0, 1, 2, ... `answer_index` says
# where the scored tokens stand.

# %%
sample = sample_of(turns, [("walk.png", picture)], model.tokenizer, template, view)
batch = collate([sample], view)
for name in ("input_ids", "labels", "X_v", "visual_index", "answer_index"):
    print(f"{name:13} {tuple(batch[name].shape)}")
print("visual_index", batch["visual_index"].tolist())
print("answer_index", batch["answer_index"].tolist())
print("X_v, red channel, top left corner of the picture:")
print(batch["X_v"][0, 0, :6, :6])

# %% [markdown]
# ## Eq. (1): H_v = W Z_v, with Z_v = g(X_v)
#
# g is CLIP, frozen. Z_v has a row for each patch. Patches of plain paper are alike, and those with
# a thing on them are not. W brings the width of g to that of f_phi.

# %%
X_v = batch["X_v"]
H_v = model.encode_images(X_v)
print("X_v", tuple(X_v.shape))
print("W", tuple(model.W.weight.shape))
print("H_v", tuple(H_v.shape))
directions = torch.nn.functional.normalize(H_v[0], dim=-1)
likeness = directions @ directions[3]
print("how much the 16 patches look like the one at the top right, as g and W have it (cosine):")
print(likeness.view(4, 4).detach())

# %% [markdown]
# ## The splice: H_v where the placeholders stand
#
# Words keep their embeddings, and each placeholder's is replaced by its row of H_v. The lengths of
# the vectors show where words end and visual tokens begin.

# %%
H = model.splice(batch["input_ids"], X_v, batch["visual_index"])
is_image = batch["input_ids"][0] == model.image_id
first = is_image.nonzero()[0].item()
print("H", tuple(H.shape))
print("the first placeholder is at", first)
print("H there is H_v:", torch.equal(H[0, is_image], H_v[0]))
around = H[0, first - 3:first + 3]
print("lengths around it:", around.norm(dim=-1).detach())

# %% [markdown]
# ## Eq. (3): the likelihood of the answer
#
# f_phi reads H from left to right. The state at each place predicts the next token, and only those
# that predict a token of the answer get logits. This language model was pretrained on the toy's
# answers, so it knows how one sounds; the colour, which only the picture tells, is what costs.

# %%
inputs = {name: batch[name] for name in ("input_ids", "answer_index", "X_v", "visual_index")}
h, targets = model.answer_states(**inputs)
nll = model.answer_nll(h, targets)
print("h", tuple(h.shape))
print("targets", tuple(targets.shape))
answer = model.tokenizer.convert_ids_to_tokens(targets.tolist())
for word, cost in zip(answer, nll.tolist(), strict=True):
    print(f"-log p = {cost:5.2f}   {word!r}")
loss, n_answer = model(**inputs)
print(f"the loss: {loss.item():.2f} over", n_answer, "tokens")

# %% [markdown]
# ## Stage 1: the gradient reaches W, and W alone
#
# theta = {W}. One step against the gradient lowers the loss of this sample.

# %%
theta = model.set_stage(1)
loss, n_answer = model(**inputs)
(loss / n_answer).backward()
for name, parameter in theta.items():
    length = parameter.grad.norm()
    print(f"{name}: length of its gradient {length:.2f}")
for name, parameter in model.named_parameters():
    if name not in theta and parameter.grad is not None:
        print(name, "has a gradient, too")
with torch.no_grad():
    for parameter in theta.values():
        parameter -= 0.05 * parameter.grad
after, _ = model(**inputs)
print(f"the loss: {loss.item():.2f} before, {after.item():.2f} after one step")

# %% [markdown]
# ## A picture in tiles
#
# LLaVA-NeXT (Diss. Sec. 4.7) sees a larger picture as several squares. Here is one of 1024 x 899
# pixels by the released grid: its canvas, the squares, and what becomes of them. The placeholders
# are as many as the tokens, and -1 in `visual_index` is the learned vector that ends a row.

# %%
next_view = view_of("anyres")
plan = next_view.tiling.plan(1024, 899)
index = next_view.index(1024, 899)
ends = index == -1
print("canvas:", plan.canvas)
print("the picture on it:", plan.scaled, "at", plan.offset)
print("grid of tiles:", plan.grid)
print("squares that g encodes:", plan.pictures)
print("placeholders:", len(index))
print("of them ends of rows:", ends.sum().item())
print("the last row of the map starts with", index[-49:-45].tolist())
print("and ends with", index[-3:].tolist())
