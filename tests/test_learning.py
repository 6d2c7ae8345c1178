"""The toy with parts of other kinds learns what it is shown, by the commands of both stages."""
import json
import random

import pytest
from conftest import save_parts, tiny_llm, tiny_siglip
from PIL import Image
from test_families import with_tokens

import sample
import train
from parts.checkpoints import read_tokenizer
from parts.decoders import Fast
from parts.files import IMAGE, ROOT, write_json
from parts.pictures import load_image
from toy import world


def one_thing_each(folder, n):
    """Pictures of toy/world.py with a single thing of eight kinds, and what each shows."""
    rng = random.Random(0)
    kinds = world.SEEN[::3][:8]
    truths = []
    folder.mkdir()
    for i in range(n):
        thing = world.place_thing(rng, rng.choice(kinds), rng.randrange(16), world.SIDE)
        world.draw_scene(world.scene_with([thing])).save(folder / f"{i}.png")
        truths.append(f"A {thing.name}.")
    return truths


@pytest.mark.slow
def test_the_toy_with_a_new_Qwen3_trains_and_answers(tmp_path):
    """Sec. 4.2 by the commands: its two layers have never been trained, the toy's CLIP is frozen;
    on pictures it has not seen it names thing and colour, and only by seeing."""
    truths = one_thing_each(tmp_path / "images", 300)
    records = []
    for i, truth in enumerate(truths[:240]):
        turns = [sample.human_turn("What is it?", 1), {"from": "gpt", "value": truth}]
        records.append({"id": i, "image": f"{i}.png", "conversations": turns})
    write_json(str(tmp_path / "chat.json"), records)
    tokenizer = read_tokenizer(f"{ROOT}/toy/pretrained/llm")
    with_tokens(tokenizer, "<|im_start|>", "<|im_end|>")
    with_tokens(tokenizer, "<think>", "</think>", special=False)
    tokenizer.chat_template = "{{ enable_thinking }}"
    llm = tiny_llm("qwen3", tied=True, vocab_size=len(tokenizer), hidden_size=128, head_dim=32,
                   intermediate_size=256, initializer_range=0.08)
    save_parts(tmp_path, llm, tokenizer)

    flags = ["--recipe", "toy", "--data", f"{tmp_path}/chat.json", "--images",
             f"{tmp_path}/images", "--val_samples", "0", "--global_batch_size", "16"]
    assert train.main([*flags, "--stage", "1", "--llm", f"{tmp_path}/llm", "--vision",
                       f"{ROOT}/toy/pretrained/clip", "--out", f"{tmp_path}/stage1",
                       "--max_steps", "15"]) == 0
    assert train.main([*flags, "--stage", "2", "--init", f"{tmp_path}/stage1", "--out",
                       f"{tmp_path}/stage2", "--lr", "2e-3", "--epochs", "8"]) == 0
    talker = sample.Talker(sample.Config(model=f"{tmp_path}/stage2", temperature=0))
    assert talker.template.name == "qwen_3" and type(talker.engine.decoder) is Fast
    pictures = [load_image(f"{tmp_path}/images/{i}.png") for i in range(240, 300)]
    questions = [([sample.human_turn("What is it?", 1)], [picture]) for picture in pictures]
    answers = talker.answers(questions)
    right = sum(a == b for a, b in zip(answers, truths[240:], strict=True))
    shuffled = sum(a == b for a, b in zip(answers, truths[241:] + truths[240:241], strict=True))
    assert right >= 48 and shuffled <= 20, f"{right} of 60 right, {shuffled} by other pictures"


def test_a_model_behind_siglip_learns_colours_and_answers(tmp_path, capsys):
    """Both stages by their commands, and a question to what came out: it sees."""
    colours = {"red": (220, 30, 30), "blue": (30, 30, 220)}
    records = []
    for colour, value in colours.items():
        Image.new("RGB", (40, 30), value).save(tmp_path / f"{colour}.png")
        turns = [{"from": "human", "value": f"{IMAGE}\nWhat?"}, {"from": "gpt", "value": colour}]
        records.append({"id": colour, "image": f"{colour}.png", "conversations": turns})
    (tmp_path / "chat.json").write_text(json.dumps(records * 2))
    save_parts(tmp_path)
    tiny_siglip().save_pretrained(tmp_path / "siglip")
    common = ["--data", str(tmp_path / "chat.json"), "--images", str(tmp_path), "--workers", "0",
              "--template", "llava_v0", "--global_batch_size", "4", "--recipe", "llava-7b"]
    parts = ["--vision", f"{tmp_path}/siglip", "--llm", str(tmp_path / "llm")]
    train.main([*common, *parts, "--out", str(tmp_path / "one"), "--epochs", "20"])
    train.main([*common, "--stage", "2", "--init", str(tmp_path / "one"), "--lr", "5e-3",
                "--out", str(tmp_path / "two"), "--epochs", "60"])
    for colour in colours:
        capsys.readouterr()
        sample.main(["--model", str(tmp_path / "two"), "--image",
                        str(tmp_path / f"{colour}.png"), "--question", "What?"])
        assert capsys.readouterr().out.strip().endswith(colour)
