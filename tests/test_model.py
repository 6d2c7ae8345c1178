"""The model against the paper (Sec. 4.1, Eqs. (1) and (3)), against `transformers`, and against
slow loops."""

import ast
import io
import re
import sys
import tokenize

import numpy as np
import pytest
import torch
from conftest import answer_logits, byte_tokenizer, tiny_clip, tiny_llava, tiny_llm
from PIL import Image
from transformers import AutoModelForImageTextToText

import model as model_py
from data import collate, sample_of
from model import LLaVA, sample_id
from parts.files import IGNORE, IMAGE
from parts.templates import TEMPLATES
from parts.views import view_of

KINDS = [(family, tied) for family in ("llama", "mistral", "qwen2") for tied in (False, True)]
CHATS = [
    [f"{IMAGE}\nWhat is this?", "A red cube."],
    ["Hello?", "Yes.", "Are you sure about this?", "No."],
    [f"{IMAGE}\nAnd these?\n{IMAGE}", "Two balls.", f"{IMAGE}\nThis one?", "A cone, a green one."],
]


VIEW = view_of("crop", 28, 14)
TRAINING = ("input_ids", "answer_index", "X_v", "visual_index")
ANSWERING = ("input_ids", "attention_mask", "X_v", "visual_index")


def sample(model, turns, name="chat.json[0] (id 0)", seed=0):
    """A training sample; `turns` are question, answer, question, ... An open end is a prompt."""
    tags = sum(turn.count(IMAGE) for turn in turns)
    turns = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    pixels = np.random.default_rng(seed).integers(0, 256, (tags, 28, 28, 3), dtype=np.uint8)
    pictures = [(f"{seed}_{k}", Image.fromarray(x)) for k, x in enumerate(pixels)]
    return sample_of(turns, pictures, model.tokenizer, TEMPLATES["mistral_instruct"], VIEW, name)


def training_batch(model, chats=CHATS):
    """What forward takes, and all of the batch."""
    samples = [sample(model, turns, f"chat.json[{i}] (id {i})", i) for i, turns in enumerate(chats)]
    batch = collate(samples, VIEW)
    return {k: batch[k] for k in TRAINING}, batch


def prompt_batch(model, questions):
    samples = [sample(model, [q], seed=i) for i, q in enumerate(questions)]
    batch = collate(samples, VIEW, side="left")
    return {k: batch[k] for k in ANSWERING}


def mean_loss(model, batch):
    total, count = model(**batch)
    return total / count


@pytest.fixture(
    scope="module", params=KINDS, ids=[f"{f}-{'tied' if t else 'untied'}" for f, t in KINDS]
)
def pair(request, tmp_path_factory):
    """(ours, transformers' LlavaForConditionalGeneration from the folder that ours saved)."""
    ours, folder = tiny_llava(*request.param), tmp_path_factory.mktemp("llava")
    ours.save_pretrained(folder)
    return ours, AutoModelForImageTextToText.from_pretrained(folder).eval()


# -----------------------------------------------------------------------------
# Parity with transformers


def test_logits_loss_and_gradients_equal_those_of_transformers(pair):
    """Eq. (1), Eq. (3): text-only rows, several images and several turns, right padding; theirs
    with attention_mask."""
    ours, theirs = pair
    batch, whole = training_batch(ours)
    assert not whole["attention_mask"].all(), "the batch must be ragged, or padding is not tested"
    out = theirs(
        input_ids=batch["input_ids"],
        attention_mask=whole["attention_mask"],
        pixel_values=batch["X_v"],
        labels=whole["labels"],
    )
    logits, targets = answer_logits(ours, **batch)
    scored = whole["labels"][:, 1:] != IGNORE
    assert torch.equal(targets, whole["labels"][:, 1:][scored])
    torch.testing.assert_close(
        logits,
        out.logits[:, :-1][scored],
        atol=1e-5,
        rtol=1e-5,
        msg=lambda m: f"our forward pass is not LLaVA's as others run it:\n{m}",
    )
    ours.zero_grad(), theirs.zero_grad()
    loss = mean_loss(ours, batch)
    torch.testing.assert_close(
        loss, out.loss, atol=1e-5, rtol=1e-5, msg=lambda m: f"Eq. (3) is shifted or scaled: {m}"
    )
    loss.backward(), out.loss.backward()
    inner = theirs.model
    for name, mine, other in (
        ("W", ours.W.weight, inner.multi_modal_projector.linear_1.weight),
        ("the bias of W", ours.W.bias, inner.multi_modal_projector.linear_1.bias),
        (
            "the word embeddings",
            ours.f_phi.get_input_embeddings().weight,
            inner.language_model.embed_tokens.weight,
        ),
        ("the head", ours.f_phi.get_output_embeddings().weight, theirs.lm_head.weight),
    ):
        assert mine.grad.any(), f"no gradient reaches {name}"
        torch.testing.assert_close(
            mine.grad,
            other.grad,
            atol=1e-5,
            rtol=1e-4,
            msg=lambda m, n=name: f"gradient of {n}: {m}",
        )


