"""The engine gives model.generate's tokens: in a batch or alone, in a chat or from its start."""
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, chat, noise, tiny_clip, tiny_llava, tiny_llm
from torch._dynamo.backends.common import aot_autograd

from data import collate, sample_of
from model import LLaVA
from parts import decoders
from parts.decoders import Fast, Plain, decoder_for
from parts.engine import Engine, Prefix
from parts.ranks import ANSWERING
from parts.templates import TEMPLATES
from parts.views import view_of

QUESTIONS = ["Who?", "What is 0.0?", "Is there a cat in the picture, or a dog?", "Why"]
VICUNA = TEMPLATES["vicuna_v1"]
VIEW = view_of("crop", 28, 14)
SAMPLING = {"stop": ["</s>"], "max_new_tokens": 20}


def prompt_of(model, texts, seeds, view=VIEW):
    """A conversation of texts, question and answer by turns, about pictures of these seeds."""
    turns = chat("<image>\n" * len(seeds) + texts[0], *texts[1:])
    pictures = [(seed, noise(seed=seed)) for seed in seeds]
    return sample_of(turns, pictures, model.tokenizer, VICUNA, view)


def batch_of(model, questions=QUESTIONS, first_seed=0):
    """Prompts of different lengths, each with a picture of its own, padded on the left."""
    prompts = [prompt_of(model, [question], [seed])
               for seed, question in enumerate(questions, first_seed)]
    return collate(prompts, VIEW, side="left")


def generated(model, batch, **sampling):
    """The clear version's answers."""
    return model.generate(**{name: batch[name] for name in ANSWERING}, **sampling)


def ids_of(engine, batch, **sampling):
    rows = zip(*engine.stream(batch, **sampling), strict=True)
    return [[i for i in row if i is not None] for row in rows]


def watched(decoder, monkeypatch):
    """The list that gets (rows, tokens, logits) of each call of `extend`."""
    calls = []
    extend = decoder.extend

    def watch(cache, H, position, mask):
        logits = extend(cache, H, position, mask)
        calls.append((*H.shape[:2], logits.clone()))
        return logits
    monkeypatch.setattr(decoder, "extend", watch)
    return calls


# -----------------------------------------------------------------------------
# The same tokens


@pytest.mark.parametrize("family, more, packed", [
    ("llama", {"tied": True}, False), ("llama", {"attention_bias": True}, True),
    ("mistral", {"sliding_window": None}, True), ("qwen2", {}, False),
    ("qwen3", {"head_dim": 20}, False), ("qwen3", {"head_dim": 20}, True),
    ("smollm3", {"no_rope_layers": [1, 0]}, False)])
