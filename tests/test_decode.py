"""Answering fast (decode.py) and looking inside (attention.py): equal to transformers' modules, cached equal to uncached."""
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

import attention
import decode
import sample
import tiles
from conftest import byte_tokenizer, tiny_clip, tiny_llava, tiny_llm
from data import TEMPLATES, collate, prompt
from decode import Fast, Past, Plain, decoder_of
from images import view_of
from model import LLaVA

QUESTIONS = ["Who?", "What is 0.0?", "Is there a cat in the picture, or a dog?", "Why"]


def picture(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


def batch_of(model, questions, seed=0):
    """Prompts of different lengths, a picture each."""
    samples = [prompt([{"from": "human", "value": f"<image>\n{q}"}], [picture(seed + i)], model.tokenizer,
                      TEMPLATES["vicuna_v1"], model.view) for i, q in enumerate(questions)]
    batch = collate(samples, side="left")
    return {k: batch[k] for k in ("input_ids", "attention_mask", "X_v", "sizes")}


def ids_of(model, batch, **how):
    rows = list(zip(*model.stream(**batch, **how)))
    return [[i for i in row if i is not None] for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Fast


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family, more", [("llama", {}), ("llama", {"tied": True}), ("mistral", {"sliding_window": None}),
                                          ("qwen2", {}), ("llama", {"attention_bias": True})])
def test_the_written_out_layers_say_what_those_of_transformers_say(family, more, packed, monkeypatch):
    """Sec. 4.1's f_phi: logits (1e-4) and greedy ids of a ragged batch, at every step, with plain and with packed weights."""
    monkeypatch.setattr(decode, "PACKED", 0 if packed else 10 ** 9)
    model = LLaVA(tiny_clip(), tiny_llm(family, **more), byte_tokenizer()).eval()
    for name, p in model.f_phi.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)            # zeros would hide a bias that was left out
    batch, logits, ids = batch_of(model, QUESTIONS), {}, {}
    for decoder in (Plain(model.f_phi), decoder_of(model.f_phi)):
        model.decoder, seen = decoder, []
        ids[type(decoder)] = ids_of(model, batch, max_new_tokens=20, watch=lambda x, seen=seen: seen.append(x))
        logits[type(decoder)] = seen
    assert set(ids) == {Plain, Fast}, "the family is not known: nothing was compared"
    assert ids[Fast] == ids[Plain]
    for theirs, ours in zip(logits[Plain], logits[Fast], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_greedy_answers_are_those_of_generate_on_the_same_folder(tmp_path):
    """The same folder, loaded by transformers, one question at a time."""
    model = tiny_llava()
    model.save_pretrained(tmp_path)
    theirs, model.decoder = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval(), decoder_of(model.f_phi)
    for question in QUESTIONS:
        batch = batch_of(model, [question])
        want = theirs.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=batch["X_v"],
                               max_new_tokens=20, do_sample=False, suppress_tokens=[model.image_id])
        assert ids_of(model, batch, max_new_tokens=20)[0] == want[0, batch["input_ids"].shape[1]:].tolist()


@pytest.mark.parametrize("more, kind", [({"sliding_window": 16}, Plain), ({"sliding_window": None}, Fast)])
def test_what_is_not_known_keeps_the_modules_of_transformers(more, kind):
    """A window of attention is not written out in Fast, so such a model must not get it."""
    assert type(decoder_of(tiny_llm("mistral", **more))) is kind


@pytest.mark.slow
def test_compiled_steps_answer_the_same():
    """--compile: static shapes, a mask over the whole cache, in a batch that shrinks."""
    model = tiny_llava()
    batch = batch_of(model, QUESTIONS[:2])
    want = ids_of(model, batch, max_new_tokens=12)
    model.decoder = decoder_of(model.f_phi, compiled=True)
    assert ids_of(model, batch, max_new_tokens=12) == want
    with pytest.raises(ValueError, match="--compile: a language model of type mistral is not one of"):
        decoder_of(tiny_llm("mistral", sliding_window=16), compiled=True)


