"""The model against the paper (Sec. 4.1, Eqs. (1) and (3)), against `transformers`, and against
slow loops."""
import ast
import io
import re
import tokenize

import pytest
import torch
from conftest import (
    assert_same_model,
    batch_from,
    byte_tokenizer,
    noise,
    sample_from,
    tiny_clip,
    tiny_llava,
    tiny_llm,
)
from transformers import AutoModelForImageTextToText

import model as model_py
from model import LLaVA, sample_id
from parts.files import IGNORE, IMAGE
from parts.ranks import ANSWERING, TRAINING

KINDS = [("llama", False), ("llama", True), ("mistral", False), ("qwen2", True)]
CHATS = [
    [f"{IMAGE}\nWhat is this?", "A red cube."],
    ["Hello?", "Yes.", "Are you sure about this?", "No."],
    [f"{IMAGE}\nAnd these?\n{IMAGE}", "Two balls.", f"{IMAGE}\nThis one?", "A cone, a green one."],
]
N = 4            # visual tokens of a picture


def sample(model, texts, seed=0):
    """A training sample of question, answer, question, ... An open end is a prompt."""
    tags = sum(text.count(IMAGE) for text in texts)
    pictures = [noise((28, 28), 10 * seed + k) for k in range(tags)]
    return sample_from(model, texts, pictures, "mistral_instruct")


def training_batch(model, chats=CHATS):
    """What forward takes, and all of the batch."""
    batch = batch_from(model, [sample(model, texts, i) for i, texts in enumerate(chats)])
    return {name: batch[name] for name in TRAINING}, batch


def prompt_batch(model, questions, first_seed=0):
    samples = [sample(model, [q], seed) for seed, q in enumerate(questions, first_seed)]
    batch = batch_from(model, samples, side="left")
    return {name: batch[name] for name in ANSWERING}


def mean_loss(model, batch):
    total, count = model(**batch)
    return total / count


@pytest.fixture(scope="module", params=KINDS, ids=str)
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
    _, whole = training_batch(ours)
    assert not whole["attention_mask"].all(), "the batch must be ragged, or padding is not tested"
    assert_same_model(ours, theirs, whole, {"pixel_values": whole["X_v"]})
    linear_1 = theirs.model.multi_modal_projector.linear_1
    pairs = {"W": (ours.W.weight, linear_1.weight), "the bias of W": (ours.W.bias, linear_1.bias),
             "the word embeddings": (ours.f_phi.get_input_embeddings().weight,
                                     theirs.model.language_model.embed_tokens.weight),
             "the head": (ours.f_phi.get_output_embeddings().weight, theirs.lm_head.weight)}
    for name, (mine, other) in pairs.items():
        assert mine.grad.any(), f"no gradient reaches {name}"
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4,
                                   msg=lambda m, n=name: f"gradient of {n}: {m}")


# -----------------------------------------------------------------------------
# g, W and the splice


def visual_features(model, X_v):
    """What goes into W when `encode_images` runs."""
    seen = []
    hook = model.W.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.encode_images(X_v)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("more", [{"feature_layer": 2}, {"feature_layer": -5}, {"projector": "W"}])
def test_a_layer_or_a_projector_that_there_is_not_is_named(more):
    """Layers count from the end: 23 would be taken for the last of 24 without a word."""
    with pytest.raises(ValueError, match="there are .*linear.*layers -4 .* to -1"):
        tiny_llava(**more)


@pytest.mark.parametrize("feature_layer, layers", [(-2, 2), (-1, 3)])
def test_Z_v_is_the_grid_of_the_chosen_CLIP_layer_without_CLS(feature_layer, layers):
    """Sec. 4.1 "before and after the last Transformer layer", Table 8. Oracle: CLIP's layers called
    one by one, so what lies behind the chosen one has no part in it."""
    model = tiny_llava(feature_layer=feature_layer)
    X_v = torch.randn(2, 3, 28, 28)
    Z_v = visual_features(model, X_v)
    all_states = model.g(X_v, output_hidden_states=True).hidden_states
    assert torch.equal(Z_v, all_states[feature_layer][:, 1:])
    with torch.no_grad():
        h = model.g.pre_layrnorm(model.g.embeddings(X_v))
        for layer in model.g.encoder.layers[:layers]:
            h = layer(h, None)
    assert Z_v.shape == (2, 4, 32), f"{tuple(Z_v.shape)}: (28 / 14)^2 = 4 tokens a picture, no CLS"
    torch.testing.assert_close(
        Z_v, h[:, 1:], msg=lambda m: f"Z_v is not the output of CLIP layer {layers} of 3: {m}")
    torch.testing.assert_close(model.encode_images(X_v), Z_v @ model.W.weight.T + model.W.bias)


