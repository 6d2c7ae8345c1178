"""Tiny real models and tokenizers, built from configs in the process: no download, no mock."""
import io
import itertools
import json
import multiprocessing
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AddedToken,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
)

from data import collate, sample_of
from model import LLaVA
from parts.files import IGNORE, IMAGE
from parts.ranks import TRAINING
from parts.templates import TEMPLATES
from parts.towers import CLIPTower, SiglipTower
from parts.views import view_from

# such small matrices gain nothing from a second thread, and lose much on a busy machine
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """What trains for minutes starts first, so that the other processes do not wait for its end."""
    items.sort(key=lambda item: item.module.__name__ not in ("test_nano", "test_own"))


def byte_tokenizer(specials=("<unk>", "<s>", "</s>")):
    """One id a byte behind the specials: any text has ids, and every id has a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate([*specials, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<unk>")
    for token in (*specials, IMAGE):
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)])
    return tokenizer


def tiny_clip(image_size=28, seed=0):
    """ViT with the shape of CLIP ViT-L/14: 14-pixel patches, 28 px -> N = 4 visual tokens."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                              num_attention_heads=2, image_size=image_size, patch_size=14)
    random = CLIPVisionModel(config).state_dict()        # larger than our class's own
    tower = CLIPTower(config)
    tower.load_state_dict(random)
    return tower.eval()


def tiny_siglip(image_size=28, seed=0):
    """ViT with the shape of SigLIP so400m: 14-pixel patches, no CLS; N = 4 at 28 or up to 41 px."""
    torch.manual_seed(seed)
    config = SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                                num_attention_heads=2, image_size=image_size, patch_size=14)
    return SiglipTower(config).eval()


# The kinds of language models, and what transformers calls the classes of each.
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
            "smollm3": "SmolLM3", "gemma": "Gemma", "gemma3": "Gemma3", "phi3": "Phi3"}


def tiny_llm(family="llama", tied=False, vocab_size=320, seed=0, **more):
    name = FAMILIES[family]
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(seed)
    tiny = dict(
        vocab_size=vocab_size, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
        tie_word_embeddings=tied)
    return model(config(**tiny | more)).eval()


def tiny_llava(family="llama", tied=False, **more):
    model = LLaVA(tiny_clip(), tiny_llm(family, tied), byte_tokenizer(), **more)
    torch.manual_seed(1)
    for p in model.W.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.5)
    return model.eval()


def answer_logits(model, **batch):
    """Logits (A, V) at the positions that predict an answer token, and the tokens (A,)."""
    h, targets = model.answer_states(**batch)
    return model.f_phi.get_output_embeddings()(h), targets


@pytest.fixture
def llava():
    return tiny_llava()


def scripted_llm(*texts, end=None):
    """A Llama that has learnt texts by heart: no layer does anything, and the head maps each byte
    to the one behind it.

    No byte may have two different successors. `end`: the byte behind which an answer ends.
    """
    llm = tiny_llm()
    id_of = byte_tokenizer().encode
    pairs = [pair for text in texts for pair in itertools.pairwise(id_of(text))]
    follows = dict(pairs)
    assert all(follows[a] == b for a, b in pairs), "two successors"
    if end:
        follows[id_of(end)[-1]] = llm.config.eos_token_id
    with torch.no_grad():
        for layer in llm.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        h = llm.model.norm(llm.model.embed_tokens.weight)             # (V, D)
        llm.lm_head.weight.zero_()
        for a, b in follows.items():
            llm.lm_head.weight[b] += 100 * h[a]
    return llm