# -----------------------------------------------------------------------------
# g, W and the splice


def visual_features(model, X_v):
    """What goes into W when `encode_images` runs."""
    seen = []
    hook = model.W.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.encode_images(X_v)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("feature_layer, layers", [(-2, 2), (-1, 3)])
def test_Z_v_is_the_grid_of_the_chosen_CLIP_layer_without_CLS(feature_layer, layers):
    """Sec. 4.1 "before and after the last Transformer layer", Table 8. Oracle: CLIP's layers called
    one by one."""
    model = tiny_llava(feature_layer=feature_layer)
    X_v = torch.randn(2, 3, 28, 28)
    Z_v = visual_features(model, X_v)
    assert torch.equal(
        Z_v, model.g(X_v, output_hidden_states=True).hidden_states[feature_layer][:, 1:]
    )
    with torch.no_grad():
        h = model.g.pre_layrnorm(model.g.embeddings(X_v))
        for layer in model.g.encoder.layers[:layers]:
            h = layer(h, None)
    assert Z_v.shape == (2, 4, 32), f"{tuple(Z_v.shape)}: (28 / 14)^2 = 4 tokens a picture, no CLS"
    torch.testing.assert_close(
        Z_v, h[:, 1:], msg=lambda m: f"Z_v is not the output of CLIP layer {layers} of 3: {m}"
    )
    torch.testing.assert_close(model.encode_images(X_v), Z_v @ model.W.weight.T + model.W.bias)


@pytest.mark.parametrize("feature_layer, last_layer_matters", [(-2, False), (-1, True)])
def test_what_lies_behind_the_chosen_CLIP_layer_does_not_matter(feature_layer, last_layer_matters):
    """Sec. 4.1, Table 8: at -2 CLIP's last layer is unused, its post_layernorm always."""
    model, X_v = tiny_llava(feature_layer=feature_layer), torch.randn(2, 3, 28, 28)
    before = model.encode_images(X_v)
    for part, matters in (
        (model.g.post_layernorm, False),
        (model.g.encoder.layers[-1], last_layer_matters),
    ):
        with torch.no_grad():
            for p in part.parameters():
                p.add_(torch.randn_like(p))
        changed = not torch.equal(model.encode_images(X_v), before)
        assert changed == matters, (
            f"{type(part).__name__} at {feature_layer}: H_v has changed: {changed}"
        )


