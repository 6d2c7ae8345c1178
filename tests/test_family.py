"""The family: LLaVA-1.5 and LLaVA-NeXT (Diss. Sec. 4.3, 4.7) against transformers, in both directions."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration)

import data
import sample
import tiles
from conftest import answer_logits, byte_tokenizer, tiny_llava
from data import TEMPLATES, collate, each_once, encode, prompt, render
from images import ASPECTS, View, view_of
from model import IGNORE, LLaVA
from records import IMAGE

SIZES = [(56, 28), (28, 28), (100, 40), (31, 90), (200, 199), (28, 84), (5, 7)]
QUESTIONS = ["What is this?", "And\nthis?", "Why?"]


def picture(size, seed=0):
    w, h = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


def tiny(aspect, rule="hf"):
    """A tiny LLaVA-1.5 (crop, pad) or LLaVA-NeXT (anyres) with a chat template."""
    model = tiny_llava(projector="mlp2x_gelu")
    model.look(view_of(aspect, 28, 14, *[rule] * (aspect == "anyres")))
    model.tokenizer.chat_template = TEMPLATES["vicuna_v1"].jinja()
    model.meta["template"] = "vicuna_v1"
    return model


def training_sample(model, pictures, *turns):
    turns = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    counts = [model.view.tokens(*p.size) for p in pictures]
    ids, labels = encode(render(turns, TEMPLATES["vicuna_v1"]), model.tokenizer, counts)
    return {"where": "chat.json[0]", "input_ids": ids, "labels": labels, "X_v": model.view.X_v(pictures),
            "sizes": [p.size for p in pictures]}


def training_batch(model):
    """Several aspect ratios in one batch, a row of text alone, a row with two pictures."""
    pictures = [picture(size, k) for k, size in enumerate(SIZES)]
    samples = [training_sample(model, [p], f"{IMAGE}\nWhat is this?", f"Thing {k}.") for k, p in enumerate(pictures[:5])]
    samples += [training_sample(model, [], "Hello?", "Yes."),
                training_sample(model, pictures[5:], f"{IMAGE}\n{IMAGE}\nBoth?", "Two things.", "Why?", "So.")]
    return collate(samples), pictures


def theirs_of(model, batch, pictures):
    """The same batch as transformers' model takes it: pixels by its own processor, sizes as (height, width)."""
    more = {"image_sizes": torch.tensor([(h, w) for w, h in batch["sizes"]])} if model.view.tiling else {}
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": batch["labels"], **more}


@pytest.mark.parametrize("aspect", ["crop", "pad", "anyres"])
def test_logits_loss_and_gradients_equal_those_of_transformers(aspect, tmp_path):
    """Diss. Sec. 4.3 and 4.7: our folder in LlavaForConditionalGeneration or LlavaNextForConditionalGeneration, with the
    pixels of its own processor; 1e-5."""
    ours = tiny(aspect)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(theirs) is (LlavaNextForConditionalGeneration if aspect == "anyres" else LlavaForConditionalGeneration)
    batch, pictures = training_batch(ours)
    pixels = AutoProcessor.from_pretrained(tmp_path).image_processor(pictures, return_tensors="pt")["pixel_values"]
    out = theirs(**theirs_of(ours, batch, pictures), pixel_values=pixels)
    inputs = {k: batch[k] for k in ("input_ids", "labels", "X_v", "sizes")}
    logits, _ = answer_logits(ours, **inputs)
    scored = batch["labels"][:, 1:] != IGNORE
    torch.testing.assert_close(logits, out.logits[:, :-1][scored], atol=1e-5, rtol=1e-5)
    total, count = ours(**inputs)
    torch.testing.assert_close(total / count, out.loss, atol=1e-5, rtol=1e-5)
    (total / count).backward(), out.loss.backward()
    grads = {"linear_1": ours.W[0].weight.grad, "linear_2": ours.W[2].weight.grad}
    for name, grad in grads.items():
        torch.testing.assert_close(grad, getattr(theirs.model.multi_modal_projector, name).weight.grad, atol=1e-5, rtol=1e-4)
    if aspect == "anyres":
        torch.testing.assert_close(ours.newline.grad, theirs.model.image_newline.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("aspect", ["crop", "pad", "anyres"])
def test_the_processor_in_the_folder_makes_our_ids_and_pixels(aspect, tmp_path):
    """In other engines: chat template, placeholders and pixels are those that we train on."""
    model = tiny(aspect)
    model.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    for k, size in enumerate(SIZES):
        image = picture(size, k)
        content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
        theirs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                               tokenize=True, return_dict=True, return_tensors="pt")
        ours = prompt([{"from": "human", "value": f"{IMAGE}\nWhat is this?"}], [image], model.tokenizer,
                      TEMPLATES["vicuna_v1"], model.view)
        assert theirs["input_ids"][0].tolist() == ours["input_ids"], f"{size}: other ids"
        assert torch.equal(theirs["pixel_values"].flatten(0, -4), ours["X_v"]), f"{size}: other pixels"