@pytest.mark.parametrize("kind", [Plain, Fast])
def test_a_batch_shrinks_as_rows_end_and_says_what_its_rows_say_alone(kind):
    """Rows that have ended cost nothing more once half of them have: the number of rows that are computed falls."""
    model = tiny_llava()
    free = ids_of(model, batch_of(model, QUESTIONS), max_new_tokens=24)
    ends = {row[k] for k, row in zip((2, 5, 9), free)}   # make ids that some rows come to end them
    model.f_phi.generation_config.eos_token_id = sorted(ends)
    model.decoder, rows = kind(model.f_phi), []
    together = ids_of(model, batch_of(model, QUESTIONS), max_new_tokens=24, watch=lambda logits: rows.append(len(logits)))
    assert rows[0] == 4 and rows[-1] < 3 and rows == sorted(rows, reverse=True), f"rows computed at each step: {rows}"
    assert len({len(row) for row in together}) > 1, "all rows end at once: nothing was tested"
    for i, question in enumerate(QUESTIONS):
        assert together[i] == ids_of(model, batch_of(model, [question], seed=i), max_new_tokens=24)[0], f"row {i}"


# ---------------------------------------------------------------------------------------------------------------------
# The conversation before


@pytest.fixture
def talker(tmp_path):
    return make_talker(tmp_path / "model")


def make_talker(folder, aspect="crop", **flags):
    model = tiny_llava()
    if aspect != "crop":
        model.look(view_of(aspect, 28, 14))
    model.tokenizer.chat_template = TEMPLATES["vicuna_v1"].jinja()
    model.meta |= {"template": "vicuna_v1", "stage": 2}
    model.save_pretrained(folder)
    return sample.Talker(sample.Config(str(folder), temperature=0.0, max_new_tokens=12, **flags))


def entered(talker, monkeypatch):
    """The list that gets the number of tokens of each call of `extend`."""
    calls, extend = [], talker.model.decoder.extend
    monkeypatch.setattr(talker.model.decoder, "extend",
                        lambda cache, H, *rest: [calls.append(H.shape[1]), extend(cache, H, *rest)][1])
    return calls


@pytest.mark.parametrize("aspect", ["crop", "anyres"])
def test_a_second_turn_computes_only_what_is_new_and_says_the_same(aspect, tmp_path, monkeypatch):
    """A chat about a picture: g sees it once, its tokens go through f_phi once, and each answer is that of a fresh start."""
    talker, turns, shown = make_talker(tmp_path / "model", aspect), [], [picture(3)]
    calls, squares = entered(talker, monkeypatch), []
    monkeypatch.setattr(talker.model, "grid_features", lambda X_v, real=talker.model.grid_features: [
        squares.append(len(X_v)), real(X_v)][1])
    for k, question in enumerate(["What is 0.0?", "Why?", "And now?"]):
        turns.append(talker.ask(question, 1 if k == 0 else 0))
        fresh, = talker.answers([(turns, shown)])
        calls.clear(), squares.clear()
        answer = "".join(talker.stream(turns, shown))
        assert answer == fresh and len(answer) > 2
        if k:
            assert squares == [0], "the picture was encoded again"
            assert calls[0] < 60 and len(talker.pasts) == 1, f"{calls[0]} tokens of the prompt were computed"
        else:
            assert calls[0] > 60 and squares[0] >= 1
        turns.append({"from": "gpt", "value": answer})


def test_another_picture_another_order_and_a_stopped_answer_are_no_common_past(talker):
    """What is remembered is used only where ids and pictures are the same; an answer that was stopped leaves what it had."""
    one, other = picture(1), picture(2)
    ask = lambda question, n=1: [talker.ask(question, n)]
    said = {}
    for turn, pictures in [(ask("Who?"), [one]), (ask("Who?"), [other]), (ask("Who?", 2), [one, other]),
                           (ask("Who?", 2), [other, one]), (ask("Who?"), [one]), (ask("Who is it?"), [one]),
                           (ask("Who?", 0), [])]:
        fresh, = talker.answers([(turn, pictures)])
        assert "".join(talker.stream(turn, pictures)) == fresh
        said[turn[0]["value"], tuple(map(id, pictures))] = fresh
    assert len(set(said.values())) >= 5, "the answers are alike: nothing was tested"
    stream = talker.stream(ask("Who?"), [one])
    next(stream)
    stream.close()
    assert "".join(talker.stream(ask("Who?"), [one])) == said["<image>\nWho?", (id(one),)]
    assert len(talker.pasts) <= sample.PASTS