def test_the_splice_equals_a_slow_loop(llava):
    """Sec. 4.1: row by row, each placeholder gets the next row of H_v, and every other id its word
    embedding."""
    batch, _ = training_batch(llava)
    H, Z_v = (
        llava.splice(batch["input_ids"], batch["X_v"], batch["visual_index"]),
        visual_features(llava, batch["X_v"]),
    )
    words, k = llava.f_phi.get_input_embeddings().weight, 0
    for row, ids in enumerate(batch["input_ids"].tolist()):
        for t, i in enumerate(ids):
            if i == llava.image_id:
                want = llava.W.weight @ Z_v[k // VIEW.N, k % VIEW.N] + llava.W.bias
                k += 1
            else:
                want = words[i]
            torch.testing.assert_close(
                H[row, t], want, msg=lambda m, at=(row, t): f"wrong embedding at {at}: {m}"
            )
    assert k == 4 * VIEW.N
    with pytest.raises(RuntimeError, match="one placeholder for each visual token"):
        llava.splice(batch["input_ids"], batch["X_v"], batch["visual_index"][1:])


def test_swapped_pictures_change_the_answer(llava):
    """Sec. 4.1: H_v of picture k lands at placeholder run k, also across rows, so order is not lost
    on the way."""
    batch, _ = training_batch(llava)
    straight, swapped = llava(**batch)[0], llava(**batch | {"X_v": batch["X_v"].flip(0)})[0]
    assert not torch.isclose(straight, swapped), "the model does not look at its pictures"


# -----------------------------------------------------------------------------
# Stages


def one_step(model, batch, theta):
    """One AdamW step on theta; returns the names of the parameters that changed, in any bit."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(theta.values(), lr=1e-2)
    mean_loss(model, batch).backward()
    optimizer.step()
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.parametrize("family, tied", KINDS)
def test_stage_1_trains_only_W(family, tied):
    """Sec. 4.2 "theta = W (the projection matrix)": after a step g and f_phi are bit-identical, and
    W has moved."""
    model = tiny_llava(family, tied)
    batch, _ = training_batch(model)
    theta = model.set_stage(1)
    assert theta.keys() == {"W.weight", "W.bias"}, f"stage 1 would train {sorted(theta)}"
    assert one_step(model, batch, theta) == {"W.weight", "W.bias"}, (
        "stage 1 changed something other than W, or not all of W"
    )


@pytest.mark.parametrize("family, tied", KINDS)
def test_stage_2_trains_W_and_f_phi_but_never_g(family, tied):
    """Sec. 4.2 "theta = {W, phi}": all of the language model moves, and CLIP keeps every bit."""
    model = tiny_llava(family, tied)
    batch, _ = training_batch(model)
    theta = model.set_stage(2)
    assert {name.split(".")[0] for name in theta} == {"W", "f_phi"}, (
        f"stage 2 would train {sorted(theta)[:5]}"
    )
    want = {n for n, _ in model.named_parameters() if not n.startswith("g.")}
    moved = one_step(model, batch, theta)
    assert moved == want, (
        f"changed but frozen: {sorted(moved - want)}; trained but unmoved: {sorted(want - moved)}"
    )


def test_stages_can_be_switched_back_and_forth(llava):
    """Sec. 4.2: what stage 1 freezes, stage 2 thaws, and the other way round."""
    assert llava.set_stage(1).keys() == {"W.weight", "W.bias"}
    thawed = llava.set_stage(2)
    assert len(thawed) == sum(not n.startswith("g.") for n, _ in llava.named_parameters())
    assert llava.set_stage(1).keys() == {"W.weight", "W.bias"}


@pytest.mark.parametrize("stage", [0, 3, None, "2", (1, 2)])
def test_there_is_no_third_stage(llava, stage):
    """Sec. 4.2 knows two stages; any other must not silently train something."""
    with pytest.raises(ValueError, match="stage"):
        llava.set_stage(stage)


@pytest.mark.parametrize("stage", [1, 2])
def test_g_gets_no_gradient_even_if_somebody_thaws_it(llava, stage):
    """Sec. 4.2 "keep the visual encoder weights frozen": no graph is recorded through CLIP (memory,
    and the claim)."""
    llava.set_stage(stage)
    llava.g.requires_grad_(True)
    batch, _ = training_batch(llava)
    mean_loss(llava, batch).backward()
    assert all(p.grad is None for p in llava.g.parameters()), "a gradient flows into CLIP"


# -----------------------------------------------------------------------------
# The loss, Eq. (3)


def test_the_loss_does_not_depend_on_padding(llava):
    """Eq. (3): ids to the right of a sample, whatever they are, change neither the sum nor the
    count."""
    batch, whole = training_batch(llava)
    total, count = llava(**batch)
    T = batch["input_ids"].shape[1]
    batch["input_ids"] = torch.where(whole["attention_mask"].bool(), batch["input_ids"], 77)
    batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 13), value=99)
    batch["answer_index"] = batch["answer_index"] + 13 * (batch["answer_index"] // T)
    padded, same = llava(**batch)
    assert same == count
    torch.testing.assert_close(padded, total, msg=lambda m: f"padding leaks into the loss: {m}")


def test_logits_in_chunks_give_the_same_loss_and_gradients(llava, monkeypatch):
    """Eq. (3) is a sum: of many answers, a chunk at a time reaches the vocabulary, and its logits
    are made again backwards."""
    batch, _ = training_batch(llava)
    seen = []
    llava.f_phi.get_output_embeddings().register_forward_hook(
        lambda module, h, logits: seen.append(len(logits))
    )
    results = []
    for chunk in (10**6, 5 * llava.f_phi.config.vocab_size):
        monkeypatch.setattr(model_py, "LOGITS_AT_ONCE", chunk)
        llava.zero_grad()
        loss, count = llava(**batch)
        loss.backward()
        results.append(
            [loss.detach(), *(p.grad.clone() for p in llava.parameters() if p.grad is not None)]
        )
    assert seen[:2] == [count] * 2 and max(seen[2:]) == 5, f"chunks of {seen}"
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("split", [[[0], [1], [2]], [[0, 1], [2]], [[2, 0], [1]], [[2, 1, 0]]])
def test_the_loss_does_not_depend_on_how_the_batch_is_split(llava, split):
    """Eq. (3), sum / count: micro-batches, ranks and order give one loss and one gradient of W."""
    batch, _ = training_batch(llava)
    total, count = llava(**batch)
    (total / count).backward()
    whole, parts = llava.W.weight.grad.clone(), []
    llava.zero_grad()
    for rows in split:
        part = collate([sample(llava, CHATS[i], seed=i) for i in rows], VIEW)
        parts.append(llava(*(part[k] for k in TRAINING)))
        (parts[-1][0] / count).backward()
    assert sum(n for _, n in parts) == count, "the number of answer tokens depends on the split"
    torch.testing.assert_close(
        sum(loss for loss, _ in parts), total, msg=lambda m: f"the loss depends on the split: {m}"
    )
    torch.testing.assert_close(llava.W.weight.grad, whole, atol=1e-6, rtol=1e-4)


def test_a_batch_of_text_alone_gives_W_a_zero_gradient(llava):
    """Sec. 4.2: not None; a rank without pictures would otherwise wait for ever for the others in
    the all-reduce."""
    batch, whole = training_batch(llava, [CHATS[1], ["Hi", "Yes."]])
    assert batch["X_v"].shape == (1, 3, 28, 28) and not len(batch["visual_index"])
    total, count = llava(**batch)
    total.backward()
    assert count == sum(x != IGNORE for row in whole["labels"].tolist() for x in row) and total > 0
    for name, p in llava.W.named_parameters():
        assert p.grad is not None and not p.grad.any(), f"W.{name}.grad is {p.grad}"


def test_only_answer_positions_reach_the_head(llava):
    """Eq. (3) needs p(x_i) of answers alone: the head sees (A, D), so the (B, T, V) logits are
    never built."""
    batch, whole = training_batch(llava)
    A, shapes = (whole["labels"][:, 1:] != IGNORE).sum().item(), []
    hook = llava.f_phi.get_output_embeddings().register_forward_hook(
        lambda module, args, out: shapes.append((tuple(args[0].shape), tuple(out.shape)))
    )
    _, count = llava(**batch)
    llava.score(**batch)
    hook.remove()
    assert count == A < whole["labels"].numel() / 2
    assert shapes == [((A, 48), (A, 320))] * 2, f"the head was called with {shapes}"


def test_score_equals_a_slow_loop_of_log_softmax(pair):
    """Eq. (3): log p(X_a | X_v, X_instruct), a product over the row's answer tokens. Oracle:
    transformers' logits."""
    ours, theirs = pair
    batch, whole = training_batch(ours)
    with torch.no_grad():
        logits = theirs(
            input_ids=batch["input_ids"],
            attention_mask=whole["attention_mask"],
            pixel_values=batch["X_v"],
        ).logits
    want = torch.zeros(len(CHATS))
    for row, labels in enumerate(whole["labels"].tolist()):
        for t, label in enumerate(labels):
            if label != IGNORE:
                want[row] += logits[row, t - 1].log_softmax(-1)[label]
    score = ours.score(**batch)
    assert score.shape == (3,) and score.dtype == torch.float32
    torch.testing.assert_close(
        score, want, atol=1e-4, rtol=1e-5, msg=lambda m: f"score is not log p(X_a | ...): {m}"
    )
    torch.testing.assert_close(
        -score.sum(), ours(**batch)[0].detach(), msg=lambda m: f"score and loss disagree: {m}"
    )


# -----------------------------------------------------------------------------
# A shape comment is a claim


def shape_comments(source):
    """[(first line, last line, names or None for a return, shapes)] of the statements that end in
    `# (B, T, D)`."""
    shape = r"\((?:[A-Z](?:_v)?(?:-1)?|\d+|, ?|,)*\)"
    comments = {
        t.start[0]: m[1]
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
        and (m := re.match(rf"#\s+({shape}(?:, {shape})*)(?:\s|$)", t.string))
    }
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Assign, ast.Return)) and node.end_lineno in comments:
            names = (
                [e.id for e in getattr(node.targets[0], "elts", node.targets)]
                if isinstance(node, ast.Assign)
                else None
            )
            found.append(
                (
                    node.lineno,
                    node.end_lineno,
                    names,
                    re.findall(shape, comments.pop(node.end_lineno)),
                )
            )
    assert not comments, (
        "shape comments behind something else than an assignment or a return, "
        f"in lines {sorted(comments)}"
    )
    return found