def test_written_out_layers_give_the_logits_of_transformers(family, more, packed, monkeypatch):
    """f_phi of Sec. 4.1: logits (1e-4) at every step of a ragged batch, and generate's answers."""
    monkeypatch.setattr(decoders, "MIN_PACKED", 0 if packed else 10 ** 9)
    model = LLaVA(tiny_clip(), tiny_llm(family, **more), byte_tokenizer()).eval()
    for name, p in model.f_phi.named_parameters():
        if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(p, std=0.3)        # zeros would hide a bias that was left out
    batch = batch_of(model)
    expected = generated(model, batch, **SAMPLING)
    logits = {}
    for decoder in (Plain(model.f_phi), decoder_for(model.f_phi)):
        engine = Engine(model)
        engine.decoder = decoder
        calls = watched(decoder, monkeypatch)
        assert engine.generate(batch, **SAMPLING) == expected
        logits[type(decoder)] = [logits for _, _, logits in calls]
    for theirs, ours in zip(logits[Plain], logits[Fast], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature, top_p", [(1.5, 0.7), (2.0, 0.0)])
def test_draws_are_those_of_generate_under_the_same_seed(temperature, top_p):
    """--temperature and --seed mean the same in the clear version and in the fast one."""
    model = tiny_llava()
    batch = batch_of(model)

    def answers(generate):
        return generate(batch, temperature=temperature, top_p=top_p, max_new_tokens=20,
                        generator=torch.Generator().manual_seed(3))
    expected = answers(lambda batch, **sampling: generated(model, batch, **sampling))
    assert answers(Engine(model).generate) == expected
    greedy = generated(model, batch, max_new_tokens=20)
    assert (expected == greedy) == (top_p == 0), "top_p 0 leaves the likeliest word alone"


@pytest.mark.parametrize("window, kind", [(16, Plain), (None, Fast)])
def test_what_is_not_written_out_runs_on_the_modules_of_transformers(window, kind):
    """A window of attention is not in Fast, so such a model must not get it."""
    assert type(decoder_for(tiny_llm("mistral", sliding_window=window))) is kind


def compile_with(monkeypatch, backend):
    """torch.compile without the minutes of its own backend, asked as its CUDA graphs are."""
    compiled = torch.compile

    def compile_(f, **asked):
        assert asked == {"mode": "reduce-overhead", "dynamic": False, "fullgraph": True}
        return compiled(f, backend=backend, dynamic=False, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_)


@pytest.mark.slow
def test_compiled_steps_give_the_same_ids(monkeypatch):
    """--compile: static shapes, one cache. A batch whose rows end one by one, a conversation that
    outgrows its room, and another one between its turns."""
    compile_with(monkeypatch, "aot_eager")
    model = tiny_llava()
    engine = Engine(model, compile=True)
    batch = batch_of(model, QUESTIONS[:2])
    free = generated(model, batch, max_new_tokens=12)
    stop = free[0][3:6]
    assert stop not in free[1], "both rows end at once: nothing was tested"
    assert engine.generate(batch, max_new_tokens=12, stop=[stop]) == [free[0][:3], free[1]]
    turns = []
    for k, question in enumerate(["What is 0.0?", "Why? " * 20, "And now?"]):
        turns.append(question)
        answer, fresh = chat_turn(engine, turns, [3])
        assert answer == fresh, f"turn {k}"
        turns.append(answer)
        if k == 1:
            answer, fresh = chat_turn(engine, ["Is this another one?"], [4])
            assert answer == fresh
    with pytest.raises(ValueError, match="--compile: a language model of type mistral is not one"):
        decoder_for(tiny_llm("mistral", sliding_window=16), compiled=True)


@pytest.mark.slow
def test_a_compiled_step_copies_neither_weights_nor_cache(monkeypatch):
    """CUDA graphs copy what they do not know to stay where it is: here one token's numbers alone,
    of which torch tells the compiler."""
    copied = []

    def compiler(graph, inputs):
        known = torch._guards.TracingContext.get().fw_metadata.static_input_indices
        copied.append(sum(x.nbytes for i, x in enumerate(inputs) if i not in known))
        return graph.forward

    compile_with(monkeypatch, aot_autograd(fw_compiler=compiler))
    model = LLaVA(tiny_clip(), tiny_llm("qwen3"), byte_tokenizer()).eval()
    engine = Engine(model, compile=True)
    batch = batch_of(model, QUESTIONS[:1])
    for _ in range(2):                   # the second conversation is not compiled anew
        assert engine.generate(batch, **SAMPLING) == generated(model, batch, **SAMPLING)
    assert len(copied) == 1 and copied[0] < 2000 < model.f_phi.lm_head.weight.nbytes, copied


@pytest.mark.parametrize("kind", [Plain, Fast])
def test_rows_that_end_leave_and_the_others_say_what_they_say_alone(kind, monkeypatch):
    """Once half of the rows have ended they cost nothing more, and change nothing."""
    model = tiny_llava()
    engine = Engine(model)
    engine.decoder = kind(model.f_phi)
    free = ids_of(engine, batch_of(model), max_new_tokens=24)
    # make ids that some rows come to end them
    ends = {row[k] for k, row in zip((2, 5, 9), free, strict=False)}
    model.f_phi.generation_config.eos_token_id = sorted(ends)
    calls = watched(engine.decoder, monkeypatch)
    together = ids_of(engine, batch_of(model), max_new_tokens=24)
    rows = [B for B, _, _ in calls]
    assert rows[0] == 4 and rows[-1] < 3 and rows == sorted(rows, reverse=True), rows
    assert len({len(row) for row in together}) > 1, "all rows end at once: nothing was tested"
    for i, question in enumerate(QUESTIONS):
        alone = ids_of(engine, batch_of(model, [question], first_seed=i), max_new_tokens=24)
        assert [together[i]] == alone, f"row {i}"


# -----------------------------------------------------------------------------
# The conversation before


def chat_turn(engine, turns, seeds, view=VIEW, stop_after=None):
    """One answer, with what earlier ones left; and the same from a fresh start."""
    sample = prompt_of(engine.model, turns, seeds, view)
    prefix, rest = engine.recall(sample, view)
    pieces = engine.pieces(collate([rest], view), prefix, **SAMPLING)
    if stop_after:
        answer = "".join(next(pieces) for _ in range(stop_after))
        pieces.close()
    else:
        answer = "".join(pieces)
    fresh, = Engine(engine.model).generate(collate([sample], view), **SAMPLING)
    return answer, fresh


@pytest.mark.parametrize("aspect", ["crop", "anyres"])
def test_a_second_turn_computes_only_what_is_new_and_says_the_same(aspect, monkeypatch):
    """g sees a picture once, its tokens go through f_phi once; each answer is a fresh start's."""
    model = tiny_llava()
    view = view_of(aspect, 28, 14)
    if view.tiling:
        model.add_newline()
    engine = Engine(model)
    calls = watched(engine.decoder, monkeypatch)
    encoded = []
    encode_images = model.encode_images
    monkeypatch.setattr(model, "encode_images",
                        lambda X_v: encoded.append(X_v) or encode_images(X_v))
    turns = []
    for k, question in enumerate(["What is 0.0?", "Why?", "And now?"]):
        turns.append(question)
        calls.clear()
        encoded.clear()
        answer, fresh = chat_turn(engine, turns, [3], view)
        assert answer == fresh and len(answer) > 2
        n_computed = calls[0][1]
        if k == 0:
            assert n_computed > 100 and len(encoded) == 2        # once by a fresh start
        else:
            assert n_computed < 60, f"{n_computed} tokens were computed"
            assert len(encoded) == 1, "the picture was encoded again"
        turns.append(answer)
    assert len(engine.prefixes) == 1


def test_only_the_same_words_and_pictures_are_a_common_prefix():
    """Another picture, another order, a stopped answer: what follows is as from a fresh start."""
    engine = Engine(tiny_llava())
    fresh_answers = set()
    for question, seeds in [("Who?", [1]), ("Who?", [2]), ("Who?", [1, 2]), ("Who?", [2, 1]),
                            ("Who?", [1, 1]), ("Who?", [1]), ("Who is it?", [1]), ("Who?", [])]:
        answer, fresh = chat_turn(engine, [question], seeds)
        assert answer == fresh, f"{question} about {seeds}"
        fresh_answers.add(fresh)
    assert len(fresh_answers) >= 5, "the answers are alike: nothing was tested"
    stopped, fresh = chat_turn(engine, ["Who?"], [1], stop_after=1)
    assert len(stopped) < len(fresh)
    assert chat_turn(engine, ["Who?"], [1]) == (fresh, fresh)
    assert len(engine.prefixes) <= 4


def test_two_conversations_at_once_keep_their_caches(monkeypatch):
    """A system message that they share is no reason to give one of them up."""
    monkeypatch.setattr("parts.engine.MIN_SHARED", 175)      # a byte is a token here
    engine = Engine(tiny_llava())
    calls = watched(engine.decoder, monkeypatch)
    turns = {1: ["What do you see?"], 2: ["And what do you see in this one?"]}
    for _ in range(2):
        for seed, texts in turns.items():
            calls.clear()
            answer, fresh = chat_turn(engine, texts, [seed])
            assert answer == fresh
            if len(texts) > 1:
                assert calls[0][1] < 100, "the other conversation took this one's cache"
            texts += [answer, "Why?"]


def test_a_prefix_cuts_no_picture_and_leaves_a_token_to_compute():
    """A tuple is a picture's token, (its number, its name)."""
    a, b, again = (0, "a"), (0, "b"), (1, "a")
    prefix = Prefix([1, 2, a, a, 3, 4])
    prefix.cache = SimpleNamespace(length=6)
    assert prefix.shared([1, 2, a, a, 3, 4, 5]) == 6
    assert prefix.shared([1, 2, a, a, 3, 4]) == 5, "the next word would be seen from nowhere"
    assert prefix.shared([1, 2, b, b, 3, 4, 5]) == 2
    assert prefix.shared([1, 2, a, a, again, again, 5]) == 4
    assert prefix.shared([1, 2, a, a, a, 5]) == 2, "a picture of other tokens"
    assert prefix.shared([1, 2, a, a]) == 2, "a prompt that ends in its picture"
    assert prefix.shared([1, 2, 5]) == 2


# -----------------------------------------------------------------------------
# 8 bits


def test_8_bit_weights_change_the_logits_little_and_g_not(monkeypatch):
    """--dtype int8: f_phi's weights alone, by torchao."""
    pytest.importorskip("torchao")
    exact, rounded = Engine(tiny_llava()), Engine(tiny_llava(), int8=True)
    logits = []
    for engine in (exact, rounded):
        calls = watched(engine.decoder, monkeypatch)
        engine.generate(batch_of(engine.model), max_new_tokens=1)
        logits.append(calls[0][2])
    change = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert 0 < change < 0.05, f"{change} of the largest logit"
    for (name, p), q in zip(exact.model.g.named_parameters(), rounded.model.g.parameters(),
                            strict=True):
        assert torch.equal(p, q), name