def test_a_common_past_never_cuts_a_picture_and_leaves_a_token_to_compute():
    """ids 9 are a picture's: of two different ones behind the same words, only the words are common."""
    past = Past()
    past.ids, past.pictures = [1, 2, 9, 9, 3, 4], ["a"]
    assert past.common([1, 2, 9, 9, 3, 4, 5], ["a"], [2], 9) == (6, 1)
    assert past.common([1, 2, 9, 9, 3, 4], ["a"], [2], 9) == (5, 1), "the next word would be seen from nowhere"
    assert past.common([1, 2, 9, 9, 3, 4, 5], ["b"], [2], 9) == (2, 0)
    assert past.common([1, 2, 9, 9, 9, 9, 5], ["a", "b"], [2, 2], 9) == (4, 1)
    assert past.common([1, 7, 9, 9, 3], ["a"], [2], 9) == (1, 0)
    assert past.common([1, 2, 9, 9, 9, 5], ["a"], [3], 9) == (2, 0), "a picture of other tokens"
    assert past.common([1, 2, 5], [], [], 9) == (2, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Where it looked, what else it could have said


def test_attention_is_what_transformers_reports_for_the_tokens_of_each_word(talker):
    """output_attentions of transformers' eager attention: the maps' sums are the shares on the picture's tokens."""
    turns, shown = [talker.ask("What is 0.0?", 1)], [picture(3)]
    words = talker.attention(turns, shown, "a b\u00e9 c", layers=[1], heads=[0, -1])
    assert [word for word, _ in words] == ["a", "b\u00e9", "c"]
    m, template = talker.model, TEMPLATES["vicuna_v1"]
    before = prompt(turns, shown, m.tokenizer, template, m.view)
    ids = before["input_ids"] + m.tokenizer.encode(" a b\u00e9 c", add_special_tokens=False)
    with torch.no_grad():
        H = m.splice(torch.tensor([ids]), before["X_v"])
        m.f_phi.set_attn_implementation("eager")
        weights = m.f_phi.base_model(inputs_embeds=H, output_attentions=True).attentions[1][0, [0, 3]].mean(0)   # (T, T)
    on_picture = weights[:, torch.tensor(ids) == m.image_id].sum(1)
    at = len(before["input_ids"]) - 1                    # a byte is a token: " ", "a", " ", "b", two of "\u00e9", " ", "c"
    for (_, (heat,)), span in zip(words, ([1], [3, 4, 5], [7])):
        want = on_picture[[at + k for k in span]].mean().item()
        assert heat.sum() == pytest.approx(want, rel=1e-3), "not the attention of the positions that predict this word"
        assert heat.shape == (336, 448) and 0 < heat.sum() < 1


@pytest.mark.parametrize("aspect, size", [("crop", (300, 200)), ("pad", (300, 200)), ("anyres", (300, 200)),
                                          ("hd", (130, 500))])
def test_a_map_is_bright_where_the_patch_lay(aspect, size):
    """Each visual token's weight lies on the pixels that it saw: the patch around a point is found by painting that point."""
    view = view_of(aspect, 56, 14)
    for point in [(0.5, 0.5), (0.35, 0.6), (0.6, 0.3)]:
        x, y = (int(p * s) for p, s in zip(point, size))
        black, white = np.zeros((*size[::-1], 3), np.uint8), np.zeros((*size[::-1], 3), np.uint8)
        white[max(0, y - 9):y + 9, max(0, x - 9):x + 9] = 255
        change = (view.X_v([Image.fromarray(white)]) - view.X_v([Image.fromarray(black)])).abs().mean(1)     # (K, 56, 56)
        patches = torch.nn.functional.avg_pool2d(change[:, None], 14).flatten(1)[..., None]                 # (K, 16, 1)
        if view.tiling:
            merged, = tiles.merge(patches, [view.tiling.plan(*size)], torch.zeros(1), view.tiling)
            weights = merged[:, 0]
        else:
            weights = patches[0, :, 0]
        heat = attention.on_picture(view, size, weights)
        peak = np.unravel_index(heat.argmax(), heat.shape)
        scale = attention.SIDE / max(size)
        patch = 14 / 56 * (min(size) if aspect == "crop" else max(size))
        assert abs(peak[1] / scale - x) < patch and abs(peak[0] / scale - y) < patch, (point, peak[1] / scale, peak[0] / scale)


def test_pictures_of_where_it_looked_are_written_and_a_wrong_layer_is_named(talker, tmp_path, capsys):
    """sample.py --show_attn: a PNG of the picture's size for each word of the answer."""
    picture(3).save(tmp_path / "x.png")
    argv = ["--model", str(tmp_path / "model"), "--image", str(tmp_path / "x.png"), "--question", "Who?", "--temperature", "0"]
    sample.main([*argv, "--max_new_tokens", "12", "--show_attn", str(tmp_path / "looks"), "--attn_layers", "0,-1"])
    answer, *paths, together = capsys.readouterr().out.strip().split("\n")
    assert len(paths) == len(answer.split()) and all(Image.open(path).size == (40, 30) for path in paths)
    assert Image.open(together).width > 40
    with pytest.raises(ValueError, match="layer 7: the language model has 2, 0 to 1, or -2 to -1 from the end"):
        sample.main([*argv, "--show_attn", str(tmp_path / "looks"), "--attn_layers", "7"])
    with pytest.raises(ValueError, match="--attn_heads 'x': numbers with commas"):
        sample.main([*argv, "--show_attn", str(tmp_path / "looks"), "--attn_heads", "x"])
    with pytest.raises(ValueError, match="--show_attn needs an --image"):
        sample.main([*argv[:2], *argv[4:], "--show_attn", str(tmp_path / "looks")])


def test_alternatives_are_the_likeliest_ids_of_each_step(talker, tmp_path, capsys):
    """--top_k_tokens: probabilities of Eq. (3)'s factors; greedily, the first alternative is what was said."""
    steps = list(talker.alternatives([talker.ask("Who?")], [], 3))
    assert len(steps) > 2 and all(new == some[0][0] and some == sorted(some, key=lambda s: -s[1]) for new, some in steps)
    assert all(0 < sum(p for _, p in some) <= 1 for _, some in steps)
    sample.main(["--model", str(tmp_path / "model"), "--question", "Who?", "--temperature", "0", "--max_new_tokens", "12",
                 "--top_k_tokens", "3"])
    assert len(capsys.readouterr().out.strip().split("\n")) == len(steps)


def test_given_answers_are_ranked_by_their_likelihood(talker, tmp_path, capsys):
    """--rank: log p of Eq. (3), and the greedy answer's first word beats others."""
    turns, shown, m = [talker.ask("Who?", 1)], [picture(3)], talker.model
    ranked = talker.rank(turns, shown, ["yes", "no", "a longer answer"])
    assert [p for p, _ in ranked] == sorted((p for p, _ in ranked), reverse=True)
    before = prompt(turns, shown, m.tokenizer, TEMPLATES["vicuna_v1"], m.view)
    for log_p, answer in ranked:
        ids = before["input_ids"] + m.tokenizer.encode(f" {answer}</s>", add_special_tokens=False)
        with torch.no_grad():
            logits = m.f_phi(inputs_embeds=m.splice(torch.tensor([ids]), before["X_v"])).logits[0].log_softmax(-1)
        n = len(before["input_ids"])
        assert log_p == pytest.approx(sum(logits[k - 1, ids[k]].item() for k in range(n, len(ids))), rel=1e-4)
    picture(3).save(tmp_path / "x.png")
    sample.main(["--model", str(tmp_path / "model"), "--image", str(tmp_path / "x.png"), "--question", "Who?", "--rank", "yes",
                 "no", "a longer answer"])
    assert [line.split(None, 1)[1] for line in capsys.readouterr().out.strip().split("\n")] == [a for _, a in ranked]


# ---------------------------------------------------------------------------------------------------------------------
# 8 bits


def test_8_bit_weights_change_the_logits_little_and_g_not(tmp_path):
    """--int8: f_phi's weights alone, by torchao."""
    pytest.importorskip("torchao")
    talker, exact = make_talker(tmp_path / "a", int8=True), tiny_llava()
    batch, logits = batch_of(exact, QUESTIONS[:2]), []
    for model in (exact, talker.model):
        ids_of(model, batch, max_new_tokens=1, watch=logits.append)
    change, size = (logits[0] - logits[1]).nan_to_num().abs().max(), logits[0][logits[0].isfinite()].abs().max()
    assert 0 < change < 0.05 * size, f"{change} of {size}"
    for (name, a), b in zip(exact.g.named_parameters(), talker.model.g.parameters()):
        assert torch.equal(a, b), name


def test_without_torchao_the_error_says_what_to_install(talker, tmp_path, monkeypatch):
    """A library that is missing is named, with the command that installs it."""
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match="--int8 needs torchao: pip install torchao"):
        sample.main(["--model", str(tmp_path / "model"), "--question", "Who?", "--int8"])