class Trace:
    """Runs code and notes, after every statement of model.py with a shape comment, the shapes of
    what it made."""

    def __init__(self, claims):
        self.at = {line: claim for claim in claims for line in range(claim[0], claim[1] + 1)}
        self.pending, self.seen = {}, []  # seen: (last line, claimed shape, actual shape, letters)

    def __call__(self, frame, event, arg):
        return self.local if frame.f_code.co_filename == model_py.__file__ else None

    def local(self, frame, event, arg):
        claim = self.pending.get(frame)
        if claim and (event == "return" or not claim[0] <= frame.f_lineno <= claim[1]):
            values = (
                [frame.f_locals[n] for n in claim[2]]
                if claim[2]
                else arg
                if isinstance(arg, tuple)
                else [arg]
            )
            shapes = claim[3] * len(values) if len(claim[3]) == 1 else claim[3]
            self.seen += [
                (claim[1], s, tuple(v.shape), self.letters)
                for s, v in zip(shapes, values, strict=True)
            ]
        self.pending[frame] = self.at.get(frame.f_lineno) if event == "line" else None
        return self.local

    def run(self, letters, call, *args, **kwargs):
        self.letters, before = letters, sys.gettrace()
        sys.settrace(self)
        try:
            return call(*args, **kwargs)
        finally:
            sys.settrace(before)

    def wrong(self, change=None):
        """The observations that contradict their comment, under the letters' values (or under
        changed ones)."""
        out = []
        for line, text, actual, letters in self.seen:
            letters = letters | {k: letters[k] + 1 for k in [change] if k in letters}
            claimed = eval(text, {}, letters)
            if claimed != actual:
                out.append(
                    f"model.py line {line} says {text} = {claimed}, but the shape is {actual}"
                )
        return out


