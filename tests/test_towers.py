"""Vision towers: SigLIP's has no CLS and pixels of its own; each is the same in transformers."""
import json

import pytest
import torch
import transformers
from conftest import (
    answer_logits,
    assert_same_model,
    batch_from,
    noise,
    processor_pixels,
    sample_from,
    save_parts,
    tiny_siglip,
)
from safetensors.torch import load_file, save_file
from test_checkpoints import PICTURES
from transformers import AutoModelForImageTextToText, AutoProcessor, SiglipImageProcessorPil

from extras import convert, retrieve
from model import LLaVA
from parts.files import IMAGE
from parts.pictures import load_image
from parts.ranks import TRAINING
from parts.views import Pixels, preprocess, set_view, view_of

BILINEAR = dict(resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)       # SigLIP2's
TURNS = [f"{IMAGE}\nWhat is this?", "A thing, sir.", "Why?", "So."]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A folder as the hub's SigLIP2: both towers, and its image processor."""
    root = tmp_path_factory.mktemp("towers")
    vision = tiny_siglip().config.to_dict() | {"vision_use_head": True}
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    config = transformers.SiglipConfig(vision_config=vision, text_config=text)
    transformers.SiglipModel(config).save_pretrained(root)
    SiglipImageProcessorPil(size={"height": 28, "width": 28}, **BILINEAR).save_pretrained(root)
    return str(root)


def built(vision, folder, **options):
    """A LLaVA as train.py makes it of new parts."""
    save_parts(folder)
    torch.manual_seed(1)
    return LLaVA.from_parts(vision, str(folder / "llm"), **options).eval()


def assert_same_in_transformers(model, folder):
    """Logits and loss, with pixels of the folder's own processor."""
    theirs, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), f"transformers sees another model in our folder: {info}"
    batch = batch_from(model, [sample_from(model, TURNS, [p]) for p in PICTURES])
    assert_same_model(model, theirs.eval(), batch, processor_pixels(folder, PICTURES))


@pytest.mark.parametrize("aspect, feature_layer", [
    ("auto", -1), ("auto", -2), ("crop", -2), ("pad", -1), ("anyres_hf", -2)])
def test_siglip_is_the_same_model_in_transformers(aspect, feature_layer, siglip, tmp_path):
    """No CLS: N tokens, strategy "full", also of tiles; its pixels are those of the folder's
    processor, which takes the filter from SigLIP2's."""
    model = built(siglip, tmp_path, projector="mlp2x_gelu", feature_layer=feature_layer)
    assert set_view(model, aspect).N == 4
    model.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_feature_select_strategy"] == "full"
    assert not [name for name in load_file(tmp_path / "out/model.safetensors") if "head" in name
                and "lm_head" not in name], "SigLIP's pooling is not part of LLaVA"
    processor = AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    assert (processor.resample, *processor.image_mean) == (2, 0.5, 0.5, 0.5)
    assert_same_in_transformers(model, tmp_path / "out")


def test_tiles_of_a_tower_whose_patches_leave_an_edge(tmp_path):
    """SigLIP so400m has 27 patches of 14 pixels in 384: the map counts patches by the tile."""
    tiny_siglip(33).save_pretrained(tmp_path / "siglip")
    model = built(str(tmp_path / "siglip"), tmp_path)
    view = set_view(model, "anyres_hf")
    assert (view.N, view.tiling.pinpoints[0]) == (4, (33, 66))
    model.save_pretrained(tmp_path / "out")
    assert_same_in_transformers(model, tmp_path / "out")


@pytest.mark.parametrize("resample", [2, 3], ids=["SigLIP2", "SigLIP"])
@pytest.mark.parametrize("mode, size", [("L", (90, 31)), ("RGB", (5, 700)), ("RGB", (1, 1)),
                                        ("RGBA", (60, 61)), ("P", (33, 500)), ("CMYK", (640, 480))])
def test_pixels_are_those_of_siglips_processor(mode, size, resample, tmp_path):
    """Bit for bit, on odd pictures; what is transparent is white before any of the two sees it."""
    file = tmp_path / "picture.tiff"
    noise(size).convert(mode).save(file)
    image = load_image(file)
    view = view_of("squeeze", 64, 16, Pixels((0.5,) * 3, (0.5,) * 3, resample))
    processor = SiglipImageProcessorPil(size={"height": 64, "width": 64}, resample=resample)
    want = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(view.X_v(image), want)
    assert not torch.equal(preprocess(image.resize((64, 64)), 64)[None], want), "CLIP's mean"


def test_a_llava_with_siglip_of_somebody_else_loads(siglip, tmp_path):
    """With SigLIP's head in its files, and nothing of ours in config.json."""
    model = built(siglip, tmp_path)
    set_view(model, "auto")
    model.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["minllava"]
    config["vision_config"]["vision_use_head"] = True
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    file = tmp_path / "out" / "model.safetensors"
    head = {"vision_tower.vision_model.head.probe": torch.ones(1, 1, 32)}
    save_file(load_file(file) | head, file, {"format": "pt"})
    theirs = LLaVA.from_pretrained(tmp_path / "out")
    want = {"aspect": "squeeze", "tiling": None,
            "pixels": {"mean": [0.5] * 3, "std": [0.5] * 3, "resample": 2}}
    assert theirs.meta == want
    batch = batch_from(model, [sample_from(model, TURNS, [PICTURES[3]])])
    inputs = {name: batch[name] for name in TRAINING}
    assert torch.equal(answer_logits(theirs, **inputs)[0], answer_logits(model, **inputs)[0])


# -----------------------------------------------------------------------------
# What cannot be


def test_a_tower_of_an_unknown_kind_is_refused_by_name(tmp_path):
    """As a part and in a checkpoint; NaFlex is no SigLIP, though its name says so."""
    for kind in ("Siglip2Vision", "Dinov2"):
        config = getattr(transformers, f"{kind}Config")(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        config.save_pretrained(tmp_path / kind)
        with pytest.raises(ValueError, match=f"--vision .*{config.model_type}.*fixed resolution"):
            built(str(tmp_path / kind), tmp_path)
    built(str(tmp_path / "clip"), tmp_path).save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"vision_config": config.to_dict()}))
    with pytest.raises(ValueError, match=f"{path}.*dinov2.*fixed resolution"):
        LLaVA.from_pretrained(tmp_path / "out")
    wrong = raw["minllava"] | {"pixels": {"mean": [0.5], "std": [0.5], "resample": 2}}
    path.write_text(json.dumps(raw | {"minllava": wrong}))
    with pytest.raises(ValueError, match="pixels.*mean and std"):
        LLaVA.from_pretrained(tmp_path / "out")


def test_what_is_clips_alone_refuses_siglip_by_name(siglip, tmp_path):
    """The original's layout, and REACT."""
    model = built(siglip, tmp_path)
    model.save_pretrained(tmp_path / "out")
    argv = ["--model", str(tmp_path / "out"), "--out", str(tmp_path / "new"), "--to_original"]
    with pytest.raises(ValueError, match="vision_config.model_type.*siglip_vision_model.*clip"):
        convert.main(argv)
    with pytest.raises(ValueError, match="--clip .*'siglip'.*'clip'"):
        retrieve.load_clip(siglip)
