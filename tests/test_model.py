"""The model against the paper (Sec. 4.1, Eqs. (1) and (3)), against `transformers`, and against slow loops."""
import ast
import io
import re
import sys
import tokenize

import pytest
import torch
from transformers import AutoModelForImageTextToText

import model as model_py
from conftest import answer_logits, byte_tokenizer, tiny_clip, tiny_llava, tiny_llm
from data import TEMPLATES, collate, encode, render
from model import IGNORE, LLaVA, sample_id
from records import IMAGE

KINDS = [(family, tied) for family in ("llama", "mistral", "qwen2") for tied in (False, True)]
CHATS = [[f"{IMAGE}\nWhat is this?", "A red cube."],
         ["Hello?", "Yes.", "Are you sure about this?", "No."],
         [f"{IMAGE}\nAnd these?\n{IMAGE}", "Two balls.", f"{IMAGE}\nThis one?", "A cone, a green one."]]


def sample(model, turns, name="chat.json[0] (id 0)", seed=0):
    """A training sample as data.py makes it; `turns` are question, answer, question, ... An open end is a prompt."""
    tags = sum(turn.count(IMAGE) for turn in turns)
    turns = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    ids, labels = encode(render(turns, TEMPLATES["mistral_instruct"]), model.tokenizer, [model.N] * tags)
    X_v = torch.randn(tags, 3, model.view.size, model.view.size, generator=torch.Generator().manual_seed(seed))
    return {"where": name, "input_ids": ids, "labels": labels, "X_v": X_v, "sizes": [(28, 28)] * tags}


def training_batch(model, chats=CHATS):
    batch = collate([sample(model, turns, f"chat.json[{i}] (id {i})", i) for i, turns in enumerate(chats)])
    return {k: batch[k] for k in ("input_ids", "labels", "X_v", "ids")}, batch["attention_mask"]


def prompt_batch(model, questions):
    batch = collate([sample(model, [q], seed=i) for i, q in enumerate(questions)], side="left")
    return {k: batch[k] for k in ("input_ids", "attention_mask", "X_v")}


def mean_loss(model, batch):
    total, count = model(**batch)
    return total / count


@pytest.fixture(scope="module", params=KINDS, ids=[f"{f}-{'tied' if t else 'untied'}" for f, t in KINDS])
def pair(request, tmp_path_factory):
    """(ours, transformers' LlavaForConditionalGeneration from the folder that ours saved)."""
    ours, folder = tiny_llava(*request.param), tmp_path_factory.mktemp("llava")
    ours.save_pretrained(folder)
    return ours, AutoModelForImageTextToText.from_pretrained(folder).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Parity with transformers


def test_logits_loss_and_gradients_equal_those_of_transformers(pair):
    """Eq. (1), Eq. (3): text-only rows, several images and several turns, right padding; theirs with attention_mask."""
    ours, theirs = pair
    batch, attention_mask = training_batch(ours)
    assert not attention_mask.all(), "the batch must be ragged, or padding is not tested"
    out = theirs(input_ids=batch["input_ids"], attention_mask=attention_mask, pixel_values=batch["X_v"], labels=batch["labels"])
    logits, targets = answer_logits(ours, **batch)
    scored = batch["labels"][:, 1:] != IGNORE
    assert torch.equal(targets, batch["labels"][:, 1:][scored])
    torch.testing.assert_close(logits, out.logits[:, :-1][scored], atol=1e-5, rtol=1e-5,
                               msg=lambda m: f"our forward pass is not LLaVA's as others run it:\n{m}")
    ours.zero_grad(), theirs.zero_grad()
    loss = mean_loss(ours, batch)
    torch.testing.assert_close(loss, out.loss, atol=1e-5, rtol=1e-5, msg=lambda m: f"Eq. (3) is shifted or scaled: {m}")
    loss.backward(), out.loss.backward()
    inner = theirs.model
    for name, mine, other in (
            ("W", ours.W.weight, inner.multi_modal_projector.linear_1.weight),
            ("the bias of W", ours.W.bias, inner.multi_modal_projector.linear_1.bias),
            ("the word embeddings", ours.f_phi.get_input_embeddings().weight, inner.language_model.embed_tokens.weight),
            ("the head", ours.f_phi.get_output_embeddings().weight, theirs.lm_head.weight)):
        assert mine.grad.any(), f"no gradient reaches {name}"
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"gradient of {n}: {m}")