def test_the_splice_equals_a_slow_loop(llava):
    """Sec. 4.1: row by row, each placeholder gets the next row of H_v, and every other id its word
    embedding."""
    batch, _ = training_batch(llava)
    H = llava.splice(batch["input_ids"], batch["X_v"], batch["visual_index"])
    Z_v = visual_features(llava, batch["X_v"])
    words, k = llava.f_phi.get_input_embeddings().weight, 0
    for row, ids in enumerate(batch["input_ids"].tolist()):
        for t, i in enumerate(ids):
            want = words[i]
            if i == llava.image_id:
                want = llava.W.weight @ Z_v[k // N, k % N] + llava.W.bias
                k += 1
            torch.testing.assert_close(
                H[row, t], want, msg=lambda m, at=(row, t): f"wrong embedding at {at}: {m}")
    assert k == 4 * N
    with pytest.raises(RuntimeError, match="one placeholder for each visual token"):
        llava.splice(batch["input_ids"], batch["X_v"], batch["visual_index"][1:])


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
def test_stage_1_trains_only_W_and_stage_2_also_phi_but_never_g(family, tied):
    """Sec. 4.2 "theta = W (the projection matrix)", then "theta = {W, phi}", and W alone again:
    all of theta moves, and what is frozen keeps every bit. Even a g that somebody thaws gets no
    gradient, for no graph is recorded through CLIP. There is no third stage."""
    model = tiny_llava(family, tied)
    batch, _ = training_batch(model)
    W = {"W.weight", "W.bias"}
    all_but_g = {n for n, _ in model.named_parameters() if not n.startswith("g.")}
    for stage, want in ((1, W), (2, all_but_g), (1, W)):
        theta = model.set_stage(stage)
        assert theta.keys() == want, f"stage {stage} would train {sorted(theta)[:5]}"
        moved = one_step(model, batch, theta)
        assert moved == want, f"stage {stage}, moved or not by mistake: {sorted(moved ^ want)}"
        model.g.requires_grad_(True)
        mean_loss(model, batch).backward()
        assert all(p.grad is None for p in model.g.parameters()), "a gradient flows into CLIP"
    with pytest.raises(ValueError, match="stage 3"):
        model.set_stage(3)


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


def test_answers_alone_reach_the_head_and_in_chunks_the_loss_is_the_same(llava, monkeypatch):
    """Eq. (3) is a sum over answers: (B, T, V) logits are never built, and of many answers, a chunk
    at a time reaches the vocabulary, whose logits are made again backwards."""
    batch, whole = training_batch(llava)
    A = (whole["labels"][:, 1:] != IGNORE).sum().item()
    assert A < whole["labels"].numel() / 2
    seen = []
    llava.f_phi.get_output_embeddings().register_forward_hook(
        lambda module, h, logits: seen.append(tuple(logits.shape)))
    results = []
    for chunk in (10**6, 5 * llava.f_phi.config.vocab_size):
        monkeypatch.setattr(model_py, "LOGITS_AT_ONCE", chunk)
        llava.zero_grad()
        loss, _ = llava(**batch)
        loss.backward()
        grads = [p.grad.clone() for p in llava.parameters() if p.grad is not None]
        results.append([loss.detach(), *grads])
    assert seen[:2] == [(A, 320)] * 2 and max(seen[2:]) == (5, 320), f"chunks of {seen}"
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("split", [[[0], [1], [2]], [[2, 0], [1]]])
def test_the_loss_does_not_depend_on_how_the_batch_is_split(llava, split):
    """Eq. (3), sum / count: micro-batches, ranks and order give one loss and one gradient of W."""
    batch, _ = training_batch(llava)
    total, count = llava(**batch)
    (total / count).backward()
    whole, parts = llava.W.weight.grad.clone(), []
    llava.zero_grad()
    for rows in split:
        part = batch_from(llava, [sample(llava, CHATS[i], i) for i in rows])
        parts.append(llava(*(part[name] for name in TRAINING)))
        (parts[-1][0] / count).backward()
    assert sum(n for _, n in parts) == count, "the number of answer tokens depends on the split"
    torch.testing.assert_close(sum(loss for loss, _ in parts), total,
                               msg=lambda m: f"the loss depends on the split: {m}")
    torch.testing.assert_close(llava.W.weight.grad, whole, atol=1e-6, rtol=1e-4)


def test_a_batch_of_text_alone_gives_W_a_zero_gradient(llava):
    """Sec. 4.2: not None; a rank without pictures would otherwise wait for ever for the others in
    the all-reduce."""
    batch, whole = training_batch(llava, [CHATS[1], ["Hi", "Yes."]])
    assert batch["X_v"].shape == (1, 3, 28, 28) and not len(batch["visual_index"])
    total, count = llava(**batch)
    total.backward()
    assert count == (whole["labels"] != IGNORE).sum() and total > 0
    for name, p in llava.W.named_parameters():
        assert p.grad is not None and not p.grad.any(), f"W.{name}.grad is {p.grad}"


def test_a_picture_that_two_samples_show_is_encoded_once(llava):
    """visual_index names its tokens twice; the loss is that of two copies."""
    one = sample(llava, CHATS[0])
    copy = one | {"pictures": [("a copy", picture) for _, picture in one["pictures"]]}
    results = []
    for second in (one, copy):
        batch = batch_from(llava, [one, second])
        results.append((len(batch["X_v"]), llava(*(batch[name] for name in TRAINING))[0]))
    assert [n for n, _ in results] == [1, 2]
    torch.testing.assert_close(results[0][1], results[1][1])


def test_score_is_the_log_likelihood_of_the_answer(pair):
    """Eq. (3): log p(X_a | X_v, X_instruct), a product over the row's answer tokens. Oracle:
    transformers' logits."""
    ours, theirs = pair
    batch, whole = training_batch(ours)
    with torch.no_grad():
        logits = theirs(input_ids=whole["input_ids"], pixel_values=whole["X_v"],
                        attention_mask=whole["attention_mask"]).logits
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), whole["labels"][:, 1:], reduction="none")    # 0 elsewhere
    torch.testing.assert_close(ours.score(**batch), -nll.sum(1), atol=1e-4, rtol=1e-5)