def test_greedy_answers_equal_those_of_transformers(tmp_path):
    """LLaVA-NeXT generates what transformers generates, several aspect ratios at once, left-padded."""
    ours = tiny("anyres")
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    pictures = [picture(size, k) for k, size in enumerate(SIZES)]
    turns = [[{"from": "human", "value": f"{IMAGE}\n{q}"}] for q in QUESTIONS]
    batch = collate([prompt(t, [p], ours.tokenizer, TEMPLATES["vicuna_v1"], ours.view) for t, p in zip(turns, pictures)],
                    side="left")
    steps = ours.stream(batch["input_ids"], batch["attention_mask"], batch["X_v"], batch["sizes"], max_new_tokens=12)
    mine = [list(row) for row in zip(*steps)]
    pixels = AutoProcessor.from_pretrained(tmp_path).image_processor(pictures[:3], return_tensors="pt")
    out = theirs.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **pixels, do_sample=False,
                          max_new_tokens=12, suppress_tokens=[ours.image_id])
    out = out[:, batch["input_ids"].shape[1]:].tolist()
    for a, b in zip(mine, out):
        a = [i for i in a if i is not None]
        assert a == b[:len(a)]


@pytest.mark.parametrize("names", ["as saved", "old", "new"])
@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_their_checkpoints_load_here(kind, names, tmp_path):
    """A folder that transformers wrote, under the names of the hub's old files or of transformers 5's modules, gives its
    logits; without our word on it, pictures are looked at as its own processor does."""
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28,
                              patch_size=14)
    text = LlamaConfig(vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                       bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2)
    tokenizer = byte_tokenizer()
    more = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]} if kind == "llava_next" else {}
    config = {"llava": LlavaConfig, "llava_next": LlavaNextConfig}[kind](
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=4, **more)
    torch.manual_seed(0)
    theirs = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}[kind](config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if names != "as saved":
        from safetensors.torch import save_file

        from checkpoint import hf_keys
        state = {k: v.contiguous() for k, v in theirs.state_dict().items()}
        assert all(k.startswith(("model.", "lm_head.")) for k in state), "these are the names of the modules"
        if names == "old":                               # files of transformers 4 hold what is computed, too
            state = hf_keys(state) | {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
                                      "vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None]}
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    ours = LLaVA.from_pretrained(tmp_path)
    assert ours.view.aspect == ("crop" if kind == "llava" else "anyres") and ours.projector == "mlp2x_gelu"
    batch, pictures = training_batch(ours)
    inputs = {k: batch[k] for k in ("input_ids", "labels", "X_v", "sizes")}
    logits, _ = answer_logits(ours, **inputs)
    from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    processor = LlavaNextImageProcessorPil(**size, **more) if more else CLIPImageProcessorPil(**size)
    out = theirs(**theirs_of(ours, batch, pictures), pixel_values=processor(pictures, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(logits, out.logits[:, :-1][batch["labels"][:, 1:] != IGNORE], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json"])
def test_a_folder_of_theirs_that_pads_is_padded_here(file, tmp_path):
    """Without our word on it, the processor's file decides: transformers 5's own, or the older one."""
    tiny("pad").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "minllava"}))
    for other in {"processor_config.json", "preprocessor_config.json"} - {file}:
        (tmp_path / other).unlink()
    assert LLaVA.from_pretrained(tmp_path).view.aspect == "pad"
    (tmp_path / file).unlink()
    assert LLaVA.from_pretrained(tmp_path).view.aspect == "crop"
    (tmp_path / "config.json").write_text(json.dumps(config)[:300])
    with pytest.raises(ValueError, match="config.json is no whole JSON file; copy it again"):
        LLaVA.from_pretrained(tmp_path)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_a_checkpoint_remembers_how_it_looks_at_pictures(aspect, tmp_path):
    """Behaviour is in the folder, never in its name: projector, aspect, tiling, newline; saved again, it is the same."""
    model = tiny(aspect, rule="original")
    model.save_pretrained(tmp_path / "a")
    loaded = LLaVA.from_pretrained(tmp_path / "a")
    assert loaded.view.X_v([picture((60, 33))]).equal(model.view.X_v([picture((60, 33))]))
    assert loaded.meta == model.meta and loaded.projector == "mlp2x_gelu"
    assert (loaded.newline is None) == (aspect in ("crop", "pad"))
    for (name, p), (_, q) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    loaded.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_pad_shows_the_whole_picture_in_a_square():
    """Diss. Sec. 4.3: nothing is cropped; what is beside it is CLIP's mean colour, nearly 0 once it is normalised."""
    view = view_of("pad", 28, 14)
    X_v = view.X_v([Image.new("RGB", (56, 28), (255, 0, 0))])[0]
    assert X_v[:, :4].abs().max() < 0.02 and X_v[:, -4:].abs().max() < 0.02
    assert torch.allclose(X_v[0, 8:20], torch.tensor((1 - 0.48145466) / 0.26862954), atol=1e-4)
    from transformers import LlavaImageProcessorPil
    processor = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    for k, size in enumerate([*SIZES, (1, 300), (333, 77)]):
        assert torch.equal(view.X_v([picture(size, k)]), processor(picture(size, k), return_tensors="pt")["pixel_values"]), size


def test_a_strip_of_any_length_can_be_padded():
    """A picture of 1 x 60,000 pixels would become a square of 3.6 gigapixels."""
    assert view_of("pad", 28, 14).X_v([Image.new("RGB", (60000, 1), (255, 0, 0))]).shape == (1, 3, 28, 28)


def test_tiles_of_HD_come_with_or_without_the_global_picture():
    """Diss. Sec. 4.3, the ablation: 2 x 2 tiles of four tokens and a row end each row; the global picture adds its four."""
    both, alone = view_of("hd", 28, 14), view_of("hd", 28, 14, global_picture=False)
    assert both.tokens(56, 56) == 4 + 4 * 5 and alone.tokens(56, 56) == 4 * 5
    assert len(both.X_v([picture((56, 56))])) == 5 and len(alone.X_v([picture((56, 56))])) == 4
    with pytest.raises(ValueError, match="--no-global_picture"):
        view_of("anyres", 28, 14, global_picture=False)


@pytest.mark.parametrize("aspect", ["crop", "anyres"])
def test_the_vision_tower_trains_only_where_a_recipe_says_so(aspect):
    """Diss. Sec. 4.7: in LLaVA-NeXT's stage 2 g trains, up to the layer that is used; a batch of text alone gives its weights a
    zero gradient, so that no rank waits."""
    model = tiny(aspect)
    frozen = model.set_stage(2)
    assert not any(name.startswith("g.") for name in frozen) and ("newline" in frozen) == (aspect == "anyres")
    theta = model.set_stage(2, train_g=True)
    text = collate([training_sample(model, [], "Hello?", "Yes.")])
    batches = training_batch(model)[0], text
    for batch in batches:
        model.zero_grad()
        total, _ = model(**{k: batch[k] for k in ("input_ids", "labels", "X_v", "sizes")})
        total.backward()
        missing = [name for name, p in theta.items() if p.grad is None]
        assert not missing, f"no gradient, so other ranks would wait: {missing[:5]}"
    assert not any(p.grad.any() for name, p in theta.items() if name.startswith(("g.", "W.", "newline")))
    assert not any(name.startswith("g.") for name in model.set_stage(1, train_g=True)), "stage 1 trains W alone"


def test_newline_stays_where_the_next_stage_looks_in_tiles_too():
    """A stage-1 checkpoint in squares gets a new word for tiles; one in tiles keeps its own."""
    model = tiny("crop")
    model.look(view_of("anyres", 28, 14))
    first = model.newline
    model.look(view_of("anyres", 28, 14, "hf"))
    assert model.newline is first and first.shape == (48,)
    model.look(view_of("pad", 28, 14))
    assert model.newline is None and "tiling" not in model.meta


def without(d, key):
    return {k: v for k, v in d.items() if k != key}


def tiled(**change):
    return lambda meta: meta | {"tiling": meta["tiling"] | change}


@pytest.mark.parametrize("change, words", [
    (lambda meta: without(meta, "tiling"), "aspect 'anyres' without tiling"),
    (lambda meta: without(meta, "tiling") | {"aspect": "pad"}, "'llava_next' belongs to tiles"),
    (lambda meta: meta | {"aspect": "crop"}, "aspect 'crop' with tiling"),
    (lambda meta: without(meta, "tiling") | {"aspect": "square"}, "anyres and hd have one"),
    (tiled(pinpoints=[[28, 50]]), r"pinpoint \[28, 50\] does not fit tiles of 28 pixels; pass"),
    (tiled(pinpoints=[]), "no pinpoints; pass"),
    (tiled(tile=14, pinpoints=[[14, 28]]), "tiles of 14 pixels in patches of 14, for a vision tower of 28 and 14"),
    (tiled(patch=7), "tiles of 28 pixels in patches of 7"), (tiled(rule="theirs"), "rule 'theirs': pass 'original'"),
    (tiled(global_picture="cut"), "global_picture 'cut': pass"), (tiled(colour=3), "its tiling cannot be used: .*colour")])
def test_a_config_that_contradicts_itself_is_refused(change, words, tmp_path):
    """model_type, vision tower and what we wrote beside them must be one model; one line says what is not."""
    model = tiny("anyres")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"minllava": change(config["minllava"])}))
    with pytest.raises(ValueError, match=f"{tmp_path}: .*{words}") as error:
        LLaVA.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(without(config, "minllava") | {"image_grid_pinpoints": [[30, 28]]}))
    with pytest.raises(ValueError, match=r"pinpoint \[30, 28\] does not fit"):
        LLaVA.from_pretrained(tmp_path)