def test_greedy_answers_equal_those_of_transformers_generate(pair):
    """Sec. 4.1: the same folder gives the same ids in any engine, in a left-padded batch with 0, 1 and 2 images a row."""
    ours, theirs = pair
    batch = prompt_batch(ours, [f"{IMAGE}\nWhat is this?", "Hi", f"{IMAGE}{IMAGE}\nAre these two equal, or not?"])
    out = theirs.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=batch["X_v"],
                          do_sample=False, max_new_tokens=20, suppress_tokens=[ours.image_id])
    for mine, other in zip(stream_ids(ours, batch, max_new_tokens=20), out[:, batch["input_ids"].shape[1]:].tolist()):
        assert mine == other[:len(mine)], "our KV cache, positions or left padding differ from transformers' generate"
        assert set(other[len(mine):]) <= {0}, "we stopped a row that transformers goes on with"


# ---------------------------------------------------------------------------------------------------------------------
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
    """Sec. 4.1 "before and after the last Transformer layer", Table 8. Oracle: CLIP's layers called one by one."""
    model = tiny_llava(feature_layer=feature_layer)
    X_v = torch.randn(2, 3, 28, 28)
    Z_v = visual_features(model, X_v)
    assert torch.equal(Z_v, model.g(X_v, output_hidden_states=True).hidden_states[feature_layer][:, 1:])
    with torch.no_grad():
        h = model.g.pre_layrnorm(model.g.embeddings(X_v))
        for layer in model.g.encoder.layers[:layers]:
            h = layer(h, None)
    assert Z_v.shape == (2, 4, 32), f"{tuple(Z_v.shape)}: (28 / 14)^2 = 4 tokens a picture, no CLS"
    torch.testing.assert_close(Z_v, h[:, 1:], msg=lambda m: f"Z_v is not the output of CLIP layer {layers} of 3: {m}")
    torch.testing.assert_close(model.encode_images(X_v), Z_v @ model.W.weight.T + model.W.bias)


@pytest.mark.parametrize("feature_layer, last_layer_matters", [(-2, False), (-1, True)])
def test_what_lies_behind_the_chosen_CLIP_layer_does_not_matter(feature_layer, last_layer_matters):
    """Sec. 4.1, Table 8: at -2 CLIP's last layer is unused, its post_layernorm always."""
    model, X_v = tiny_llava(feature_layer=feature_layer), torch.randn(2, 3, 28, 28)
    before = model.encode_images(X_v)
    for part, matters in ((model.g.post_layernorm, False), (model.g.encoder.layers[-1], last_layer_matters)):
        with torch.no_grad():
            for p in part.parameters():
                p.add_(torch.randn_like(p))
        changed = not torch.equal(model.encode_images(X_v), before)
        assert changed == matters, f"{type(part).__name__} {'changes' if changed else 'does not change'} H_v at {feature_layer}"