def chat(*texts):
    """The turns of a conversation: question, answer, question, ..."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def messages_of(turns, picture=None):
    """Turns as messages of a chat template; with a picture in parts, in which it is <image>."""
    messages = []
    for turn in turns:
        content = turn["value"]
        if picture is not None:
            pieces = [piece for piece in re.split(f"({IMAGE})", content) if piece.strip()]
            content = [{"type": "image", "image": picture} if piece == IMAGE else
                       {"type": "text", "text": piece} for piece in pieces]
        role = {"human": "user", "gpt": "assistant"}[turn["from"]]
        messages.append({"role": role, "content": content})
    return messages


def noise(size=(40, 30), seed=0):
    """A picture of random pixels, of (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def view_seen_by(model):
    """The View of a model; a new one sees what the paper's sees."""
    return view_from({"aspect": "crop"} | model.meta, model.g.config)


def sample_from(model, texts, pictures=(), template=None):
    """A sample of question, answer, question, ... about pictures; an open end is a prompt."""
    named = [(id(picture), picture) for picture in pictures]
    template = TEMPLATES[template or model.meta.get("template", "vicuna_v1")]
    return sample_of(chat(*texts), named, model.tokenizer, template, view_seen_by(model))


def batch_from(model, samples, side="right"):
    return collate(samples, view_seen_by(model), side)


# -----------------------------------------------------------------------------
# transformers as the oracle


def processor_pixels(folder, pictures):
    """What the image processor in a folder makes of pictures."""
    if not pictures:
        return {}
    processor = AutoProcessor.from_pretrained(folder).image_processor
    return dict(processor(pictures, return_tensors="pt"))


def assert_same_model(ours, theirs, batch, pixels, atol=1e-5):
    """On a batch, transformers' model has our logits at the answers' tokens, and our loss.

    Both losses are then taken backwards, so that gradients can be compared.
    """
    inputs = {name: batch[name] for name in TRAINING}
    out = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                 labels=batch["labels"], **pixels)
    scored = batch["labels"][:, 1:] != IGNORE
    logits, targets = answer_logits(ours, **inputs)
    assert torch.equal(targets, batch["labels"][:, 1:][scored])
    torch.testing.assert_close(logits, out.logits[:, :-1][scored], atol=atol, rtol=atol,
                               msg=lambda m: f"others run another forward pass:\n{m}")
    total, count = ours(**inputs)
    torch.testing.assert_close(total / count, out.loss, atol=1e-5, rtol=1e-5,
                               msg=lambda m: f"Eq. (3) is shifted or scaled: {m}")
    (total / count).backward()
    out.loss.backward()


# -----------------------------------------------------------------------------
# On disk: what the commands take

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def write_tar(path, members):
    """A tar of (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def save_parts(folder, llm=None, tokenizer=None, clip=None):
    """A CLIP folder and a language model folder with its tokenizer, as `--vision` and `--llm` take
    them."""
    (clip or tiny_clip()).save_pretrained(folder / "clip")
    (llm or tiny_llm()).save_pretrained(folder / "llm")
    (tokenizer or byte_tokenizer()).save_pretrained(folder / "llm")
    return folder


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """chat.json and images/: 41 samples of one to three answers; a third is text alone, some have
    two pictures."""
    folder, rng = tmp_path_factory.mktemp("chats"), np.random.default_rng(0)
    (folder / "images").mkdir()
    modes, records = ["RGB", "L", "RGBA", "P", "CMYK"], []
    for i in range(41):
        extension = "png" if i % 2 else "tiff"
        n_pictures = [1, 0, 1, 0, 2, 1, 1, 0][i % 8]
        names = [f"{i}_{j}.{extension}" for j in range(n_pictures)]
        for name in names:
            shape = (*rng.integers(9, 90, 2), 3)
            picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
            mode = modes[i % 4 if i % 2 else i % 5]
            picture.convert(mode).save(folder / "images" / name)
        turns = []
        for turn in range(1 + i % 3):
            tags = "<image>\n" * len(names) if turn == 0 else ""
            colour = ["red", "green", "blue"][i % 3]
            turns.append({"from": "human", "value": f"{tags}What is {i}.{turn}?"})
            turns.append({"from": "gpt", "value": f"It is {'long and ' * (i % 4)}{colour}."})
        image = {"image": names if len(names) > 1 else names[0]} if names else {}
        records.append({"id": f"chat_{i}", **image, "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records))
    return folder


# -----------------------------------------------------------------------------
# Real processes. Importing torch and transformers takes seconds; a fork server imports them once,
# and each process that
# it forks runs a script as `python script.py ARGUMENTS` would: its own pid, signals, standard
# streams and exit code.

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "train", "sample", "matplotlib.pyplot"])


def be_script(script, argv, folder, stdin, stdout, file_size, environment):
    os.environ.update(environment)
    os.setsid()                          # a group of its own, as a terminal's foreground job has
    # its own processes start as they would without the fork server
    multiprocessing.set_start_method(None, force=True)
    os.chdir(folder)
    os.dup2(os.open(stdin, os.O_RDONLY), 0)
    for fd in (1, 2):
        os.dup2(os.open(stdout, os.O_WRONLY | os.O_APPEND), fd)
    sys.stdin = open(0, closefd=False)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = [script, *map(str, argv)]
    if script.endswith(".py"):
        runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
    else:                                # "extras.react", as in python -m extras.react
        sys.path.insert(0, ROOT)
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def start_script(folder, script, *argv, stdin="", file_size=None, fifo=False, environment=()):
    """Start a script ("train.py") or a module ("extras.react") with `folder` as its working folder.

    Returns the process. Its output goes to folder/output, which is a FIFO if `fifo`; `file_size`
    limits the bytes that it may write to a file.
    """
    (folder / "input").write_text(stdin)
    (folder / "output").unlink(missing_ok=True)
    os.mkfifo(folder / "output") if fifo else (folder / "output").touch()
    args = (script, argv, folder, folder / "input", folder / "output", file_size, environment)
    process = FORKS.Process(target=be_script, args=args)
    process.start()
    return process


def run_script(folder, script, *argv, **options):
    """Run a script to its end; returns (exit code, standard output and error together)."""
    process = start_script(folder, script, *argv, **options)
    process.join(120)
    return process.exitcode, (folder / "output").read_text()


def open_ranks(ranks):
    """(the store that ranks meet at, which has to be kept, the environment of each), as torchrun
    has them: no port is free for a moment that another process may take."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return store, [environment | {"RANK": str(rank)} for rank in range(ranks)]


