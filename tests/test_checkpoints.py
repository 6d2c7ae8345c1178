"""A checkpoint is a folder that loads strictly, offline, and in transformers as its own."""
import json
import os
import re
import shutil
import socket
from itertools import cycle

import conftest
import pytest
import sentencepiece
import torch
import transformers
from conftest import (
    assert_same_model,
    batch_from,
    byte_tokenizer,
    chat,
    messages_of,
    noise,
    processor_pixels,
    refused,
    sample_from,
    tiny_clip,
    tiny_llava,
    tiny_llm,
)
from huggingface_hub import constants, model_info, save_torch_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import AutoModelForImageTextToText, AutoProcessor

from model import LLaVA
from parts import checkpoints
from parts.decoders import decoder_for
from parts.engine import Engine
from parts.files import IMAGE
from parts.ranks import ANSWERING, TRAINING
from parts.templates import TEMPLATES, missing_tokens
from parts.views import ASPECTS, set_view

FAMILIES = [(family, tied) for family in ("llama", "mistral", "qwen2") for tied in (False, True)]
SIZES = [(56, 28), (28, 28), (100, 40), (31, 90), (200, 199), (28, 84), (5, 7)]
TURNS = ["<image>\nWhat is this?", "A <thing>, sir.", " Why?  ", "So & so."]
PICTURES = [noise(size, k) for k, size in enumerate(SIZES)]


def see(model, aspect):
    """The model, seeing pictures by an aspect, as train.py leaves it."""
    set_view(model, aspect)
    model.meta["template"] = "vicuna_v1"
    return model


def training_batch(model):
    """Several proportions, a row of text alone, a row with two pictures."""
    samples = [sample_from(model, TURNS, [p]) for p in PICTURES[:5]]
    samples.append(sample_from(model, ["Hello?", "Yes."]))
    samples.append(sample_from(model, [f"{IMAGE}\n{IMAGE}\nBoth?", "Two things."], PICTURES[5:]))
    return batch_from(model, samples)


def assert_same(a, b):
    """Two models are one: the weights' bits, what ids mean, what ends a sequence, meta."""
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        other = b.state_dict()[name]
        same = value.dtype == other.dtype and torch.equal(value, other)
        assert same, f"{name} is not bit-equal: the folder does not hold the model that was saved"
    for (name, value), (_, other) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        same = value.dtype == other.dtype and torch.equal(value, other)
        assert same, f"{name}: frequencies rounded to bf16 turn far positions by whole radians"
    for attribute in ("feature_layer", "projector", "image_id", "eos_ids"):
        assert getattr(a, attribute) == getattr(b, attribute)
    assert json.loads(json.dumps(a.meta)) == b.meta
    for text in ("\nWhat is", " A cat.</s>USER:", "a  b\n\n c ", "日本, Grüße!", f"x{IMAGE}\ny"):
        assert a.tokenizer(text)["input_ids"] == b.tokenizer(text)["input_ids"], f"{text!r}"


@pytest.fixture
def saved(tmp_path):
    """(a model, its folder)"""
    model = see(tiny_llava(meta={"stage": 2, "data": ["a.json"]}), "crop")
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


# -----------------------------------------------------------------------------
# The most important of all: transformers computes what we compute