# -----------------------------------------------------------------------------
# A shape comment is a claim


def shape_comments(source):
    """{last line: shapes} of the statements that end in `# (B, T, D)`."""
    shape = r"\((?:[A-Z](?:_v)?(?:-1)?|\d+|, ?|,)*\)"
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        claim = re.match(rf"#\s+({shape}(?:, {shape})*)(?:\s|$)", token.string)
        if token.type == tokenize.COMMENT and claim:
            found[token.start[0]] = re.findall(shape, claim[1])
    return found


class WithChecks(ast.NodeTransformer):
    """A program whose statements in some lines hand what they made to check(line, it)."""

    def __init__(self, lines):
        self.lines = lines

    def check(self, node, made):
        return ast.parse(f"check({node.end_lineno}, {ast.unparse(made)})").body[0]

    def visit_Assign(self, node):
        if node.end_lineno not in self.lines:
            return node
        return [node, self.check(node, node.targets[0])]

    def visit_Return(self, node):
        if node.end_lineno in self.lines:
            node.value = self.check(node, node.value).value
        return node


def test_every_shape_comment_of_the_model_is_true():
    """Sec. 4.1's notation: `# (B, T, D)` in model.py is compared with the shape at run time,
    statement by statement."""
    with open(model_py.__file__, encoding="utf-8") as f:
        source = f.read()
    claims = shape_comments(source)
    seen = []                            # (line, claimed shape, actual shape, letters)

    def check(line, made):
        values = made if isinstance(made, tuple) else (made,)
        shapes = claims[line] if len(claims[line]) > 1 else claims[line] * len(values)
        for shape, value in zip(shapes, values, strict=True):
            seen.append((line, shape, tuple(value.shape), letters))
        return made

    program = ast.fix_missing_locations(WithChecks(claims).visit(ast.parse(source)))
    module = {"__name__": "checked", "check": check}
    exec(compile(program, model_py.__file__, "exec"), module)
    model = module["LLaVA"](tiny_clip(), tiny_llm(), byte_tokenizer()).eval()
    sizes = {"B": 3, "N": N, "D_v": 32, "D": 48, "V": 320}
    for chats in ([CHATS[0], CHATS[1], [IMAGE, "A ball."]],                       # K = 2
                  [CHATS[1], ["Hi", "Yes."], ["Why?", "Who knows?"]]):            # a blank square
        batch, _ = training_batch(model, chats)
        letters = sizes | {"K": len(batch["X_v"]), "T": batch["input_ids"].shape[1],
                           "A": len(batch["answer_index"])}
        assert len(set(letters.values())) == len(letters), "two are equal: one hides the other"
        model(**batch)
        model.score(**batch)
    batch = prompt_batch(model, [f"{IMAGE}\nWhat is this?", "Hi", f"{IMAGE}?"])
    letters = sizes | {"K": 2, "T": batch["input_ids"].shape[1]}
    for temperature in (0.0, 1.0):
        model.generate(**batch, max_new_tokens=3, temperature=temperature)
    for line, shape, actual, letters in seen:
        assert eval(shape, {}, letters) == actual, f"line {line} says {shape}; it is {actual}"
    unchecked = sorted(claims.keys() - {line for line, *_ in seen})
    assert not unchecked, f"shape comments in lines {unchecked} of model.py were never reached"
    assert len(claims) >= 12, "hardly any shape comment is left in model.py"