def test_every_shape_comment_of_the_model_is_true(llava):
    """Sec. 4.1's notation: `# (B, T, D)` in model.py is compared with the shape at run time,
    statement by statement."""
    with open(model_py.__file__, encoding="utf-8") as f:
        claims = shape_comments(f.read())
    trace, sizes = Trace(claims), {"N": 4, "D_v": 32, "D": 48, "V": 320}
    batches = [
        training_batch(llava, [CHATS[0], CHATS[1], [IMAGE, "A ball."]])[0],
        training_batch(llava, [CHATS[1], ["Hi", "Yes."], ["Why?", "Who knows?"]])[0],
    ]  # K = 2, and a blank square
    for batch in batches:
        T = batch["input_ids"].shape[1]
        letters = sizes | {"B": 3, "K": len(batch["X_v"]), "T": T, "A": len(batch["answer_index"])}
        assert len(set(letters.values())) == len(letters), (
            f"a wrong letter would go unnoticed: {letters}"
        )
        trace.run(letters, llava.forward, **batch)
        trace.run(letters, llava.score, **batch)
    batch = prompt_batch(llava, [f"{IMAGE}\nWhat is this?", "Hi", f"{IMAGE}?"])
    letters = sizes | {"B": 3, "K": 2, "T": batch["input_ids"].shape[1]}
    assert len(set(letters.values())) == len(letters), (
        f"a wrong letter would go unnoticed: {letters}"
    )
    for temperature in (0.0, 1.0):
        trace.run(
            letters,
            llava.generate,
            **batch,
            max_new_tokens=3,
            temperature=temperature,
            generator=torch.Generator().manual_seed(0),
        )
    assert not trace.wrong(), "\n".join(sorted(set(trace.wrong())))
    unchecked = sorted({claim[1] for claim in claims} - {line for line, *_ in trace.seen})
    assert not unchecked, (
        f"shape comments in lines {unchecked} of model.py were never reached: nobody vouches"
    )
    assert len({line for line, *_ in trace.seen}) >= 12, (
        "hardly any shape comment is left in model.py"
    )
    for letter in ("B", "K", "N", "T", "D_v", "D", "V", "A"):
        assert trace.wrong(letter), (
            f"no comment depends on {letter}: this test would not notice a wrong one"
        )