@pytest.mark.parametrize("aspect", ["pad", "anyres_hf"])
def test_transformers_computes_what_we_compute(aspect, tmp_path):
    """Diss. Sec. 4.3, 4.7: our folder there, with pixels of its own processor: logits, loss and
    gradients to 1e-5. Of the paper's one layer, tests/test_model.py says it."""
    ours = see(tiny_llava(projector="mlp2x_gelu"), aspect)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert_same_model(ours, theirs, training_batch(ours), processor_pixels(tmp_path, PICTURES))
    grad = theirs.model.multi_modal_projector.linear_1.weight.grad
    torch.testing.assert_close(ours.W[0].weight.grad, grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", conftest.FAMILIES)
def test_every_kind_of_folder_is_our_model_in_transformers(family, tied, parts, tmp_path):
    """Sec. 4.1, made as train.py makes it: a tied head that a config.json hides would be a random
    one there, in silence."""
    conftest.save_parts(tmp_path, tiny_llm(family, tied, head_dim=12))
    ours = LLaVA.from_parts(str(parts / "clip"), str(tmp_path / "llm")).eval()
    for aspect in ASPECTS:
        see(ours, aspect).save_pretrained(tmp_path / aspect)
        theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / aspect).eval()
        pictures = PICTURES[:1] if aspect in ("crop", "squeeze", "pad", "anyres_hf") else []
        asked = sample_from(ours, [f"{IMAGE * len(pictures)} What?", "A thing."], pictures)
        pixels = processor_pixels(tmp_path / aspect, pictures)
        assert_same_model(ours, theirs, batch_from(ours, [asked]), pixels, atol=1e-4)


SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
            "<|end_header_id|>", "<|eot_id|>", "<think>", "</think>", "<start_of_turn>",
            "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>", "<|im_sep|>")


@pytest.mark.parametrize("kind", ["no BOS", "BOS", "sentencepiece", "legacy sentencepiece"])
def test_the_chat_template_gives_our_ids_with_one_BOS(kind, tmp_path):
    """Table 2 in other engines, for every template: by transformers' processor, and for those that
    take the ids of the text alone, as vLLM and SGLang do."""
    if "sentencepiece" in kind:
        vicuna_folder(tmp_path, kind.startswith("legacy"))
        tokenizer = checkpoints.load_tokenizer(str(tmp_path))
    else:
        tokenizer = byte_tokenizer(SPECIALS)
    if kind == "BOS":
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 1)])
    model = see(LLaVA(tiny_clip(), tiny_llm(vocab_size=448), tokenizer), "crop")
    names = [t.name for t in TEMPLATES.values() if not missing_tokens(t, tokenizer)]
    for name in names:
        model.meta["template"] = name
        model.save_pretrained(tmp_path / name)
        processor = AutoProcessor.from_pretrained(tmp_path / name)
        for question in ("<image>\nWhat?", "What?\n<image>", "<image>\n<image>\nBoth?", "Hi."):
            n = question.count(IMAGE)
            turns = [question, "A <thing>.", "Why?"]
            # what follows an answer has a blank of its own to older tokenizers; plain has no turns
            if name == "plain" or (name, kind) == ("llava_v0", "legacy sentencepiece"):
                turns = turns[:1]
            messages = messages_of(chat(*turns), PICTURES[0])
            ours = sample_from(model, turns, PICTURES[:n], name)["input_ids"]
            theirs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True)
            assert theirs["input_ids"][0] == ours, f"{name}: {question!r}"
            text = processor.apply_chat_template(messages, add_generation_prompt=True)
            text = text.replace(IMAGE, IMAGE * 4)
            ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids == ours and (1 in ids[:1]) == (kind != "no BOS"), f"{name}: {question!r}"
            # a processor that adds <s> itself needs a template without it: docs/serving.md
            ids = processor.tokenizer(re.sub("^<s> ?", "", text))["input_ids"]
            assert ids == ours, f"{name}: {question!r}"
    assert len(names) == (5 if "sentencepiece" in kind else len(TEMPLATES))