# -----------------------------------------------------------------------------
# Generation


QUESTIONS = [f"{IMAGE}\nWhat is this?", "Hi",
             f"{IMAGE}{IMAGE}\nAre these two equal, or do they differ at all?", "Why?"]


def speaker():
    """A model whose greedy answers are lower-case letters: every other row of its head is zero."""
    model = tiny_llava()
    letters = model.tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
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
    bos, eos = llava.tokenizer.bos_token_id, llava.tokenizer.eos_token_id
    for stop in (("###", "Human"), ("Human", "###"), ("cat\n", "###")):
        assert llava.to_text([*ids, eos], stop) == "A cat."
    assert llava.to_text([bos, *ids, eos]) == "A cat. ### Human: ab"
    assert llava.to_text([]) == "" and llava.to_text(ids[:1], ("x",)) == ""


@pytest.mark.parametrize("temperature, top_p, kept", [
    (1, 1, 5), (0.5, 1, 5), (2, 0.7, 3), (1, 0.6, 2), (1, 0.4, 1), (1, 0, 1)])
def test_sample_id_draws_from_the_nucleus_with_the_right_frequencies(temperature, top_p, kept):
    """softmax(logits / temperature), cut to the fewest ids that hold top_p of the mass, and never
    to none: clients that mean greedy send top_p 0. Renormalised; unsorted logits."""
    logits = torch.tensor([0.1, 2.0, -1.0, 1.3, 0.6])
    p = [torch.exp(x / temperature).item() for x in logits]
    p = [x / sum(p) for x in p]
    nucleus, mass = [], 0.0
    for i in sorted(range(5), key=lambda i: -p[i]):
        if mass < top_p or not nucleus:
            nucleus.append(i)
            mass += p[i]
    assert len(nucleus) == kept, f"this case is meant to keep {kept} ids"
    n = 40_000
    ids = sample_id(logits.expand(n, 5), temperature, top_p, torch.Generator().manual_seed(0))
    for i, count in enumerate(torch.bincount(ids, minlength=5).tolist()):
        want = p[i] / mass if i in nucleus else 0.0
        off = abs(count / n - want)
        assert off <= 5 * (want * (1 - want) / n) ** 0.5, f"id {i}: {count / n:.4f}, not {want:.4f}"


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


@pytest.mark.parametrize("family, more", [
    ("llama", {}), ("mistral", {}), ("qwen2", {}), ("mistral", {"sliding_window": 16})])
@torch.no_grad()
def test_a_ragged_batch_answers_as_its_rows_do_without_cache_or_padding(family, more):
    """Sec. 4.1: cache, padding and other rows change no greedy answer, also behind a window."""
    model = LLaVA(tiny_clip(), tiny_llm(family, **more), byte_tokenizer()).eval()
    together = model.generate(**prompt_batch(model, QUESTIONS), max_new_tokens=20)
    for i, question in enumerate(QUESTIONS):
        alone = prompt_batch(model, [question], first_seed=i)
        assert together[i] == greedy(model, alone, 20), f"row {i} answers otherwise in a batch"


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