def test_where_transformers_tiles_otherwise_the_folder_agrees_as_far_as_it_can(tmp_path):
    """The original's order of canvases is written so that transformers picks the same one in a tie; only the rounding of the
    unpadding stays different (110 x 352 at 336 pixels: 1296 tokens, in transformers 1392)."""
    model = tiny("anyres", rule="original")
    model.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path).image_processor
    for k, size in enumerate([(28, 28), (10, 20), (20, 10), *SIZES]):
        theirs = processor(picture(size, k), return_tensors="pt")["pixel_values"]
        assert torch.equal(theirs.flatten(0, 1), model.view.X_v([picture(size, k)])), size
    assert tiles.NEXT.plan(110, 352).tokens == 1296 and tiles.NEXT._replace(rule="hf").plan(110, 352).tokens == 1392
    assert isinstance(View("anyres", 336, 14, tiles.NEXT).said, str) and "2928" in View("anyres", 336, 14, tiles.NEXT).said


def test_questions_about_one_picture_share_its_tiles(tmp_path):
    """A file of questions encodes a picture once, in tiles too; each answer is what it is alone, token for token."""
    tiny("anyres").save_pretrained(tmp_path)
    talker = sample.Talker(sample.Config(model=str(tmp_path), temperature=0.0, max_new_tokens=8))
    pictures = [picture((100, 40)), picture((31, 90), 1)]
    asked = [([talker.ask(f"Is {k} so?", 1)], [pictures[k % 2]]) for k in range(4)]
    asked += [([talker.ask("Both?", 2)], pictures), ([talker.ask("None?", 0)], [])]
    batch = talker.batch(asked)
    assert len(batch["X_v"]) == sum(talker.model.view.tiling.plan(*p.size).pictures for p in pictures)
    assert batch["shown"] == [0, 1, 0, 1, 0, 1]
    assert talker.answers(asked) == [talker.answers([one])[0] for one in asked]