@pytest.mark.parametrize("aspect", ["crop", "pad", "anyres_hf", "anyres"])
def test_the_processor_in_the_folder_makes_our_placeholders_and_pixels(aspect, tmp_path):
    """In other engines: as many placeholders, and the pixels that we train on."""
    model = see(tiny_llava(), aspect)
    model.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    for image in PICTURES:
        theirs = processor.apply_chat_template(
            messages_of(chat(TURNS[0]), image), add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt")
        ours = batch_from(model, [sample_from(model, TURNS[:1], [image])])
        assert torch.equal(theirs["input_ids"], ours["input_ids"]), f"{image.size}: other ids"
        X_v = theirs["pixel_values"].flatten(0, -4)
        assert torch.equal(X_v, ours["X_v"]), f"{image.size}: other pixels than we train on"


@pytest.mark.parametrize("family, tied", FAMILIES[-2:])
def test_the_keys_are_those_of_the_llava_hf_hub(family, tied, tmp_path):
    """vLLM, SGLang, llama.cpp read these names; to transformers none is missing or left over."""
    model = see(tiny_llava(family, tied, feature_layer=-1), "anyres" if tied else "crop")
    model.save_pretrained(tmp_path)
    want = {f"vision_tower.vision_model.{name}" for name in tiny_clip().state_dict()}
    want |= {f"language_model.{name}" for name in tiny_llm(family).state_dict()}
    want |= {f"multi_modal_projector.linear_{i}.{k}" for i in (1, 2) for k in ("weight", "bias")}
    if tied:
        want = want - {"language_model.lm_head.weight"} | {"image_newline"}
    assert load_file(tmp_path / "model.safetensors").keys() == want
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), f"transformers sees another model in our folder: {info}"


def test_the_folder_describes_a_linear_W(saved):
    """Eq. (1) in llava-hf's two layers: linear_1 = W, no activation, linear_2 = the identity."""
    model, folder = saved
    state = load_file(folder / "model.safetensors")
    assert torch.equal(state["multi_modal_projector.linear_1.weight"], model.W.weight)
    assert torch.equal(state["multi_modal_projector.linear_2.weight"], torch.eye(48))
    assert not state["multi_modal_projector.linear_2.bias"].any()


# -----------------------------------------------------------------------------
# The other direction: folders that transformers wrote


