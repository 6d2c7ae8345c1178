"""
A checkpoint is one folder in the layout of llava-hf, which transformers, vLLM, SGLang and
llama.cpp's converter read:

    config.json              LlavaConfig or LlavaNextConfig; what we add lies under "minllava"
    model.safetensors        the weights, in several files and an index where they are large
    processor_config.json    how a picture is prepared; preprocessor_config.json for older readers
    tokenizer.json, ...      with <image>, and the template as chat template
    generation_config.json   what ends an answer

An adapter's folder is PEFT's: adapter_config.json and adapter_model.safetensors stand in place of
the first two. Behaviour never depends on a folder's name, loading is strict and asks no network.
"""
import contextlib
import dataclasses
import os
import re
import shutil
import sys
from pathlib import Path

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
)
from transformers.initialization import no_init_weights
from transformers.utils import cached_file

from parts.decoders import check_language_model
from parts.files import IMAGE, read_value, typed, typed_fields, write_json
from parts.lora import adapters, merge
from parts.templates import TEMPLATES, chat_template
from parts.tiles import check_pinpoints
from parts.towers import tower_class
from parts.views import ASPECTS, TILINGS, pixels_from, view_from

# transformers reports CLIP's unused text tower; what is missing is an error of ours, see load_part
transformers.logging.set_verbosity_error()
if not sys.stderr.isatty():
    transformers.logging.disable_progress_bar()