def test_the_splice_equals_a_slow_loop(llava):
    """Sec. 4.1: row by row, each placeholder gets the next row of H_v, and every other id its word embedding."""
    batch, _ = training_batch(llava)
    H, Z_v = llava.splice(batch["input_ids"], batch["X_v"]), visual_features(llava, batch["X_v"])
    words, k = llava.f_phi.get_input_embeddings().weight, 0
    for row, ids in enumerate(batch["input_ids"].tolist()):
        for t, i in enumerate(ids):
            if i == llava.image_id:
                want = llava.W.weight @ Z_v[k // llava.N, k % llava.N] + llava.W.bias
                k += 1
            else:
                want = words[i]
            torch.testing.assert_close(H[row, t], want, msg=lambda m, at=(row, t): f"wrong embedding at {at}: {m}")
    assert k == 4 * llava.N


def test_swapped_pictures_change_the_answer(llava):
    """Sec. 4.1: H_v of picture k lands at placeholder run k, also across rows, so order is not lost on the way."""
    batch, _ = training_batch(llava)
    straight, swapped = llava(**batch)[0], llava(**batch | {"X_v": batch["X_v"].flip(0)})[0]
    assert not torch.isclose(straight, swapped), "the model does not look at its pictures"


@pytest.mark.parametrize("placeholders, pictures", [((4, 0), 2), ((8, 4), 2), ((5, 4), 2), ((0, 0), 1), ((5, 3), 2)])
def test_wrong_placeholder_counts_are_an_error_that_names_the_samples(llava, placeholders, pictures):
    """Sec. 4.1: a count that does not fit would shift every later picture; (5, 3) for 2 x 4 is right only in sum."""
    input_ids = torch.tensor([[llava.image_id] * n + [70] * (9 - n) for n in placeholders])
    with pytest.raises(AssertionError) as error:
        llava.splice(input_ids, torch.zeros(pictures, 3, 28, 28), ids=["a.json[7] (id x)", "b.json[9] (id y)"])
    message = str(error.value)
    assert f"a.json[7] (id x): {placeholders[0]}" in message and f"b.json[9] (id y): {placeholders[1]}" in message, message
    assert f"{pictures} pictures x 4" in message, message


# ---------------------------------------------------------------------------------------------------------------------
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
    """Sec. 4.2 "theta = W (the projection matrix)": after a step g and f_phi are bit-identical, and W has moved."""
    model = tiny_llava(family, tied)
    batch, _ = training_batch(model)
    theta = model.set_stage(1)
    assert theta.keys() == {"W.weight", "W.bias"}, f"stage 1 would train {sorted(theta)}"
    assert one_step(model, batch, theta) == {"W.weight", "W.bias"}, "stage 1 changed something other than W, or not all of W"


@pytest.mark.parametrize("family, tied", KINDS)
def test_stage_2_trains_W_and_f_phi_but_never_g(family, tied):
    """Sec. 4.2 "theta = {W, phi}": all of the language model moves, and CLIP keeps every bit."""
    model = tiny_llava(family, tied)
    batch, _ = training_batch(model)
    theta = model.set_stage(2)
    assert {name.split(".")[0] for name in theta} == {"W", "f_phi"}, f"stage 2 would train {sorted(theta)[:5]}"
    want = {n for n, _ in model.named_parameters() if not n.startswith("g.")}
    moved = one_step(model, batch, theta)
    assert moved == want, f"changed but frozen: {sorted(moved - want)}; trained but unmoved: {sorted(want - moved)}"


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
    """Sec. 4.2 "keep the visual encoder weights frozen": no graph is recorded through CLIP (memory, and the claim)."""
    llava.set_stage(stage)
    llava.g.requires_grad_(True)
    batch, _ = training_batch(llava)
    mean_loss(llava, batch).backward()
    assert all(p.grad is None for p in llava.g.parameters()), "a gradient flows into CLIP"


# ---------------------------------------------------------------------------------------------------------------------
# The loss, Eq. (3)


def test_the_loss_does_not_depend_on_padding(llava):
    """Eq. (3): ids to the right of a sample, whatever they are, change neither the sum nor the count."""
    batch, attention_mask = training_batch(llava)
    total, count = llava(**batch)
    batch["input_ids"] = torch.where(attention_mask.bool(), batch["input_ids"], 77)
    batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 13), value=99)
    batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, 13), value=IGNORE)
    padded, same = llava(**batch)
    assert same == count
    torch.testing.assert_close(padded, total, msg=lambda m: f"padding leaks into the loss: {m}")