@pytest.mark.parametrize("names", ["as saved", "old", "new"])
@pytest.mark.parametrize("kind", ["Llava", "LlavaNext"])
def test_their_checkpoints_load_here(kind, names, tmp_path):
    """Under the hub's names or transformers 5's; pictures are seen as its processor sees them."""
    is_next = kind == "LlavaNext"
    more = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]} if is_next else {}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=tiny_clip().config.to_dict(), text_config=tiny_llm().config.to_dict(),
        image_token_index=259, image_seq_length=4, **more)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    theirs.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    if names != "as saved":
        state = {name: value.contiguous() for name, value in theirs.state_dict().items()}
        if names == "old":                       # which hold what is computed, too
            state = checkpoints.hf_keys(state) | {
                "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
                "vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None]}
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    ours = LLaVA.from_pretrained(tmp_path)
    assert ours.meta["aspect"] == ("anyres_hf" if is_next else "crop")
    ours.save_pretrained(tmp_path / "ours")              # for a processor with our picture's size
    pixels = processor_pixels(tmp_path / "ours", PICTURES)
    assert_same_model(ours, theirs, training_batch(ours), pixels)


@pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json"])
def test_a_folder_of_theirs_that_pads_is_padded_here(file, tmp_path):
    """Without our word on it, the processor's file decides: transformers 5's own, or the older."""
    see(tiny_llava(), "pad").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["minllava"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for other in {"processor_config.json", "preprocessor_config.json"} - {file}:
        (tmp_path / other).unlink()
    assert LLaVA.from_pretrained(tmp_path).meta["aspect"] == "pad"
    (tmp_path / file).unlink()
    assert LLaVA.from_pretrained(tmp_path).meta["aspect"] == "crop"


# -----------------------------------------------------------------------------
# The round trip


@pytest.mark.parametrize("family, tied, aspect, dtype", [
    (*kind, aspect, dtype) for kind, aspect, dtype in
    zip(cycle(FAMILIES), ASPECTS, cycle([torch.float32, torch.bfloat16]), strict=False)])
def test_save_and_load_is_bit_exact(family, tied, aspect, dtype, tmp_path):
    """Sec. 4.2: stage 2 starts from what stage 1 ended with; saved again, it is the same."""
    meta = {"stage": 1, "lr": 0.002, "data": ["a.json"], "note": "ünï", "nothing": None}
    projector = "mlp2x_gelu" if tied else "linear"
    model = see(tiny_llava(family, tied, projector=projector, feature_layer=-1, meta=meta), aspect)
    model.f_phi.generation_config = transformers.GenerationConfig(eos_token_id=[2, 77])
    model.save_pretrained(tmp_path / "a", dtype=dtype)
    loaded = LLaVA.from_pretrained(tmp_path / "a", dtype=dtype)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    assert_same(model, loaded)
    assert loaded.eos_ids == {2, 77} and not loaded.training
    loaded.save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja",
                 "preprocessor_config.json"):
        same = (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert same, f"{name} changes when it is saved again"


def test_a_sharded_folder_loads_equally_strictly_and_under_any_name(saved):
    """A 13B model is several files; a lost one is an error that names keys, not random weights."""
    model, folder = saved
    state = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    save_torch_state_dict(state, folder, max_shard_size="60KB", metadata={"format": "pt"})
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) >= 3
    renamed = folder.rename(folder.parent / "llava-v1.5-13b-lora mpt ü")
    assert_same(model, LLaVA.from_pretrained(renamed))   # the released code goes by the path
    folder = renamed.rename(folder)
    shards[1].rename(folder / "lost")
    assert_refused(folder, "weights are missing", "language_model")
    model.save_pretrained(folder)
    assert [path.name for path in folder.glob("*safetensors*")] == ["model.safetensors"]


def test_no_network_is_asked_for_local_folders(saved, parts, tmp_path, monkeypatch):
    """With the hub allowed and every look-up of an address watched, there is none."""
    asked = []

    def refuse(*address, **more):
        asked.append(address)
        raise OSError("no network")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    LLaVA.from_pretrained(saved[1])
    LLaVA.from_parts(str(parts / "clip"), str(parts / "llm")).save_pretrained(tmp_path / "out")
    LLaVA.from_pretrained(tmp_path / "out")
    assert not asked, f"local folders ask the network: {asked[:3]}"
    with pytest.raises(Exception, match="no network"):
        model_info("nobody/nothing")


def test_a_save_that_fails_leaves_nothing_that_loads(saved, tmp_path):
    """A full disk leaves no folder that looks complete, neither a new one nor over an old one."""
    model, folder = saved
    for target in (tmp_path / "new", folder):
        (target / "generation_config.json").unlink(missing_ok=True)
        (target / "generation_config.json").mkdir(parents=True)      # writing stumbles over it
        with pytest.raises(OSError):
            model.save_pretrained(target)
        with pytest.raises(FileNotFoundError, match="config.json"):
            LLaVA.from_pretrained(target)


# -----------------------------------------------------------------------------
# Strictness


def edit(folder, weights=None, **config):
    """Change the weights in the folder's file (None takes one away), and values of config.json."""
    state = load_file(folder / "model.safetensors") | (weights or {})
    state = {name: value for name, value in state.items() if value is not None}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(old | config))


def assert_refused(folder, *words):
    with refused(folder, *words):
        LLaVA.from_pretrained(folder)


NORM, LINEAR_2 = "language_model.model.norm.weight", "multi_modal_projector.linear_2."
NAN = torch.full((48,), torch.nan)


@pytest.mark.parametrize("change, words", [
    ({NORM: None}, ["1 weights are missing", NORM]),
    ({"image_newline": torch.zeros(48)}, ["1 weights are not of this model", "image_newline"]),
    ({"model.language_model.norm.weight": torch.ones(48)}, ["safetensors: " + NORM, "twice"]),
    ({NORM: torch.ones(47)}, [NORM, "(47,)", "(48,)"]),
    ({NORM: NAN}, ["NaN or infinite", NORM]), ({NORM: 1 / (0 * NAN.nan_to_num())}, [NORM]),
    ({LINEAR_2 + "weight": 2 * torch.eye(48)}, ["linear_2 is not the identity"]),
    ({LINEAR_2 + "bias": torch.ones(48)}, ["linear_2 is not the identity"])])
def test_other_weights_are_an_error_that_names_them(saved, change, words):
    """No silent random weights, no second layer that is dropped, no NaN that answers nothing."""
    edit(saved[1], change)
    assert_refused(saved[1], *words)