def test_the_command_draws_how_a_picture_is_tiled(tmp_path, capsys):
    """python data.py show --tiles PICTURE out.png"""
    picture((640, 480)).save(tmp_path / "photo.png")
    data.main(["show", "--tiles", str(tmp_path / "photo.png"), str(tmp_path / "next.png")])
    assert "2,340 tokens" in capsys.readouterr().out and Image.open(tmp_path / "next.png").size[0] > 400
    data.main(["show", "--aspect", "hd", "--tiles", str(tmp_path / "photo.png"), str(tmp_path / "hd.png")])
    assert "tiles of 224" in capsys.readouterr().out
    tiny("anyres").save_pretrained(tmp_path / "model")
    data.main(["show", "--model", str(tmp_path / "model"), "--tiles", str(tmp_path / "photo.png"), str(tmp_path / "own.png")])
    assert "tiles of 28" in capsys.readouterr().out, "a model's own tiles"
    with pytest.raises(ValueError, match="--model brings its own --aspect"):
        data.main(["show", "--model", str(tmp_path / "model"), "--aspect", "hd", "--tiles", "photo.png", "x.png"])
    for wrong in (["check"], ["show", "--aspect", "pad"], ["show", "--aspect", "crop"]):
        with pytest.raises(ValueError, match="--tiles draws"):
            data.main([*wrong, "--tiles", str(tmp_path / "photo.png"), str(tmp_path / "x.png")])