def test_logits_in_chunks_give_the_same_loss_and_gradients(llava, monkeypatch):
    """Eq. (3) is a sum: of many answers, a chunk at a time reaches the vocabulary, and its logits are made again backwards."""
    batch, _ = training_batch(llava)
    seen = []
    llava.f_phi.get_output_embeddings().register_forward_hook(lambda module, h, logits: seen.append(len(logits)))
    results = []
    for chunk in (10 ** 6, 5 * llava.f_phi.config.vocab_size):
        monkeypatch.setattr(model_py, "CHUNK", chunk)
        llava.zero_grad()
        loss, count = llava(**batch)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in llava.parameters() if p.grad is not None)])
    assert seen[0] == count and max(seen[1:]) == 5 and sum(seen[1:]) == 2 * count, f"chunks of {seen}"
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
        part = collate([sample(llava, CHATS[i], seed=i) for i in rows])
        parts.append(llava(part["input_ids"], part["labels"], part["X_v"]))
        (parts[-1][0] / count).backward()
    assert sum(n for _, n in parts) == count, "the number of answer tokens depends on the split"
    torch.testing.assert_close(sum(loss for loss, _ in parts), total, msg=lambda m: f"the loss depends on the split: {m}")
    torch.testing.assert_close(llava.W.weight.grad, whole, atol=1e-6, rtol=1e-4)


def test_a_batch_of_text_alone_gives_W_a_zero_gradient(llava):
    """Sec. 4.2: not None; a rank without pictures would otherwise wait for ever for the others in the all-reduce."""
    batch, _ = training_batch(llava, [CHATS[1], ["Hi", "Yes."]])
    assert batch["X_v"].shape == (0, 3, 28, 28)
    total, count = llava(**batch)
    total.backward()
    assert count == sum(x != IGNORE for row in batch["labels"].tolist() for x in row) and total > 0
    for name, p in llava.W.named_parameters():
        assert p.grad is not None and not p.grad.any(), f"W.{name}.grad is {p.grad}"


def test_only_answer_positions_reach_the_head(llava):
    """Eq. (3) needs p(x_i) of answers alone: the head sees (A, D), so the (B, T, V) logits are never built."""
    batch, _ = training_batch(llava)
    A, shapes = (batch["labels"][:, 1:] != IGNORE).sum().item(), []
    hook = llava.f_phi.get_output_embeddings().register_forward_hook(
        lambda module, args, out: shapes.append((tuple(args[0].shape), tuple(out.shape))))
    _, count = llava(**batch)
    llava.score(**batch)
    hook.remove()
    assert count == A < batch["labels"].numel() / 2
    assert shapes == [((A, 48), (A, 320))] * 2, f"the head was called with {shapes}"


def test_score_equals_a_slow_loop_of_log_softmax(pair):
    """Eq. (3): log p(X_a | X_v, X_instruct), a product over the row's answer tokens. Oracle: transformers' logits."""
    ours, theirs = pair
    batch, attention_mask = training_batch(ours)
    with torch.no_grad():
        logits = theirs(input_ids=batch["input_ids"], attention_mask=attention_mask, pixel_values=batch["X_v"]).logits
    want = torch.zeros(len(CHATS))
    for row, labels in enumerate(batch["labels"].tolist()):
        for t, label in enumerate(labels):
            if label != IGNORE:
                want[row] += logits[row, t - 1].log_softmax(-1)[label]
    score = ours.score(**batch)
    assert score.shape == (3,) and score.dtype == torch.float32
    torch.testing.assert_close(score, want, atol=1e-4, rtol=1e-5, msg=lambda m: f"score is not log p(X_a | ...): {m}")
    torch.testing.assert_close(-score.sum(), ours(**batch)[0].detach(), msg=lambda m: f"score and loss disagree: {m}")