@pytest.mark.parametrize("change, words", [
    ({"projector_hidden_act": "relu"}, ["projector_hidden_act", "relu", "gelu"]),
    ({"vision_feature_select_strategy": "full"}, ["vision_feature_select_strategy", "full"]),
    ({"vision_feature_layer": [-2, -1]}, ["vision_feature_layer", "-2, -1"]),
    ({"vision_feature_layer": "-2"}, ["vision_feature_layer", "'-2'"]),
    ({"vision_feature_layer": -9}, ["vision_feature_layer", "-9"]),
    ({"image_token_index": 7}, ["image_token_index", "7", "259"]),
    ({"model_type": "llava_next"}, ["'crop'", "llava_next"]),
    ({"model_type": "llama"}, ["model_type", "llama", "extras.convert"]),
    ({"text_config": {"hidden_size": "48"}}, ["hidden_size", "'48'"]),
    ({"text_config": 7}, ["text_config", "7"]),
    ({"minllava": [1]}, ["minllava: [1]", "an object"]),
    ({"minllava": {"template": "vicuna"}}, ["'vicuna'", "vicuna_v1"]),
    ({"minllava": {"aspect": "crop", "tiling": {"tile": 28}}}, ["'crop'", "tiling"]),
    ({"minllava": {"aspect": "hd"}}, ["'hd'", "tiling None"]),
    ({"minllava": {"aspect": "fisheye"}}, ["fisheye", "anyres"])])
def test_a_config_that_means_another_model_is_refused(saved, change, words):
    """Each of these would load and answer nonsense, or end in a traceback."""
    edit(saved[1], **change)
    assert_refused(saved[1], *words)


@pytest.mark.parametrize("tiling, words", [
    ({"pinpoints": [[30, 28]]}, "multiples of 28"), ({"pinpoints": [[28, 0]]}, "multiples of 28"),
    ({"pinpoints": []}, "multiples of 28"), ({"pinpoints": 7}, "tiling"),
    ({"pinpoints": [[28.0, 56.0]]}, "tiling"), ({"tile": 28}, "pinpoints")])
def test_a_tiling_that_does_not_fit_the_tower_is_refused(tmp_path, tiling, words):
    """It would be found with the first picture, in the middle of a run."""
    model = see(tiny_llava(), "anyres")
    model.save_pretrained(tmp_path)
    edit(tmp_path, minllava=model.meta | {"tiling": tiling})
    assert_refused(tmp_path, words)


@pytest.mark.parametrize("file, value", [
    ("config.json", 3), ("generation_config.json", {"eos_token_id": "2"}), ("tokenizer.json", {}),
    ("generation_config.json", [7]), ("tokenizer_config.json", {"added_tokens_decoder": 3})])
def test_a_file_of_another_form_is_named(saved, file, value):
    """Values of other types, deeply nested ones: one line, never a traceback."""
    _, folder = saved
    for text in (json.dumps(value), "[" * 10 ** 5, "{"):
        (folder / file).write_text(text)
        assert_refused(folder, "tokenizer" if "tokenizer" in file else file)


def test_weights_in_bin_files_are_read_without_their_code(saved):
    """As older llava-hf folders have them; a weight that two files bring is an error."""
    model, folder = saved
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model-00001-of-00002.bin")
    os.remove(folder / "model.safetensors")
    assert_same(model, LLaVA.from_pretrained(folder))
    torch.save({NORM: state[NORM]}, folder / "pytorch_model-00002-of-00002.bin")
    assert_refused(folder, "00002-of-00002.bin", "another file", NORM)
    torch.save({NORM: print}, folder / "pytorch_model-00002-of-00002.bin")
    assert_refused(folder, "00002-of-00002.bin", "not a whole file of weights")


def test_a_model_that_has_answered_fast_can_be_saved(saved, tmp_path):
    """A fast decoder lays weights side by side, and safetensors takes no part of a tensor."""
    model, folder = saved
    decoder_for(model.f_phi)
    model.save_pretrained(tmp_path / "later")
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "later" / name).read_bytes()


