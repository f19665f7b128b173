"""`mlm convert`: a published folder becomes a run that generates, and goes back; a failure leaves nothing behind."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mlm
from mlm.cli.main import main
from mlm.data.vocabulary import load_vocabulary
from tests.cli.train_test import RUN
from tests.data.published_test import train
from tests.interop import recipe

GOLDEN = recipe.load(recipe.GOLDENS / "t5_1_1.npz")
SIZE = 384  # ByT5's


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A tiny ByT5: its tokenizer is a class and no file."""
    shapes = {n: (SIZE, *s[1:]) if n in ("shared.weight", "lm_head.weight") else s for n, s in GOLDEN.shapes.items()}
    config = {**GOLDEN.config, "vocab_size": SIZE, "tokenizer_class": "ByT5Tokenizer"}
    return recipe.write_folder(tmp_path_factory.mktemp("published") / "byt5", config, shapes)


@pytest.fixture(scope="module")
def run(published, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("runs") / "byt5"
    assert main(["convert", "from-hf", str(published), str(target)]) == 0
    return target


def test_a_converted_run_is_a_run(run, published, capsys):
    assert main(["generate", "The <extra_id_0> sat", "--run_dir", str(run), "--max_length", "8"]) == 0
    session = mlm.load(run)
    assert capsys.readouterr().out == session.generate("The <extra_id_0> sat", max_length=8)[0] + "\n"
    assert session.vocabulary.vocab_size == session.config.vocab_size == SIZE
    assert session.vocabulary.sentinel_ids[0] == SIZE - 1
    tensors = load_file(published / "model.safetensors")
    np.testing.assert_array_equal(session.params["embedding"], tensors["shared.weight"])
    assert session.score([("a", "b")]).shape == (1,)
    assert f"converted from {published}" in repr(session)


def test_it_goes_back_bit_for_bit_and_says_so(run, published, tmp_path, capsys):
    target = tmp_path / "back"
    assert main(["convert", "to-hf", str(run), str(target)]) == 0
    said = capsys.readouterr().out
    count = sum(int(np.prod(shape)) for shape in load_shapes(published).values())
    assert said == f"{target}: t5, {count:,} parameters, {len(GOLDEN.shapes)} tensors in 1 file\n"
    before, after = (load_file(folder / "model.safetensors") for folder in (published, target))
    assert set(before) == set(after)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)
    config = json.loads((target / "config.json").read_text())
    assert (config["model_type"], config["tokenizer_class"]) == ("t5", "ByT5Tokenizer")
    again = tmp_path / "again"
    assert main(["convert", "from-hf", str(target), str(again)]) == 0
    assert (again / "model.json").read_text() == (run / "model.json").read_text()


def load_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: values.shape for name, values in load_file(folder / "model.safetensors").items()}


def test_a_run_that_was_trained_here_goes_out(tiny_run, tmp_path):
    for flags, dtype in (
        ([], "float32"),
        (["--dtype", "bfloat16", "--family", "mt5", "--parameters", "ema"], "bfloat16"),
    ):
        target = tmp_path / dtype
        assert main(["convert", "to-hf", str(tiny_run), str(target), *flags]) == 0
        assert json.loads((target / "config.json").read_text())["dtype"] == dtype
        settings = json.loads((target / "tokenizer_config.json").read_text())
        vocabulary = load_vocabulary(tiny_run / "vocabulary.json")
        assert settings["additional_special_tokens"] == list(vocabulary.specials)
    again = tmp_path / "again"
    flags = ["--vocabulary", str(tiny_run / "vocabulary.json"), "--inputs_length", "48"]
    assert main(["convert", "from-hf", str(tmp_path / "float32"), str(again), *flags]) == 0
    ours, theirs = (mlm.load(path, parameters="params").params for path in (tiny_run, again))
    np.testing.assert_array_equal(
        ours["decoder"]["layers"]["0"]["ffn"]["gate"], theirs["decoder"]["layers"]["0"]["ffn"]["gate"]
    )
    assert mlm.load(again).data["inputs_length"] == 48