def test_score_ranks_the_most_likely_answer_first(llava):
    """Eq. (3): of all one-token answers to a question, the argmax of the next-token distribution scores highest."""
    ids = sample(llava, [f"{IMAGE}\nWhat is this?"])["input_ids"]
    X_v, candidates = sample(llava, [IMAGE])["X_v"], [i for i in range(320) if i != llava.image_id]
    best = stream_ids(llava, {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
                              "X_v": X_v}, max_new_tokens=1)[0][0]
    input_ids = torch.tensor([ids + [i] for i in candidates])
    labels = torch.full_like(input_ids, IGNORE)
    labels[:, -1] = input_ids[:, -1]
    scores = llava.score(input_ids, labels, X_v.expand(len(candidates), -1, -1, -1))
    assert candidates[scores.argmax()] == best, "the highest score is not what greedy decoding says"


# ---------------------------------------------------------------------------------------------------------------------
# A shape comment is a claim


def shape_comments(source):
    """[(first line, last line, names or None for a return, shapes)] of the statements that end in `# (B, T, D)`."""
    shape = r"\((?:[A-Z](?:_v)?(?:-1)?|\d+|, ?|,)*\)"
    comments = {t.start[0]: m[1] for t in tokenize.generate_tokens(io.StringIO(source).readline)
                if t.type == tokenize.COMMENT and (m := re.match(rf"#\s+({shape}(?:, {shape})*)(?:\s|$)", t.string))}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Assign, ast.Return)) and node.end_lineno in comments:
            names = [e.id for e in getattr(node.targets[0], "elts", node.targets)] if isinstance(node, ast.Assign) else None
            found.append((node.lineno, node.end_lineno, names, re.findall(shape, comments.pop(node.end_lineno))))
    assert not comments, f"shape comments behind something else than an assignment or a return, in lines {sorted(comments)}"
    return found


class Trace:
    """Runs code and notes, after every statement of model.py with a shape comment, the shapes of what it made."""

    def __init__(self, claims):
        self.at = {line: claim for claim in claims for line in range(claim[0], claim[1] + 1)}
        self.pending, self.seen = {}, []                  # seen: (last line, claimed shape, actual shape, letters)

    def __call__(self, frame, event, arg):
        return self.local if frame.f_code.co_filename == model_py.__file__ else None

    def local(self, frame, event, arg):
        claim = self.pending.get(frame)
        if claim and (event == "return" or not claim[0] <= frame.f_lineno <= claim[1]):
            values = [frame.f_locals[n] for n in claim[2]] if claim[2] else arg if isinstance(arg, tuple) else [arg]
            shapes = claim[3] * len(values) if len(claim[3]) == 1 else claim[3]
            self.seen += [(claim[1], s, tuple(v.shape), self.letters) for s, v in zip(shapes, values, strict=True)]
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
        """The observations that contradict their comment, under the letters' values (or under changed ones)."""
        out = []
        for line, text, actual, letters in self.seen:
            letters = letters | {k: letters[k] + 1 for k in [change] if k in letters}
            claimed = eval(text, {}, letters)
            if claimed != actual:
                out.append(f"model.py line {line} says {text} = {claimed}, but the shape is {actual}")
        return out


def test_every_shape_comment_of_the_model_is_true(llava):
    """Sec. 4.1's notation: `# (B, T, D)` in model.py is compared with the shape at run time, statement by statement."""
    with open(model_py.__file__, encoding="utf-8") as f:
        claims = shape_comments(f.read())
    trace, sizes = Trace(claims), {"N": 4, "D_v": 32, "D": 48, "V": 320}
    batches = [training_batch(llava, [CHATS[0], CHATS[1], [IMAGE, "A ball."]])[0],
               training_batch(llava, [CHATS[1], ["Hi", "Yes."], ["Why?", "Who knows?"]])[0]]      # K = 2 and K = 0
    for batch in batches:
        A = (batch["labels"] != IGNORE).sum().item()
        letters = sizes | {"B": 3, "K": len(batch["X_v"]), "T": batch["labels"].shape[1], "A": A}
        assert len(set(letters.values())) == len(letters), f"a wrong letter would go unnoticed: {letters}"
        trace.run(letters, llava.forward, **batch)
        trace.run(letters, llava.score, **batch)
    batch = prompt_batch(llava, [f"{IMAGE}\nWhat is this?", "Hi", f"{IMAGE}?"])
    letters = sizes | {"B": 3, "K": 2, "T": batch["input_ids"].shape[1]}
    assert len(set(letters.values())) == len(letters), f"a wrong letter would go unnoticed: {letters}"
    for temperature in (0.0, 1.0):
        trace.run(letters, llava.generate, **batch, max_new_tokens=3, temperature=temperature,
                  generator=torch.Generator().manual_seed(0))
    assert not trace.wrong(), "\n".join(sorted(set(trace.wrong())))
    unchecked = sorted({claim[1] for claim in claims} - {line for line, *_ in trace.seen})
    assert not unchecked, f"shape comments in lines {unchecked} of model.py were never reached, so nobody vouches for them"
    assert len({line for line, *_ in trace.seen}) >= 12, "hardly any shape comment is left in model.py"
    for letter in ("B", "K", "N", "T", "D_v", "D", "V", "A"):
        assert trace.wrong(letter), f"no comment depends on {letter}: this test would not notice a wrong one"