def run_ranks(folder, ranks, script, *argv):
    """Run a script in several processes that train together, without torchrun's own start; returns
    what rank 0 shows."""
    _store, environments = open_ranks(ranks)
    processes = []
    for rank, environment in enumerate(environments):
        home = folder / f"rank_{rank}_of_{ranks}"
        home.mkdir()
        processes.append(start_script(home, script, *argv, environment=environment))
    for process in processes:
        process.join(200)
        process.kill()                   # if it waits for a rank that is gone
    shown = [(folder / f"rank_{rank}_of_{ranks}/output").read_text() for rank in range(ranks)]
    assert [process.exitcode for process in processes] == [0] * ranks, "\n".join(shown)[-5000:]
    return shown[0]


@contextmanager
def refused(*words):
    """What runs within must end in one line that names what and where."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        yield
    message = str(caught.value)
    for word in words:
        assert str(word) in message, f"the message should name {word}: {message[:600]}"
    assert len(message) < 1000 and "\n" not in message, f"not one line: {message}"


def wait_until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"it did not happen within {seconds} seconds"
        time.sleep(0.01)


def killed_when(condition, folder, argv, delay=0.0, script="train.py"):
    """SIGKILL a run `delay` seconds after `condition` is true; False if it ended before."""
    process = start_script(folder, script, *argv)
    while process.is_alive() and not condition():
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), (folder / "output").read_text()
    return process.exitcode != 0


def torchrun(ranks, argv, *options, code=0, meanwhile):
    """What `torchrun` over so many processes shows; it must end, with that exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={ranks}", *options, f"{ROOT}/train.py", *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    process = subprocess.Popen(command, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        meanwhile(process)
        shown, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)       # torchrun takes its processes with it
        pytest.fail(f"torchrun does not end:\n{process.communicate()[0][-5000:]}")
    assert process.returncode == code, shown[-9000:]
    return shown


# -----------------------------------------------------------------------------
# A language model's endpoint, as far as a client can tell


@pytest.fixture
def serve(tmp_path):
    """Start tests/chat_server.py with some settings; returns its address and the file of all that
    it was asked."""
    processes = []

    def start(**settings):
        log = tmp_path / f"log{len(processes)}.jsonl"
        server = os.path.join(ROOT, "tests", "chat_server.py")
        command = [sys.executable, server, json.dumps({"log": str(log), **settings})]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return f"http://127.0.0.1:{int(process.stdout.readline())}/v1", log
    yield start
    for process in processes:
        process.kill()


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