def with_tokenizer(folder: Path, member: str, names: list[str]) -> Path:
    """A tiny member of a family that grew from fairseq, with a SentencePiece file and these special tokens."""
    golden = recipe.load(recipe.GOLDENS / f"{member}.npz")
    shapes = {n: (512, *s[1:]) if s[0] == recipe.VOCABULARY else s for n, s in golden.shapes.items()}
    recipe.write_folder(folder, {**golden.config, "vocab_size": 512}, shapes)
    train(folder / "sentencepiece.bpe.model", unk_id=0, bos_id=1, eos_id=2)
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": names}))
    return folder


def test_a_converted_translator_is_told_both_languages(tmp_path, capsys):
    folder = with_tokenizer(tmp_path / "nllb", "m2m_100", ["eng_Latn", "fra_Latn"])
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "run")]) == 0
    session = mlm.load(tmp_path / "run")
    en, fr = (session.vocabulary.language_token(code) for code in ("en", "fr"))
    (source,) = session.encode("good morning", "fr", from_="en")
    assert source.tokens == [en, *session.vocabulary.encode("good morning"), 1]
    (best,) = session.decode("good morning", "fr", from_="en", max_length=6)[0]
    assert best.tokens[0] == fr
    capsys.readouterr()
    command = ["generate", "good morning", "--run_dir", str(tmp_path / "run"), "--max_length", "6"]
    assert main([*command, "--to", "fra_Latn", "--from", "en"]) == 0
    assert capsys.readouterr().out == best.text + "\n"
    for flags, message in (
        (["--to", "fr"], "name it, by from_='en' in a session, --from en in a command. It has tokens of 2: en, fr"),
        (["--to", "fr", "--from", "engl"], "no language has the code 'engl'; did you mean 'en' (English)?"),
        (
            ["--to", "sw", "--from", "en"],
            "no token <2sw> (Swahili) among its 2 language tokens; known: en (English), fr",
        ),
    ):
        assert main([*command, *flags]) == 2
        assert message in capsys.readouterr().err
    line, output = tmp_path / "lines.txt", tmp_path / "out.jsonl"
    line.write_text("good morning\n")
    flags = ["--input", str(line), "--output", str(output), "--max_length", "6", "--to", "fr", "--from", "en"]
    assert main(["infer", "--run_dir", str(tmp_path / "run"), *flags]) == 0
    assert json.loads(output.read_text())["output"] == best.text