# ---------------------------------------------------------------------------------------------------------------------
# Generation


QUESTIONS = [f"{IMAGE}\nWhat is this?", "Hi", f"{IMAGE}{IMAGE}\nAre these two equal, or do they differ at all?", "Why?"]


def stream_ids(model, batch, **sampling):
    """The ids of each row; a row that has ended stays ended."""
    steps = list(model.stream(**batch, **sampling))
    rows = [[step[row] for step in steps] for row in range(len(batch["input_ids"]))]
    for row in rows:
        ended = row.index(None) if None in row else len(row)
        assert all(i is None for i in row[ended:]), "a row went on after its end"
    return [[i for i in row if i is not None] for row in rows]


def speaker():
    """A model whose greedy answers are lower-case letters: every other row of its head is zero."""
    model = tiny_llava()
    letters = torch.tensor(model.tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz")))
    head = model.f_phi.get_output_embeddings().weight
    with torch.no_grad():
        kept = head[letters].clone()
        head.zero_()
        head[letters] = kept
    return model


@pytest.mark.parametrize("family, more", [("llama", {}), ("mistral", {}), ("qwen2", {}), ("mistral", {"sliding_window": 16})])
def test_the_KV_cache_changes_nothing(family, more):
    """Sec. 4.1: greedy ids equal those of recomputing the whole sequence at each step, also behind a sliding window."""
    model = LLaVA(tiny_clip(), tiny_llm(family, **more), byte_tokenizer()).eval()
    for question in QUESTIONS[:3]:
        batch, want = prompt_batch(model, [question]), []
        with torch.no_grad():
            H = model.splice(batch["input_ids"], batch["X_v"])
            while len(want) < 24 and not set(want) & model.eos_ids:
                h = model.f_phi.base_model(inputs_embeds=H, use_cache=False).last_hidden_state[0, -1]
                logits = model.f_phi.get_output_embeddings()(h)
                logits[model.image_id] = -torch.inf
                want.append(logits.argmax().item())
                H = torch.cat([H, model.f_phi.get_input_embeddings().weight[want[-1:]][None]], 1)
        got = stream_ids(model, batch, max_new_tokens=24)[0]
        assert got == want, f"cached {got}, recomputed {want}"


@pytest.mark.parametrize("family, more", [("llama", {}), ("qwen2", {}), ("mistral", {"sliding_window": 16})])
def test_a_ragged_batch_answers_as_its_rows_do_alone(family, more):
    """Sec. 4.1: left padding, other rows and their pictures do not change an answer, token for token."""
    model = LLaVA(tiny_clip(), tiny_llm(family, **more), byte_tokenizer()).eval()
    together = stream_ids(model, prompt_batch(model, QUESTIONS), max_new_tokens=20)
    for i, question in enumerate(QUESTIONS):
        alone = collate([sample(model, [question], seed=i)], side="left")
        alone = stream_ids(model, {k: alone[k] for k in ("input_ids", "attention_mask", "X_v")}, max_new_tokens=20)[0]
        assert together[i] == alone, f"row {i} ({question!r}) says {together[i]} in a batch and {alone} alone"


def test_padding_does_not_count_as_a_position(llava):
    """Rotary positions are relative, so a shift shows only where frequencies depend on length; hence seen from inside."""
    batch, positions = prompt_batch(llava, QUESTIONS), []
    hook = llava.f_phi.register_forward_pre_hook(lambda module, args, kwargs: positions.append(kwargs["position_ids"]),
                                                 with_kwargs=True)
    stream_ids(llava, batch, max_new_tokens=3)
    hook.remove()
    for row, mask in enumerate(batch["attention_mask"].tolist()):
        n = sum(mask)
        assert positions[0][row, -n:].tolist() == list(range(n)), "a row's first real token is not at position 0"
        assert [p[row].item() for p in positions[1:]] == [n, n + 1], "new tokens do not follow on the prompt"


def test_a_stop_string_ends_its_row_and_is_cut_while_the_others_go_on():
    """Table 2's STOP: it may span tokens; the row's last id is the one that completes it, the text ends before it."""
    model = speaker()
    batch = prompt_batch(model, QUESTIONS)
    free, free_ids = model.generate(**batch, max_new_tokens=30), stream_ids(model, batch, max_new_tokens=30)
    assert all(len(ids) == 30 and re.fullmatch("[a-z]{30}", text) for ids, text in zip(free_ids, free)), free
    stop = free[2][11:14]
    ends = [text.find(stop) for text in free]
    assert -1 in ends and ends[2] >= 0, f"the stop string {stop!r} must end some rows and not others: {free}"
    ids = stream_ids(model, batch, max_new_tokens=30, stop=("never", stop))
    for row, at in enumerate(ends):
        want = free_ids[row][:at + 3] if at >= 0 else free_ids[row]
        assert ids[row] == want, f"row {row} should {'end with the stop string' if at >= 0 else 'go on to the limit'}"
    answers = model.generate(**batch, max_new_tokens=30, stop=("never", stop))
    assert answers == [text[:at] if at >= 0 else text for text, at in zip(free, ends)]


def test_the_first_of_several_stop_strings_cuts_the_answer(llava):
    """Table 2's STOP: whatever order they are given in; white space around the answer goes, special tokens too."""
    ids = llava.tokenizer(" A cat. ### Human: ab", add_special_tokens=False)["input_ids"]
    for stop in (("###", "Human"), ("Human", "###"), ("cat\n", "###")):
        assert llava.to_text(ids + [llava.tokenizer.eos_token_id], stop) == "A cat."
    assert llava.to_text([llava.tokenizer.bos_token_id, *ids, llava.tokenizer.eos_token_id]) == "A cat. ### Human: ab"
    assert llava.to_text([]) == "" and llava.to_text(ids[:1], ("x",)) == ""


def test_a_stop_string_of_many_tokens_ends_its_row():
    """Table 2's STOP: with a byte tokenizer (or a rare script) a stop string is dozens of tokens long."""
    model = speaker()
    batch = prompt_batch(model, QUESTIONS[:1])
    free = model.generate(**batch, max_new_tokens=60)[0]
    stop = free[5:50]
    ids = stream_ids(model, batch, max_new_tokens=60, stop=(stop,))[0]
    assert len(ids) == free.index(stop) + len(stop), f"{len(ids)} ids: the row ran past its stop string"


def test_every_end_of_sequence_id_of_the_model_ends_a_row():
    """Chat models list several (<|im_end|>, <|endoftext|>); each ends its row, is yielded, and is not in the text."""
    model = speaker()
    batch = prompt_batch(model, QUESTIONS)
    free = stream_ids(model, batch, max_new_tokens=30)
    end = free[0][6]
    model.f_phi.generation_config.eos_token_id = [2, end, 300]
    assert model.eos_ids == {2, end, 300}
    for ids, want in zip(stream_ids(model, batch, max_new_tokens=30), free):
        assert ids == want[:want.index(end) + 1 if end in want else None], f"{end} ends a row, and only where it is said"
    letter = model.tokenizer.decode([end])
    assert letter not in model.generate(**batch, max_new_tokens=30)[0], "an end-of-sequence id is no part of the answer"


def test_max_new_tokens_is_kept():
    """Exactly so many ids for a row that does not end; none for 0; never past the model's context."""
    model = speaker()
    batch = prompt_batch(model, QUESTIONS)
    for n in (0, 1, 7):
        assert [len(ids) for ids in stream_ids(model, batch, max_new_tokens=n)] == [n] * 4
    assert model.generate(**batch, max_new_tokens=0) == [""] * 4
    ids = torch.full((1, 509), 70)
    long = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "X_v": torch.zeros(0, 3, 28, 28)}
    assert len(stream_ids(model, long)[0]) == 3, "the context holds 512 positions"