@contextlib.contextmanager
def named_errors(where):
    """Turn what a library finds wrong with a person's file into a ValueError that says where.

    There it is of any class: of torch, of safetensors, a plain Exception of tokenizers.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())[:300]}") from error


# -----------------------------------------------------------------------------
# Keys: what a weight is called here, and in the files of llava-hf

LINEAR_1 = "multi_modal_projector.linear_1."
LINEAR_2 = "multi_modal_projector.linear_2."
PREFIXES = {"g.": "vision_tower.vision_model.", "f_phi.": "language_model.",
            "newline": "image_newline"}
PROJECTORS = {"linear": {"W.": LINEAR_1}, "mlp2x_gelu": {"W.0.": LINEAR_1, "W.2.": LINEAR_2}}
HIDDEN_ACT = {"linear": "linear", "mlp2x_gelu": "gelu"}      # projector: projector_hidden_act

# What transformers 5 calls its modules, and what the hub's files call them.
NEW_NAMES = {
    r"^model\.language_model\.": "language_model.model.",
    r"^lm_head\.": "language_model.lm_head.",
    r"^(model\.)?vision_tower\.(vision_model\.)?": "vision_tower.vision_model.",
    r"^model\.(multi_modal_projector\.|image_newline$)": r"\1",
}
# In old files, computed and not learned; and the head of SigLIP, which LLaVA has no use for.
UNUSED = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$"
                    r"|vision_tower\.(vision_model\.)?head\.")


def hf_keys(state):
    """{name: anything} under the names of the hub's files, from these or from transformers 5's."""
    renamed = {}
    for name, value in state.items():
        if UNUSED.search(name):
            continue
        for pattern, old_name in NEW_NAMES.items():
            name = re.sub(pattern, old_name, name)
        if name in renamed:
            raise ValueError(f"{name} stands twice: old and new llava-hf names are mixed; take "
                             "one of the two away")
        renamed[name] = value
    return renamed


def hf_names(model, names):
    """{our name of a weight: llava-hf's}, without a head that is the input embedding, too."""
    prefixes = PREFIXES | PROJECTORS[model.projector]
    found = {}
    for name in names:
        if model.f_phi.config.tie_word_embeddings and name == "f_phi.lm_head.weight":
            continue
        ours = next(prefix for prefix in prefixes if name.startswith(prefix))
        found[name] = prefixes[ours] + name.removeprefix(ours)
    return found


def to_hf_keys(model, state):
    """The model's `state` dict under llava-hf's names.

    A linear W is linear_1 = W, no activation, linear_2 = identity.
    """
    hf_state = {theirs: state[ours] for ours, theirs in hf_names(model, state).items()}
    if model.projector == "linear":
        hf_state |= identity_layer(model.W.out_features, model.W.weight.dtype)
    return hf_state


def from_hf_keys(model, hf_state, folder):
    """llava-hf's names to ours. Raises ValueError unless the keys are those that we would write."""
    state = model.state_dict()
    check_weights(hf_state, to_hf_keys(model, state), folder,
                  "pass a whole checkpoint folder, whose config.json is of the same model")
    check_finite(hf_state, folder)
    if model.projector == "linear":
        check_identity(hf_state, folder)
    state = {ours: hf_state[theirs] for ours, theirs in hf_names(model, state).items()}
    if model.f_phi.config.tie_word_embeddings:
        state["f_phi.lm_head.weight"] = state["f_phi.model.embed_tokens.weight"]
    return state


def identity_layer(D, dtype):
    """linear_2 of a linear W."""
    return {LINEAR_2 + "weight": torch.eye(D, dtype=dtype),
            LINEAR_2 + "bias": torch.zeros(D, dtype=dtype)}


def check_identity(hf_state, folder):
    """Raises ValueError if linear_2 does anything: then W is not one linear layer."""
    weight = hf_state[LINEAR_2 + "weight"].float()
    if not torch.equal(weight, torch.eye(len(weight))) or hf_state[LINEAR_2 + "bias"].any():
        raise ValueError(f"{folder}: linear_2 is not the identity, so W is not one linear layer")


def check_weights(found, wanted, where, advice):
    """Raises ValueError unless two {name: tensor} have the same names and shapes."""
    wrong = []
    for name in sorted(wanted.keys() & found.keys()):
        if found[name].shape != wanted[name].shape:
            shapes = f"{(*found[name].shape,)} instead of {(*wanted[name].shape,)}"
            wrong.append(f"{name} {shapes}")
    problems = {
        "are missing": sorted(wanted.keys() - found.keys()),
        "are not of this model": sorted(found.keys() - wanted.keys()),
        "have another shape": wrong,
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(f"{where}: {len(names)} weights {problem}, e.g. {names[:5]}; {advice}")


def check_finite(tensors, where):
    """Raises ValueError that names those of {name: tensor} which hold NaN or infinite numbers."""
    bad = []
    for name, tensor in tensors.items():
        # the least and the largest number take a tenth of the time of isfinite on all
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            bad.append(name)
    if bad:
        raise ValueError(f"{where}: NaN or infinite numbers in {len(bad)} of {len(tensors)}, "
                         f"e.g. {bad[:5]}; nothing can be computed with them")


# -----------------------------------------------------------------------------
# Settings: all of the folder but the weights


def llava_config(vision_config, text_config, dtype, feature_layer, projector, meta):
    """transformers' LlavaConfig; LlavaNextConfig where pictures are seen in tiles.

    `meta` is what we add. The caller sets image_token_index and pad_token_id.
    """
    tiling = meta.get("tiling")
    kind = LlavaNextConfig if tiling else LlavaConfig
    pinpoints = {"image_grid_pinpoints": hf_pinpoints(meta)} if tiling else {}
    architecture = kind.__name__.replace("Config", "ForConditionalGeneration")
    if getattr(vision_config, "gated_layers", 0):
        # Only parts/gated.py builds such blocks, so the name is one that no other program knows.
        architecture = "Gated" + architecture
    return kind(
        vision_config=vision_config.to_dict() | {"dtype": dtype},    # copies: it writes into them
        text_config=text_config.to_dict() | {"dtype": dtype},
        tie_word_embeddings=text_config.tie_word_embeddings,
        dtype=dtype,
        architectures=[architecture],
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=select_strategy(vision_config),
        projector_hidden_act=HIDDEN_ACT[projector],
        multimodal_projector_bias=True,
        minllava=meta,
        **pinpoints,
    )


def select_strategy(vision_config):
    """transformers' word for Z_v: without its first token, CLS, or all of g's tokens."""
    return "default" if tower_class(vision_config.model_type).has_cls else "full"


def projector_of(config):
    """Our name for the projector of a LlavaConfig."""
    return {act: name for name, act in HIDDEN_ACT.items()}[config.projector_hidden_act]


def hf_pinpoints(meta):
    """The canvases as transformers reads them: (height, width), in an order that breaks ties alike.

    For "anyres_hf" our own list is transformers' already.
    """
    step = 1 if meta["aspect"] == "anyres_hf" else -1
    return [list(pinpoint)[::step] for pinpoint in meta["tiling"]["pinpoints"]]


def save_settings(folder, tokenizer, eos_ids, vision_config, meta):
    """Write all of a checkpoint folder but config.json and the weights."""
    if "template" in meta:
        tokenizer.chat_template = chat_template(TEMPLATES[meta["template"]], tokenizer)
    side = vision_config.image_size
    square = {"height": side, "width": side}
    pixels = pixels_from(meta)
    size = {"size": {"shortest_edge": side}, "crop_size": square, "resample": pixels.resample,
            "image_mean": list(pixels.mean), "image_std": list(pixels.std)}
    processor_class = transformers.LlavaProcessor
    if meta.get("tiling"):
        processor_class = transformers.LlavaNextProcessor
        image_processor = transformers.LlavaNextImageProcessorPil(
            image_grid_pinpoints=hf_pinpoints(meta), **size)
    elif meta.get("aspect") == "pad":
        image_processor = transformers.LlavaImageProcessorPil(do_pad=True, **size)
    elif meta.get("aspect") == "squeeze":
        image_processor = transformers.SiglipImageProcessorPil(**size | {"size": square})
    else:
        image_processor = transformers.CLIPImageProcessorPil(**size)
    # One more token, CLS, which "default" takes away again: else 575 placeholders for 576 tokens.
    strategy = select_strategy(vision_config)
    processor = processor_class(
        image_processor, tokenizer, patch_size=vision_config.patch_size,
        num_additional_image_tokens=int(strategy == "default"),
        vision_feature_select_strategy=strategy)
    processor.save_pretrained(folder)
    image_processor.save_pretrained(folder)              # preprocessor_config.json
    copy_sentencepiece(tokenizer, folder)
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(eos_ids),
        pad_token_id=tokenizer.pad_token_id)
    generation.save_pretrained(folder)


def copy_sentencepiece(tokenizer, folder):
    """Copy the tokenizer.model that a tokenizer was read from, if any: transformers leaves it out,
    and llama.cpp's converter pads the vocabulary to the model's only beside one."""
    source = Path(getattr(tokenizer, "vocab_file", None) or "")
    if source.name == "tokenizer.model" and source.is_file():
        with contextlib.suppress(shutil.SameFileError):
            shutil.copyfile(source, Path(folder, source.name))


def has_file(folder, name):
    return os.path.isfile(os.path.join(folder, name))


def load_settings(folder):
    """(transformers' config, meta) of a checkpoint folder; meta always has aspect and tiling.

    Raises FileNotFoundError if the folder holds no checkpoint, ValueError if it holds a model that
    this project does not compute.
    """
    path = os.path.join(folder, "config.json")
    if not has_file(folder, "config.json"):
        raise FileNotFoundError(f"{folder}: no config.json; a checkpoint is the --out folder of a "
                                "finished train.py, and an adapter's belongs to one")
    raw = read_value(path)
    kind = raw.get("model_type")
    if kind not in ("llava", "llava_next") or "text_config" not in raw:
        raise ValueError(f"{folder}: model_type in config.json is {kind!r}; a checkpoint in "
                         "llava-hf's layout has 'llava' or 'llava_next', and a text_config; "
                         "extras.convert makes one of a folder of the original project")
    with named_errors(path):
        config = (LlavaNextConfig if kind == "llava_next" else LlavaConfig).from_dict(raw)
        check_supported(config)
        meta = typed(raw.get("minllava") or {}, dict, "minllava")
    if "aspect" not in meta:
        meta |= shown_to(tower_class(config.vision_config.model_type), folder)
        if kind == "llava_next":
            meta |= {"aspect": "anyres_hf", "tiling": {"pinpoints": config.image_grid_pinpoints}}
    meta.setdefault("tiling", None)
    check_meta(meta, config.vision_config, kind == "llava_next", folder)
    return config, meta


def check_parts(projector, feature_layer, vision_config):
    """Raises ValueError for a projector, or a layer of g, that there is not."""
    first = -vision_config.num_hidden_layers - 1
    if projector not in PROJECTORS or not first <= feature_layer <= -1:
        raise ValueError(f"projector {projector!r}, feature_layer {feature_layer}: there are "
                         f"{list(PROJECTORS)}, and of this tower the layers {first} (what the "
                         "first one takes) to -1 (after the last)")


def check_supported(config):
    """Raises ValueError for settings of a LlavaConfig that would be another model than ours."""
    n_layers = config.vision_config.num_hidden_layers
    supported = {
        "projector_hidden_act": list(HIDDEN_ACT.values()),
        "vision_feature_select_strategy": [select_strategy(config.vision_config)],
        "vision_feature_layer": range(-n_layers - 1, 0),
    }
    for name, allowed in supported.items():
        found = getattr(config, name)
        if found not in allowed:
            raise ValueError(f"{name} is {found!r}; this model has one of {list(allowed)}")


def shown_to(tower, name):
    """aspect and pixels by the image processor of a folder or a hub id; what that does not say is
    the tower's habit."""
    found = {}
    for file in ("preprocessor_config.json", "processor_config.json"):   # of transformers 4, 5
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if path:
            settings = read_value(path)
            found |= typed(settings.get("image_processor", settings), dict, path)
    aspect, size = tower.shown["aspect"], found.get("size")
    if found.get("do_pad"):
        aspect = "pad"
    elif found.get("do_center_crop"):
        aspect = "crop"
    elif isinstance(size, dict) and "height" in size:
        aspect = "squeeze"
    pixels = tower.shown["pixels"]._asdict()
    for ours, theirs in {"mean": "image_mean", "std": "image_std", "resample": "resample"}.items():
        pixels[ours] = found.get(theirs, pixels[ours])
    with named_errors(f"{name}: its image processor cannot be used"):
        pixels_from({"pixels": pixels})
    return {"aspect": aspect, "pixels": pixels}


def check_meta(meta, vision_config, has_row_ends, folder):
    """Raises ValueError unless what we add to config.json fits a model: its g, its row ends."""
    template, aspect, tiling = meta.get("template", "plain"), meta["aspect"], meta["tiling"]
    if template not in list(TEMPLATES):
        raise ValueError(f"{folder}: template {template!r} is none of {', '.join(TEMPLATES)}")
    in_tiles = aspect in TILINGS
    if aspect not in ASPECTS or {bool(tiling), has_row_ends} != {in_tiles}:
        raise ValueError(f"{folder}: aspect {aspect!r} with tiling {tiling} and row ends "
                         f"(model_type llava_next) {has_row_ends}; of {ASPECTS}, those that begin "
                         "with anyres or hd have both, and the others neither")
    with named_errors(f"{folder}: its pixels or its tiling cannot be used"):
        view = view_from(meta, vision_config)
        if tiling:
            check_pinpoints(view.tiling)
            view.tokens(view.size, view.size)            # what is no whole number is found here


def inherit(config, origin):
    """What a model of stage 2 that is trained on (config.init) brings along: features and view.

    config, origin    a dataclass with init, feature_layer, projector, aspect, and where its values
                      came from; both come back. A flag that was typed wins. A recipe's features and
                      views are for a model that is new, or fresh from stage 1.
    """
    if config.init in (None, "none"):
        return config, origin
    theirs, meta = load_settings(config.init)
    if meta.get("stage") == 1:
        return config, origin
    inherited = {"feature_layer": theirs.vision_feature_layer, "aspect": meta["aspect"],
                 "projector": projector_of(theirs)}
    inherited = {flag: value for flag, value in inherited.items() if origin[flag] != "command line"}
    config = dataclasses.replace(config, **inherited)
    return config, origin | dict.fromkeys(inherited, "checkpoint")


# -----------------------------------------------------------------------------
# The whole model


def save(model, folder, dtype=None, state=None, shard="5GB"):
    """Write a model as a checkpoint folder; it is complete once it has its config.json.

    dtype    casts the weights; else they are written in W's
    state    the model's state dict, where it was gathered already
    shard    size of a file of weights, at most
    Adapters are written alone, for PEFT, and then merged with the weights that they began with.
    """
    dtype = dtype or next(model.W.parameters()).dtype
    config = llava_config(model.g.config, model.f_phi.config, dtype, model.feature_layer,
                          model.projector, model.meta)
    config.image_token_index = model.image_id
    config.pad_token_id = model.tokenizer.pad_token_id
    os.makedirs(folder, exist_ok=True)
    Path(folder, "config.json").unlink(missing_ok=True)
    state = state or model.state_dict()
    if adapters(model.f_phi):
        adapter = os.path.join(folder, "adapter")
        save_adapter(model, adapter, state)
        model = load(type(model), adapter, dtype)        # merged
        merged = model.state_dict()
        name = "f_phi.model.embed_tokens.weight"         # frozen, and not in 4 bits
        if not torch.equal(merged[name], state[name].cpu().to(dtype)):
            raise ValueError(f"{model.meta['init']} has other weights now than these adapters were "
                             "trained on; put the old ones back, and --resume")
        state = merged
    state = to_hf_keys(model, state)
    for name, value in state.items():
        # parts/decoders.py lays several weights side by side; safetensors takes no part of a whole
        is_part = value.untyped_storage().nbytes() > value.nbytes
        state[name] = value.to(dtype, copy=is_part)
    save_torch_state_dict(state, folder, max_shard_size=shard, metadata={"format": "pt"})
    save_settings(folder, model.tokenizer, model.eos_ids, model.g.config, model.meta)
    config.save_pretrained(folder)


def load(cls, folder, dtype=torch.float32):
    """A model of class `cls` (model.LLaVA) from a checkpoint folder, in eval mode.

    dtype   None: its weights are the files', mapped, as parts/ranks.py wants them
    An adapter's folder is loaded as its base with the adapter merged. Raises FileNotFoundError if
    the folder holds no checkpoint, ValueError for keys that are missing or left over.
    """
    if has_file(folder, "adapter_config.json") and not has_file(folder, "config.json"):
        model = load_adapter(cls, folder, dtype)
    else:
        model = load_whole(cls, folder, dtype)
    if has_file(folder, "generation_config.json"):
        model.f_phi.generation_config.eos_token_id = read_ends(folder)
    return model.eval()


def load_whole(cls, folder, dtype):
    """The model of a folder that has all of its weights."""
    config, meta = load_settings(folder)
    tokenizer = read_tokenizer(folder)
    found, image_id = config.image_token_index, tokenizer.convert_tokens_to_ids(IMAGE)
    if found != image_id:
        raise ValueError(f"{folder}: image_token_index in config.json is {found}; in its tokenizer "
                         f"{IMAGE} is {image_id}")
    # every weight is about to be overwritten
    with named_errors(f"{folder}: config.json describes no model"), no_init_weights():
        g = tower_class(config.vision_config.model_type)(config.vision_config)
        f_phi = transformers.AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
        f_phi.tie_weights()
        model = cls(g, f_phi, tokenizer, config.vision_feature_layer, projector_of(config), meta)
        if meta["tiling"]:
            model.add_newline()
    if dtype:
        for p in model.parameters():     # not model.to(dtype), which would round the rotary
            p.data = p.data.to(dtype)    # frequencies, too
    state = from_hf_keys(model, read_weights(folder), folder)
    model.load_state_dict(state, assign=dtype is None)
    if dtype is None:
        f_phi.tie_weights()              # they were assigned one by one
        model.W.float()
    with named_errors(folder):
        check_language_model(f_phi)
    return model


def read_ends(folder):
    """The ids that end an answer, by a folder's generation_config.json."""
    path = os.path.join(folder, "generation_config.json")
    ends = read_value(path).get("eos_token_id")
    if not isinstance(ends, list):
        ends = [ends]
    return [typed(i, int, f"{path}: eos_token_id") for i in ends if i is not None]


def read_tokenizer(name):
    with named_errors(f"{name}: its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer("a word")              # settings of another type are found here, not in a run
        return tokenizer


def weight_files(folder):
    """The files of a whole model, .safetensors before .bin; [] if there is none."""
    folder = Path(folder)
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def load_tensors(path, only=None):
    """{name: tensor} of a weight file, or of one weight of it; mapped, so reading costs nothing."""
    with named_errors(f"{path}: not a whole file of weights; copy it again"):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:             # load_file would touch every weight
                return {name: f.get_tensor(name) for name in ([only] if only else f.keys())}
        state = torch.load(path, "cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{path}: holds other things than named weights")
    return state


def read_weights(folder):
    """{llava-hf's name: tensor} of all weight files of a folder."""
    state = {}
    for path in weight_files(folder):
        tensors = load_tensors(path)
        with named_errors(path):
            new = hf_keys(tensors)
        check_new(new, state, path)
        state |= new
    return state


def check_new(new, old, path):
    """Raises ValueError if a file brings weights that another one has brought already."""
    twice = sorted(new.keys() & old.keys())
    if twice:
        raise ValueError(f"{path}: {len(twice)} weights that another file has too, e.g. "
                         f"{twice[:5]}; take the older files away")


# -----------------------------------------------------------------------------
# The parts of a new model: a hub id or a folder each


def load_part(cls, name, dtype, flag):
    """cls.from_pretrained(name); a weight that the files lack is an error, never a random number.

    dtype   None: that of the files, which are mapped
    flag    the command's flag, without dashes, which errors name
    """
    with named_errors(f"--{flag} {name}: cannot be loaded as {cls.__name__}"):
        kind = getattr(cls, "config_class", None) or transformers.AutoConfig
        config = kind.from_pretrained(name)
        if dtype is None:
            config.dtype = None          # what it says need not be true of the files
        part, info = cls.from_pretrained(name, config=config, dtype=dtype or "auto",
                                         output_loading_info=True, ignore_mismatched_sizes=True)
    bad = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if bad:
        raise ValueError(f"--{flag} {name}: {len(bad)} weights of {cls.__name__} are not in its "
                         f"files, or of another shape, e.g. {bad[:5]}; is it another model?")
    check_finite(part.state_dict(), f"--{flag} {name}")
    return part


def load_language_model(name, dtype):
    """A pretrained f_phi. Raises ValueError for one that is not computed or saved here."""
    f_phi = load_part(transformers.AutoModelForCausalLM, name, dtype, "llm")
    with named_errors(f"--llm {name}"):
        check_language_model(f_phi)
    return f_phi


def kind_of(name, flag):
    """The model_type of a folder or a hub id."""
    with named_errors(f"--{flag} {name}: no config.json can be read"):
        settings, _ = PreTrainedConfig.get_config_dict(name)
    return settings.get("model_type")


def load_tower(name, dtype):
    """(g, and how it was shown pictures: aspect, tiling, pixels), from a folder or a hub id."""
    kind = kind_of(name, "vision")
    with named_errors(f"--vision {name}"):
        tower = tower_class(kind)
    return load_part(tower, name, dtype, "vision"), shown_to(tower, name) | {"tiling": None}


def load_tokenizer(llm):
    """A language model's tokenizer, with <image> as one reserved id."""
    if os.path.isdir(llm) and not has_file(llm, "tokenizer_config.json"):
        raise ValueError(f"--llm {llm}: no tokenizer_config.json; without it <s> and blanks would "
                         "be guessed")
    tokenizer = read_tokenizer(llm)
    if IMAGE not in tokenizer.get_vocab():
        token = transformers.AddedToken(IMAGE, special=True, normalized=False)
        tokenizer.add_tokens([token])
    if tokenizer.pad_token is None:      # OFFICIAL: pad = unk; lengths, not ids, tell padding here
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def grow_vocabulary(f_phi, size):
    """Give every id below `size` a row of embedding and head, where there is no spare one.

    OURS: they grow to a multiple of 64, as engines want it, from 32,000 to 32,064 for Vicuna, and
    new rows are the mean of the old ones.
    """
    old_size = f_phi.get_input_embeddings().num_embeddings
    if size <= old_size:
        return
    f_phi.resize_token_embeddings(size, pad_to_multiple_of=64, mean_resizing=False)
    for layer in (f_phi.get_input_embeddings(), f_phi.get_output_embeddings()):
        rows = layer.weight.data
        rows[old_size:] = rows[:old_size].float().mean(0).to(rows.dtype)


# -----------------------------------------------------------------------------
# Adapters (parts/lora.py) in PEFT's own layout: A, B and all of W

PEFT = "base_model.model."               # before transformers' names
ADAPTER_KIND = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "use_rslora": False,
                "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
                "modules_to_save": ["multi_modal_projector"]}


def peft_state(model, state):
    """{PEFT's name: tensor} of what LoRA trains, from the model's `state` dict."""
    found = {}
    for name, value in to_hf_keys(model, state).items():
        if ".lora_" in name:
            layer = name.removeprefix("language_model.model.")
            found[f"{PEFT}model.language_model.{layer}.weight"] = value
        elif name.startswith("multi_modal_projector."):
            found[f"{PEFT}model.{name}"] = value
    return found


def save_adapter(model, folder, state):
    """Write adapters and W as a folder for PEFT: on AutoModelForImageTextToText of meta's "init".

    Processor, tokenizer and template lie in it, too, for what training started from may be a
    stage 1, which knows neither this view nor any turns. vLLM needs the merged checkpoint: it takes
    no adapter that brings modules of its own, such as W.
    """
    layers = adapters(model.f_phi.base_model)
    names = sorted({name.split(".")[-1] for name in layers})
    layer = next(iter(layers.values()))
    config = ADAPTER_KIND | {
        "base_model_name_or_path": os.path.abspath(model.meta["init"]),
        "r": len(layer.lora_A),
        "lora_alpha": layer.alpha,
        "lora_dropout": layer.dropout,
        "inference_mode": True,
        # names alone would match CLIP's layers, too
        "target_modules": rf"model\.language_model\..*\.({'|'.join(names)})",
    }
    os.makedirs(folder, exist_ok=True)
    save_file(peft_state(model, state), os.path.join(folder, "adapter_model.safetensors"),
              metadata={"format": "pt"})
    save_settings(folder, model.tokenizer, model.eos_ids, model.g.config, model.meta)
    write_json(os.path.join(folder, "minllava.json"), model.meta)
    write_json(os.path.join(folder, "adapter_config.json"), config)      # last: with it, complete


def adapter_settings(folder):
    """An adapter's adapter_config.json. Raises ValueError if PEFT would compute another thing."""
    path = os.path.join(folder, "adapter_config.json")
    config = typed_fields(read_value(path), path, r=int, lora_alpha=float)
    if config["r"] < 1:
        raise ValueError(f"{path}: rank {config['r']}; 1 or more is needed")
    for key, value in ADAPTER_KIND.items():
        if config.get(key) not in (value, None):         # None: PEFT's default, and no W in it
            raise ValueError(f"{path}: an adapter of another kind: {key} {config[key]!r}, not "
                             f"{value!r}; merge it by PEFT, pass that folder")
    return config


def lora_weights(layers, rank):
    """{name: A and B, without numbers} of an adapter for {layer's name: W_0}."""
    wanted = {}
    for layer, W_0 in layers.items():
        rows, columns = W_0.shape
        wanted[f"{layer}.lora_A.weight"] = torch.empty(rank, columns, device="meta")
        wanted[f"{layer}.lora_B.weight"] = torch.empty(rows, rank, device="meta")
    return wanted


def adapter_weights(names, state, config):
    """{name: tensor of the right shape} of what an adapter of these layers has: A and B of each,
    and all of W, or nothing of it. state: that of its base."""
    layers = {}
    for layer in {name.split(".lora_")[0] for name in names if ".lora_" in name}:
        if f"{layer}.weight" in state and layer.startswith("language_model."):
            layers[layer] = state[f"{layer}.weight"]
    wanted = lora_weights(layers, config["r"])
    if config.get("modules_to_save"):
        wanted |= {name: state[name] for name in state if name.startswith("multi_modal_projector.")}
    return wanted


@torch.no_grad()
def load_adapter(cls, folder, dtype):
    """An adapter's base with the adapter merged; W, tokenizer and meta become the adapter's.

    PEFT alone may have made it of a few layers, without W and without our meta: what it lacks stays
    as it is. Raises FileNotFoundError without its base, ValueError for an adapter of another kind
    or of another model.
    """
    config = adapter_settings(folder)
    base = typed(config.get("base_model_name_or_path"), str, f"{folder}: base_model_name_or_path")
    if not has_file(base, "config.json"):
        raise FileNotFoundError(f"{folder}: an adapter without its base, {base!r} is no checkpoint "
                                "folder here; put its place into its adapter_config.json "
                                "(base_model_name_or_path), or pass a merged checkpoint")
    model = load(cls, base, dtype or torch.float32)
    tensors = load_tensors(Path(folder, "adapter_model.safetensors"))
    with named_errors(folder):
        new = hf_keys({name.removeprefix(PEFT): value for name, value in tensors.items()})
        state = to_hf_keys(model, model.state_dict())
        wanted = adapter_weights(new, state, config)
    check_weights(new, wanted, folder,
                  f"an adapter of another model than its base, {base!r}, or of another rank than "
                  f"{config['r']} or modules_to_save than {config.get('modules_to_save')}")
    with named_errors(f"{folder}: an adapter of another model; pass its base, {base!r}"):
        scale = config["lora_alpha"] / config["r"]
        for name in list(new):
            layer, is_A, _ = name.partition(".lora_A.")
            if is_A:
                A = new.pop(name)
                B = new.pop(f"{layer}.lora_B.weight")
                W_0 = state[f"{layer}.weight"]
                W_0.copy_(merge(W_0, A, B, scale))       # in place: no second f_phi in memory
        model.load_state_dict(from_hf_keys(model, state | new, folder))
    if has_file(folder, "minllava.json"):
        model.meta |= read_value(os.path.join(folder, "minllava.json"))
        check_meta(model.meta, model.g.config, model.newline is not None, folder)
        model.tokenizer = read_tokenizer(folder)
    return model