# -----------------------------------------------------------------------------
# Generation


QUESTIONS = [
    f"{IMAGE}\nWhat is this?",
    "Hi",
    f"{IMAGE}{IMAGE}\nAre these two equal, or do they differ at all?",
    "Why?",
]


def speaker():
    """A model whose greedy answers are lower-case letters: every other row of its head is zero."""
    model = tiny_llava()
    letters = torch.tensor(
        model.tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    )
    head = model.f_phi.get_output_embeddings().weight
    with torch.no_grad():
        kept = head[letters].clone()
        head.zero_()
        head[letters] = kept
    return model


def test_the_first_of_several_stop_strings_cuts_the_answer(llava):
    """Table 2's STOP: whatever order they are given in; white space around the answer goes, special
    tokens too."""
    ids = llava.tokenizer(" A cat. ### Human: ab", add_special_tokens=False)["input_ids"]
    for stop in (("###", "Human"), ("Human", "###"), ("cat\n", "###")):
        assert llava.to_text(ids + [llava.tokenizer.eos_token_id], stop) == "A cat."
    assert (
        llava.to_text([llava.tokenizer.bos_token_id, *ids, llava.tokenizer.eos_token_id])
        == "A cat. ### Human: ab"
    )
    assert llava.to_text([]) == "" and llava.to_text(ids[:1], ("x",)) == ""


@pytest.mark.parametrize(
    "temperature, top_p, kept", [(1, 1, 5), (0.5, 1, 5), (2, 0.7, 3), (1, 0.6, 2), (1, 0.4, 1)]
)
def test_sample_id_draws_from_the_nucleus_with_the_right_frequencies(temperature, top_p, kept):
    """softmax(logits / temperature), cut to the fewest ids that hold top_p of the mass,
    renormalised; unsorted logits."""
    logits = torch.tensor([0.1, 2.0, -1.0, 1.3, 0.6])
    p = [torch.exp(x / temperature).item() for x in logits]
    p = [x / sum(p) for x in p]
    nucleus, mass = [], 0.0
    for i in sorted(range(5), key=lambda i: -p[i]):
        if mass < top_p:
            nucleus.append(i)
            mass += p[i]
    assert len(nucleus) == kept, f"this case is meant to keep {kept} ids"
    n = 40_000
    ids = sample_id(logits.expand(n, 5), temperature, top_p, torch.Generator().manual_seed(0))
    for i, count in enumerate(torch.bincount(ids, minlength=5).tolist()):
        want = p[i] / mass if i in nucleus else 0.0
        assert abs(count / n - want) <= 5 * (want * (1 - want) / n) ** 0.5, (
            f"id {i}: {count / n:.4f} instead of {want:.4f}"
        )