@pytest.mark.parametrize("T", [512, 600])
def test_a_prompt_longer_than_the_context_is_an_error(llava, T):
    """The context is 512 here: positions beyond it were never trained, and the answer would be noise."""
    ids = torch.full((1, T), 70)
    with pytest.raises(ValueError, match=rf"{T} tokens.*\b512\b"):
        llava.generate(ids, torch.ones_like(ids), torch.zeros(0, 3, 28, 28))


def test_stream_computes_one_step_at_a_time(llava):
    """An answer can be shown while it is made: asking for two steps runs the language model twice, and only then."""
    calls = []
    hook = llava.f_phi.register_forward_hook(lambda *_: calls.append(1))
    steps = llava.stream(**prompt_batch(llava, QUESTIONS), max_new_tokens=50)
    assert len(calls) == 0
    for n in (1, 2, 3):
        assert len(next(steps)) == 4
        assert len(calls) == n, f"{len(calls)} forward passes for {n} steps"
    steps.close()
    hook.remove()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_placeholder_is_never_an_answer(llava, temperature):
    """An emitted <image> id would be text that asks for a picture; it is barred however likely the head finds it."""
    def favour(module, args, out):
        out[..., llava.image_id] = 1e4
        return out
    hook = llava.f_phi.get_output_embeddings().register_forward_hook(favour)
    ids = stream_ids(llava, prompt_batch(llava, QUESTIONS), max_new_tokens=10, temperature=temperature)
    hook.remove()
    assert all(ids) and not any(llava.image_id in row for row in ids)