def test_a_torn_file_of_weights_is_a_plain_error(tmp_path):
    """A download that broke off is no traceback."""
    tiny("pad").save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="not all of model.safetensors are whole"):
        LLaVA.from_pretrained(tmp_path)


@pytest.mark.parametrize("aspect", ["crop", "anyres"])
def test_a_picture_that_a_batch_shows_again_goes_through_g_once(aspect):
    """Sec. 4.1: H_v belongs to a picture; loss and gradients are those of a batch that encodes it again."""
    model = tiny(aspect)
    model.set_stage(2, train_g=True)
    a, b = picture((56, 28), 1), picture((31, 90), 2)
    shows = [("a.png", a), ("b.png", b), ("a.png", a), None, ("b.png", b)]
    samples = [training_sample(model, [s[1]] if s else [], f"{IMAGE}\nWhat?" if s else "Hi?", f"Thing {k}.") | {
        "pictures": [s[0]] if s else []} for k, s in enumerate(shows)]
    batch = collate(samples)
    once = each_once(batch, model.view)
    assert once["shown"] == [0, 1, 0, 1] and once["sizes"] == [(56, 28), (31, 90)]
    assert 2 * len(once["X_v"]) == len(batch["X_v"]), "a picture is still in the batch twice"
    results = []
    for b in (batch, once):
        model.zero_grad()
        loss, _ = model(**{k: b.get(k) for k in ("input_ids", "labels", "X_v", "sizes", "shown")})
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for twice, one in zip(*results, strict=True):
        torch.testing.assert_close(one, twice, atol=1e-5, rtol=1e-5)
    different = collate(samples[:2])
    assert each_once(different, model.view) is different, "a batch of different pictures is copied"
