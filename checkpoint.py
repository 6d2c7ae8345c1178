"""
A checkpoint folder in the layout of llava-hf, but for the weights themselves: what they are called, and what lies beside them.

    config.json              transformers' LlavaConfig or LlavaNextConfig; what we add lies under "minllava"
    processor_config.json    how transformers prepares a picture; preprocessor_config.json for older readers
    tokenizer.json, ...      with `<image>`, and the template as chat template
    generation_config.json   what ends an answer

`LLaVA.from_pretrained` and `save_pretrained` (model.py) read and write the whole; an adapter's folder (lora.py) has all but
config.json.
"""
import json
import os
import re
import sys
from pathlib import Path

from transformers import (AddedToken, AutoTokenizer, CLIPImageProcessorPil, GenerationConfig, LlavaConfig,
                          LlavaImageProcessorPil, LlavaNextConfig, LlavaNextImageProcessorPil, LlavaNextProcessor,
                          LlavaProcessor)
from transformers.utils import logging

import tiles
from images import ASPECTS, View
from records import IMAGE

logging.set_verbosity_error()    # its report of CLIP's unused text tower; what is missing is our own error (`load_part`)
if not sys.stderr.isatty():
    logging.disable_progress_bar()

# Our modules <-> the key prefixes of the llava-hf checkpoints (`LlavaForConditionalGeneration` on the hub).
PREFIX = {"g.": "vision_tower.vision_model.", "f_phi.": "language_model.", "newline": "image_newline"}
PROJECTORS = {          # W: what `projector_hidden_act` says of it, and the key prefixes of its layers
    "linear": ("linear", {"W.": "multi_modal_projector.linear_1."}),
    "mlp2x_gelu": ("gelu", {"W.0.": "multi_modal_projector.linear_1.", "W.2.": "multi_modal_projector.linear_2."})}
# What transformers 5 calls its modules, where the hub's files have other names.
HF_5 = {r"^model\.language_model\.": "language_model.model.", r"^lm_head\.": "language_model.lm_head.",
        r"^(model\.)?vision_tower\.(vision_model\.)?": "vision_tower.vision_model.",
        r"^model\.(multi_modal_projector\.|image_newline$)": r"\1"}
COMPUTED = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")     # no weights, but in old files


def hf_keys(state):
    """{name: anything} under the names of the hub's llava-hf files, from these or from what transformers 5 calls its modules;
    without what is no weight.

    ValueError if both kinds of names are mixed, so that two weights would be one.
    """
    def old(name):
        return next((re.sub(new, to, name) for new, to in HF_5.items() if re.match(new, name)), name)
    state = {name: value for name, value in state.items() if not COMPUTED.search(name)}
    renamed = {old(name): value for name, value in state.items()}
    if len(renamed) < len(state):
        raise ValueError(f"{len(state)} weights have {len(renamed)} names: old and new llava-hf names are mixed")
    return renamed


def save_settings(folder, tokenizer, view, eos_ids, config=None):
    """All of a checkpoint folder but the weights; config.json last, for a folder with one is whole."""
    size = {"size": {"shortest_edge": view.size}, "crop_size": {"height": view.size, "width": view.size}}
    if tiling := view.tiling:                            # transformers reads (height, width): the same canvases, in our order
        pinpoints = [[h, w] if tiling.rule == "original" else [w, h] for w, h in tiling.pinpoints]
        image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **size)
    elif view.aspect == "pad":
        image_processor = LlavaImageProcessorPil(do_pad=True, **size)
    else:
        image_processor = CLIPImageProcessorPil(**size)
    # One more token (CLS) that "default" takes away again: N placeholders a picture in LlavaProcessor.
    (LlavaNextProcessor if tiling else LlavaProcessor)(
        image_processor, tokenizer, patch_size=view.patch, num_additional_image_tokens=1,
        vision_feature_select_strategy="default").save_pretrained(folder)
    image_processor.save_pretrained(folder)              # preprocessor_config.json, which older readers look for
    GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(eos_ids),
                     pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    if config:                                           # an adapter has none
        if tiling:
            config.image_grid_pinpoints = pinpoints
        config.save_pretrained(folder)