def test_the_nucleus_keeps_its_first_id_even_for_top_p_0():
    """OpenAI clients send top_p 0 and mean greedy."""
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_id(logits, 1.0, 0.0), logits.argmax(-1))


def greedy(model, batch, n):
    """Greedy ids by transformers' own modules, the whole sequence anew at each step."""
    H = model.splice(batch["input_ids"], batch["X_v"], batch["visual_index"])
    ids = []
    while len(ids) < n and not set(ids) & model.eos_ids:
        logits = model.f_phi(inputs_embeds=H, use_cache=False).logits[0, -1]
        logits[model.image_id] = -torch.inf
        ids.append(logits.argmax().item())
        H = torch.cat([H, model.f_phi.get_input_embeddings().weight[ids[-1:]][None]], 1)
    return model.to_text(ids)


@pytest.mark.parametrize(
    "family, more",
    [("llama", {}), ("mistral", {}), ("qwen2", {}), ("mistral", {"sliding_window": 16})],
)
@torch.no_grad()
def test_a_ragged_batch_answers_as_its_rows_do_without_cache_or_padding(family, more):
    """Sec. 4.1: cache, padding and other rows change no greedy answer, also behind a window."""
    model = LLaVA(tiny_clip(), tiny_llm(family, **more), byte_tokenizer()).eval()
    together = model.generate(**prompt_batch(model, QUESTIONS), max_new_tokens=20)
    for i, question in enumerate(QUESTIONS):
        alone = collate([sample(model, [question], seed=i)], VIEW, side="left")
        assert together[i] == greedy(model, alone, 20), f"row {i} answers otherwise in a batch"


def test_greedy_answers_equal_those_of_transformers_generate(pair):
    """Sec. 4.1: the same folder answers the same in any engine, with 0, 1 and 2 images a row."""
    ours, theirs = pair
    batch = prompt_batch(ours, QUESTIONS[:3])
    out = theirs.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch["X_v"],
        do_sample=False,
        max_new_tokens=20,
        suppress_tokens=[ours.image_id],
    )
    new = out[:, batch["input_ids"].shape[1] :].tolist()
    assert ours.generate(**batch, max_new_tokens=20) == [ours.to_text(ids) for ids in new]


def test_a_stop_string_ends_an_answer_and_is_cut():
    """Table 2's STOP: the text ends before it in rows that have it, and goes on in the others."""
    model = speaker()
    batch = prompt_batch(model, QUESTIONS)
    free = model.generate(**batch, max_new_tokens=30)
    stop = free[2][11:14]
    ends = [text.find(stop) for text in free]
    assert -1 in ends and ends[2] >= 0, f"{stop!r} must end some rows and not others: {free}"
    answers = model.generate(**batch, max_new_tokens=30, stop=("never", stop))
    assert answers == [text[:at] if at >= 0 else text for text, at in zip(free, ends, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_placeholder_is_never_an_answer(llava, temperature):
    """An emitted <image> id would ask for a picture; it is barred however likely it is."""

    def favour(module, args, out):
        out[..., llava.image_id] = 1e4
        return out

    llava.f_phi.get_output_embeddings().register_forward_hook(favour)
    batch = prompt_batch(llava, QUESTIONS)
    for text in llava.generate(**batch, max_new_tokens=10, temperature=temperature):
        assert IMAGE not in text


def test_a_picture_that_two_samples_show_is_encoded_once(llava):
    """visual_index names its tokens twice; loss and gradients are those of two copies."""
    one = sample(llava, CHATS[0])
    other = sample(llava, CHATS[0])
    other["pictures"] = [("a copy", picture) for _, picture in other["pictures"]]
    results = []
    for second in (one, other):
        batch = collate([one, second], VIEW)
        results.append((len(batch["X_v"]), llava(*(batch[k] for k in TRAINING))[0]))
    assert [n for n, _ in results] == [1, 2]
    torch.testing.assert_close(results[0][1], results[1][1])