def test_logits_that_are_not_finite_end_an_answer_and_a_score(llava):
    """One NaN would answer with nothing, exit 0, and rank anything first."""
    llava.f_phi.lm_head.weight.data[7] = torch.nan
    batch = batch_from(llava, [sample_from(llava, ["Why?", "So."])], side="left")
    with pytest.raises(ValueError, match="NaN or infinite"):
        llava.score(**{name: batch[name] for name in TRAINING})
    for temperature in (0.0, 0.2):
        with pytest.raises(ValueError, match="no word can be drawn"):
            llava.generate(**{name: batch[name] for name in ANSWERING}, temperature=temperature)
    with pytest.raises(ValueError, match="no word can be drawn"):
        Engine(llava).generate(batch)


def test_folders_that_are_not_complete_are_refused(saved, tmp_path):
    """No folder, an empty one, one without weights, files of a download that broke off."""
    _, folder = saved
    for other in (tmp_path, tmp_path / "nowhere"):
        assert_refused(other, "config.json")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:len(weights) // 2])
    assert_refused(folder, "model.safetensors: not a whole file of weights")
    os.remove(folder / "model.safetensors")
    assert_refused(folder, "80 weights are missing")
    (folder / "config.json").write_text((folder / "config.json").read_text()[:300])
    assert_refused(folder, "config.json: ")


# -----------------------------------------------------------------------------
# From the parts


def text_tokenizer(*added):
    """A language model's tokenizer before LLaVA: 259 ids, those of `added`, no <image>, no pad."""
    backend = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["content"] != IMAGE]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), unk_token="<unk>",
        bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    return tokenizer


@pytest.fixture
def vision(tmp_path):
    tiny_clip(seed=3).save_pretrained(tmp_path / "vision")
    return str(tmp_path / "vision")


def llm_folder(folder, **more):
    """(language model, its folder with the tokenizer)"""
    f_phi = tiny_llm(**more)
    f_phi.save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    return f_phi, str(folder)