def load_settings(folder):
    """(transformers' config, what we added to it, the `View`, the projector) of a checkpoint folder.

    FileNotFoundError for what is no checkpoint, ValueError for what this model is not.
    """
    there = lambda file: os.path.isfile(os.path.join(folder, file))
    if not there("config.json"):
        raise FileNotFoundError(f"{folder}: no config.json; a checkpoint is the --out folder of a finished train.py" + (
            "; this one holds an adapter, which belongs to the merged checkpoint beside it" * there("adapter_config.json")))
    try:
        raw, _ = LlavaConfig.get_config_dict(folder, local_files_only=True)
    except OSError as error:
        raise ValueError(f"{folder}: config.json is no whole JSON file; copy it again") from error
    if (kind := raw.get("model_type")) not in ("llava", "llava_next") or "text_config" not in raw:
        raise ValueError(f"{folder}: model_type in config.json is {kind!r}; a checkpoint in llava-hf's layout has 'llava' or "
                         "'llava_next', and a text_config; convert.py makes one of a folder of the original project")
    config = (LlavaConfig if kind == "llava" else LlavaNextConfig).from_pretrained(folder, local_files_only=True)
    projectors = {act: name for name, (act, _) in PROJECTORS.items()}
    for name, allowed in (("projector_hidden_act", list(projectors)), ("vision_feature_select_strategy", ["default"]),
                          ("vision_feature_layer", range(-config.vision_config.num_hidden_layers - 1, 0))):
        if (found := getattr(config, name)) not in allowed:
            raise ValueError(f"{folder}: {name} in config.json is {found!r}; this model has {allowed}")
    meta = getattr(config, "minllava", None) or {}
    size, patch, ours = config.vision_config.image_size, config.vision_config.patch_size, meta
    if "aspect" not in meta and kind == "llava_next":    # not ours: as transformers runs it
        tiling = tiles.NEXT._replace(pinpoints=config.image_grid_pinpoints, tile=size, patch=patch, rule="hf")
        ours = {"aspect": "anyres", "tiling": tiling._asdict()}
    elif "aspect" not in meta:
        files = filter(there, ("processor_config.json", "preprocessor_config.json"))     # transformers 5 writes the first
        found = [json.loads(Path(folder, file).read_text()) for file in files]
        pads = any(processor.get("image_processor", processor).get("do_pad", False) for processor in found)
        ours = {"aspect": "pad" if pads else "crop"}
    view = view_from(ours, size, patch, folder)
    if (kind == "llava_next") != bool(view.tiling):
        raise ValueError(f"{folder}: config.json has model_type {kind!r}, and looks at pictures by aspect {view.aspect!r}; "
                         "'llava_next' belongs to tiles, and only to them")
    return config, meta, view, projectors[config.projector_hidden_act]


def view_from(meta, size, patch, folder):
    """The `View` that a model's "minllava" describes, for a g of that size. ValueError names `folder`."""
    aspect, tiling = meta["aspect"], meta.get("tiling")
    if aspect not in ASPECTS or (aspect in ("anyres", "hd")) != bool(tiling):
        raise ValueError(f"{folder}: aspect {aspect!r} {'with' if tiling else 'without'} tiling; anyres and hd have one, crop "
                         "and pad none")
    try:
        view = View(aspect, size, patch, tiles.Tiling(**tiling) if tiling else None)
        view.tokens(size, size)                          # plans a picture: what does not fit is said here, and once
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: its tiling cannot be used: {error}") from error
    if tiling and (view.tiling.tile, view.tiling.patch) != (size, patch):
        raise ValueError(f"{folder}: tiles of {view.tiling.tile} pixels in patches of {view.tiling.patch}, for a vision tower "
                         f"of {size} and {patch}")
    return view


def load_tokenizer(llm):
    """A language model's tokenizer, from a hub id or a folder, with `<image>` as one reserved id."""
    if os.path.isdir(llm) and not os.path.isfile(os.path.join(llm, "tokenizer_config.json")):
        raise ValueError(f"--llm {llm}: no tokenizer_config.json; without it <s> and blanks would be guessed")
    tokenizer = AutoTokenizer.from_pretrained(llm)
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    if tokenizer.pad_token is None:                      # OFFICIAL: pad = unk; lengths, not ids, tell padding here
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_part(cls, name, flag, dtype):
    """`cls.from_pretrained(name)`, but a weight that the files lack is an error, never a random number."""
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise FileNotFoundError(f"--{flag} {name}: the folder has no config.json")
    try:
        part, info = cls.from_pretrained(name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, ValueError) as error:               # no such folder or hub id; a model of another kind
        raise ValueError(f"--{flag} {name}: cannot be loaded as {cls.__name__}: {str(error)[:300]}") from error
    if bad := sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]):
        raise ValueError(f"--{flag} {name}: {len(bad)} weights of {cls.__name__} are not in its files, or of another "
                         f"shape, e.g. {bad[:5]}; is it another kind of model?")
    return part