def test_a_tiny_nucleus_is_greedy_and_a_seed_repeats(llava):
    """temperature, top_p and generator: a nucleus of one id is the argmax, one seed is one answer, another is another."""
    batch = prompt_batch(llava, QUESTIONS)
    def draw(seed, top_p):
        generator = torch.Generator().manual_seed(seed)
        return stream_ids(llava, batch, max_new_tokens=16, temperature=1.0, top_p=top_p, generator=generator)
    assert draw(0, 1e-6) == draw(1, 1e-6) == stream_ids(llava, batch, max_new_tokens=16)
    assert draw(0, 0.9) == draw(0, 0.9), "the same seed gave another answer"
    assert draw(0, 0.9) != draw(1, 0.9), "the seed has no effect"


@pytest.mark.parametrize("temperature, top_p, kept", [(1, 1, 5), (0.5, 1, 5), (2, 0.7, 3), (1, 0.6, 2), (1, 0.4, 1)])
def test_sample_id_draws_from_the_nucleus_with_the_right_frequencies(temperature, top_p, kept):
    """softmax(logits / temperature), cut to the fewest ids that hold top_p of the mass, renormalised; unsorted logits."""
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
        assert abs(count / n - want) <= 5 * (want * (1 - want) / n) ** 0.5, f"id {i}: {count / n:.4f} instead of {want:.4f}"


def test_the_nucleus_keeps_its_first_id_even_for_top_p_0():
    """OpenAI clients send top_p 0 and mean greedy."""
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_id(logits, 1.0, 0.0), logits.argmax(-1))