def test_g_is_the_vision_half_of_a_full_CLIP(tmp_path):
    """Sec. 4.1 "pre-trained CLIP visual encoder": openai/clip-vit-large-patch14 has both towers."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
             "num_attention_heads": 2}
    text = {"vocab_size": 90, "max_position_embeddings": 9, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=tower | text,
                                vision_config=tower | {"image_size": 28, "patch_size": 14})).eval()
    clip.save_pretrained(tmp_path / "clip")
    model = LLaVA.from_parts(str(tmp_path / "clip"), llm_folder(tmp_path / "llm")[1])
    X_v = torch.randn(2, 3, 28, 28)
    want = clip.vision_model(X_v).last_hidden_state
    assert torch.equal(model.g(X_v).last_hidden_state, want)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_full_vocabulary_grows_to_the_next_multiple_of_64(tmp_path, vision, tied):
    """Vicuna: 32,000 to 32,064 rows, the new ones the mean of the old; with spare rows it stays."""
    f_phi, llm = llm_folder(tmp_path / "llm", vocab_size=259, tied=tied)
    model = LLaVA.from_parts(vision, llm, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model = LLaVA.from_parts(vision, llm)
    assert (model.image_id, model.f_phi.config.vocab_size) == (259, 320)
    for table in ("get_input_embeddings", "get_output_embeddings"):
        new, old = getattr(model.f_phi, table)().weight, getattr(f_phi, table)().weight
        assert new.shape == (320, 48) and torch.equal(new[:259], old), "the old rows changed"
        torch.testing.assert_close(new[259:], old.mean(0).expand(61, 48))
    model.save_pretrained(tmp_path / "out")
    assert_same(model, LLaVA.from_pretrained(tmp_path / "out"))
    f_phi, llm = llm_folder(tmp_path / "spare", vocab_size=270)
    state = LLaVA.from_parts(vision, llm).f_phi.state_dict()
    assert all(torch.equal(state[name], value) for name, value in f_phi.state_dict().items())


def test_parts_of_another_kind_are_refused(tmp_path, vision):
    """Swapped flags, a lost weight, one of another shape: the flag, the folder and the weight."""
    _, llm = llm_folder(tmp_path / "llm")
    cases = [(vision, vision, "--llm", vision), (llm, llm, "--vision", llm)]
    weights = load_file(f"{llm}/model.safetensors")
    for change in ({"model.norm.weight": torch.ones(47)}, {"model.norm.weight": None}):
        folder = shutil.copytree(llm, tmp_path / str(len(cases)))
        edit(folder, weights | change)
        cases.append((vision, str(folder), "--llm", "model.norm.weight"))
    os.remove(shutil.copytree(llm, tmp_path / "bare") / "tokenizer_config.json")
    cases.append((vision, str(tmp_path / "bare"), "--llm", "tokenizer_config.json"))
    for clip, llm, *words in cases:
        with refused(*words):
            LLaVA.from_parts(clip, llm)


# -----------------------------------------------------------------------------
# Vicuna: tokenizer.model and .bin files, no tokenizer.json


def vicuna_folder(folder, legacy=None):
    """What lmsys/vicuna-* ship, small: a .bin file, a sentencepiece model and its config.

    `legacy` is False in v1.5's tokenizer_config.json and absent in v1.1's and v1.3's.
    """
    f_phi = tiny_llm(vocab_size=384)
    f_phi.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    torch.save(state, folder / "pytorch_model.bin")
    os.remove(folder / "model.safetensors")
    text = TEMPLATES["vicuna_v1"].first + "What is in it? ASSISTANT: A cat sits on the mat."
    with open(folder / "tokenizer.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text] * 20), model_writer=f, vocab_size=384, model_type="bpe",
            byte_fallback=True, character_coverage=1.0, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False)
    options = dict.fromkeys(["lstrip", "normalized", "rstrip", "single_word"], False)
    special = {f"{key}_token": {"__type": "AddedToken", "content": text} | options
               for key, text in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))}
    config = special | {"add_bos_token": True, "add_eos_token": False, "pad_token": None,
                        "clean_up_tokenization_spaces": False, "model_max_length": 2048,
                        "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer"}
    if legacy is not None:
        config["legacy"] = legacy
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return f_phi, str(folder), pieces


@pytest.mark.parametrize("legacy", [None, False])
def test_a_vicuna_folder_becomes_a_LLaVA(tmp_path, vision, legacy):
    """Sec. 4.1 "we choose Vicuna as our LLM": its ids are sentencepiece's behind one <s>."""
    (tmp_path / "vicuna").mkdir()
    f_phi, llm, pieces = vicuna_folder(tmp_path / "vicuna", legacy)
    model = see(LLaVA.from_parts(vision, llm), "crop")
    for name, value in f_phi.state_dict().items():
        assert torch.equal(model.f_phi.state_dict()[name][:len(value)], value), name
    assert (model.image_id, model.f_phi.config.vocab_size, model.eos_ids) == (384, 448, {2})
    for text in ("What is this?", "\nWhat is", "a  b", "日本, Grüße!", "ASSISTANT: 3"):
        assert model.tokenizer(text)["input_ids"] == [1] + pieces.encode(text), f"{text!r}"
    model.save_pretrained(tmp_path / "out")
    loaded = LLaVA.from_pretrained(tmp_path / "out")
    assert_same(model, loaded)
    loaded.save_pretrained(tmp_path / "again")
    loaded.save_pretrained(tmp_path / "again")           # over itself, as a run that goes on does
    for folder in ("out", "again"):
        kept = (tmp_path / folder / "tokenizer.model").read_bytes()
        assert kept == (tmp_path / "vicuna" / "tokenizer.model").read_bytes(), (
            "llama.cpp's converter takes the vocabulary from it")
    # OFFICIAL: behind an image a text starts anew, with sentencepiece's blank
    ids = sample_from(model, TURNS[:1], PICTURES[:1])["input_ids"]
    behind = max(k for k, i in enumerate(ids) if i == model.image_id) + 1
    assert ids[behind] == model.tokenizer.convert_tokens_to_ids("▁")