def test_training_that_begins_with_a_converted_translator_keeps_its_ways(tmp_path, capsys):
    """Sources, the forced token, and the way back to Hugging Face, ids and tokenizer as published."""
    from dataclasses import replace

    from mlm.checkpoints.run_directory import RunDirectory
    from mlm.cli import configuration
    from mlm.cli.train import _data_of_the_run, bind_all, configured, pretrain
    from mlm.data.templates import PLACES

    folder = with_tokenizer(tmp_path / "nllb", "m2m_100", ["eng_Latn", "fra_Latn"])
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "run")]) == 0
    given = mlm.load(tmp_path / "run")
    found = given.evaluate("tatoeba.translate.en.fr", num_examples=2, max_length=8)
    assert [s["inputs"][:5] + s["targets"][:5] for s in found["samples"]] == ["<2en><2fr>"] * 2
    (tmp_path / "run.gin").write_text(RUN)
    bind_all()
    changes = ["MIXTURE='tatoeba.translate.en.fr'", "train.steps=1", "run.run_dir='" + str(tmp_path / "tuned") + "'"]
    resolved = configuration.resolve([str(tmp_path / "run.gin")], changes)
    plan = configured()
    data = replace(plan.data, vocabulary=str(tmp_path / "run" / "vocabulary.model"))
    plan = replace(plan, model=given.config, data=data, initial=str(tmp_path / "run"))
    assert pretrain(plan, resolved.text) == 0
    tuned = mlm.load(tmp_path / "tuned")
    assert tuned.own_template == given.own_template == PLACES["both"]
    later = replace(plan, initial=None)  # as when the run is resumed, and the other one is gone
    assert _data_of_the_run(later, RunDirectory(tmp_path / "tuned")).template == given.template
    assert _data_of_the_run(later, RunDirectory(tmp_path / "new")).template is None
    assert main(["convert", "to-hf", str(tmp_path / "tuned"), str(tmp_path / "out")]) == 0
    assert "m2m_100" in capsys.readouterr().out
    for name in ("sentencepiece.bpe.model", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    table = "model.shared.weight"
    assert 0 < np.abs(before[table] - after[table]).max() < 0.1  # a small step, and rows in the published order


def test_a_converted_encoder_reads_and_writes_nothing(tmp_path, capsys):
    folder = with_tokenizer(tmp_path / "xlm_r", "xlm_r", [])
    command = ["convert", "from-hf", str(folder), str(tmp_path / "run")]
    assert main(command) == 1
    assert (
        "the encoder has 14 learned positions and cannot take 512 tokens; choose --inputs_length"
        in capsys.readouterr().err
    )
    assert main([*command, "--inputs_length", "14"]) == 0
    session = mlm.load(tmp_path / "run")
    begin = session.vocabulary.special("<s>")
    assert session.encode("no")[0].tokens == [begin, *session.vocabulary.encode("no"), 1]
    for call in (lambda: session.generate("no"), lambda: session.score([("no", "no")])):
        with pytest.raises(ValueError, match="run holds an encoder alone"):
            call()


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["from-hf", "{nowhere}", "{target}"], 2, "is no folder"),
        (["from-hf", "{published}", "{run}"], 1, "exists and is not empty"),
        (["from-hf", "{run}", "{target}"], 1, "no config.json in"),
        (["from-hf", "{published}", "{target}", "--vocabulary", "quickstart"], 1, "more ids than the model's table"),
        (["to-hf", "{published}", "{target}"], 1, "is not the directory of a run"),
        (["to-hf", "{run}", "{target}", "--family", "umt5"], 1, "umt5 cannot say"),
        (["to-hf", "{run}", "{target}", "--family", "t5_gemma"], 2, "did you mean 't5gemma'"),
        (["to-hf", "{run}", "{target}", "--step", "3"], 1, "complete checkpoints: 0"),
        (["to-hf", "{run}", "{target}", "--parameters", "ema"], 1, "holds no 'ema'"),
    ],
)
def test_errors_take_one_line_and_leave_nothing(published, run, tmp_path, capsys, command, code, message):
    places = {"nowhere": tmp_path / "nowhere", "target": tmp_path / "target", "published": published, "run": run}
    assert main(["convert", *(part.format(**places) for part in command)]) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: rewrite(f / "config.json", model_type="m2m_100"), "config.json: "),
        (lambda f: rewrite(f / "config.json", model_type="gpt2"), "model_type='gpt2' is no family"),
        (lambda f: change(f, lambda t: t.pop("encoder.final_layer_norm.weight")), "layer_norm.weight is missing"),
        (lambda f: change(f, lambda t: t.update({"lm_head.weight": np.zeros((3, 3), np.float32)})), "is (3, 3), the"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), "truncated"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "loading a pickle can run any code"),
    ],
    ids=["another family", "no family", "missing tensor", "wrong shape", "truncated", "pickle"],
)
def test_a_folder_that_is_not_what_it_says_becomes_no_run(published, tmp_path, capsys, spoil, message):
    folder = shutil.copytree(published, tmp_path / "spoilt")
    spoil(folder)
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "run")]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert said.err.count("mlm convert: ") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"spoilt"}


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_folder_without_tokenizer_says_what_to_do(published, tmp_path, capsys):
    config = json.loads((published / "config.json").read_text())
    config.pop("tokenizer_class")
    folder = recipe.write_folder(tmp_path / "bare", config, load_shapes(published))
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "run")]) == 1
    assert "no tokenizer in" in (error := capsys.readouterr().err)
    assert "--vocabulary FILE" in error
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "run"), "--vocabulary", "bytes"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"bare", "run"}


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    largest = max((p for p in (copy / "checkpoints/0/state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert main(["convert", "to-hf", str(copy), str(tmp_path / "out")]) == 1
    assert "mlm convert:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
