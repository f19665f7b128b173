"""Texts with blanks, and what a run says of the token that stands for them."""

import json
import shutil
from dataclasses import replace

import jax
import pytest

import mlm
from mlm.checkpoints import CheckpointConfig, Checkpointer
from mlm.checkpoints.run_directory import RunDirectory
from mlm.cli.main import main
from mlm.decoding.any_subset import Filler
from mlm.models.config import to_json
from mlm.models.families import llama_style
from mlm.models.specs import PositionSpec
from mlm.models.transformer import Transformer

SOURCES = ["The cat sleeps.", "Good morning"]
TEMPLATES = ["Le <extra_id_0><extra_id_0>t dort.", "Bon<extra_id_0>"]


@pytest.fixture(scope="module")
def learned(tiny_run, tmp_path_factory):
    """name of an objective -> the run as if it had been trained so; its mask token is <extra_id_0>."""

    def make(objective):
        run = RunDirectory(shutil.copytree(tiny_run, tmp_path_factory.mktemp("learned") / objective))
        token = mlm.load(tiny_run, devices=jax.devices()[:1]).vocabulary.special("<extra_id_0>")
        block = {"mask_block": {"block": 3}, "lexical_units": {"block": 4}}.get(objective, {})
        masks = {"objective": objective, "mask_token": token, **block}
        run.write_json("data.json", {**run.read_json("data.json"), "masks": masks})
        return str(run.path)

    return make


@pytest.fixture(scope="module")
def any_order(learned):
    return learned("any_order")


@pytest.fixture(scope="module")
def session(any_order):
    return mlm.load(any_order, devices=jax.devices()[:1], batch_size=4)


def test_blanks_are_filled_as_the_filler_fills_them(session):
    """In the text's own frame, and nothing but the blanks is touched."""
    token = session.vocabulary.special("<extra_id_0>")
    found = session.fill(TEMPLATES, SOURCES, to="fr", block=2, seed=3)
    written = [[*session.vocabulary.encode_prompt(text), 1] for text in TEMPLATES]
    read = [source.tokens for source in session.encode(SOURCES, "fr")]
    want = Filler(session.model, mask_token=token, block=2, seed=3)(session.params, written, read)
    for one, template, tokens, length, passes in zip(
        found, written, want.tokens, want.lengths, want.passes, strict=True
    ):
        assert one.tokens == tokens[:length].tolist()
        assert (one.blanks, one.passes) == (template.count(token), passes)
        assert one.passes <= one.blanks
        assert all(got == told for got, told in zip(one.tokens, template, strict=True) if told != token)
        assert one.text == session.text(one.tokens)
    (again,) = session.fill(TEMPLATES[1], SOURCES[1], to="fr", block=2, seed=3, ids=[1])
    assert again == found[1]


def test_the_command_fills_as_the_session_does(session, any_order, capsys):
    (want,) = session.fill(TEMPLATES[0], SOURCES[0], to="fr", seed=5)
    command = ["fill", TEMPLATES[0], "--source", SOURCES[0], "--run_dir", any_order, "--to", "fr", "--seed", "5"]
    assert main(command) == 0
    assert capsys.readouterr().out == want.text + "\n"
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == {
        "input": TEMPLATES[0],
        "text": want.text,
        "tokens": want.tokens,
        "blanks": 2,
        "passes": want.passes,
    }


def test_a_run_that_does_not_say_is_asked_by_name(tiny_run, session):
    silent = mlm.load(tiny_run, devices=jax.devices()[:1], batch_size=4)
    with pytest.raises(ValueError, match=r"does not say that it learned to write in any order \(train.any_order\)"):
        silent.fill(TEMPLATES[0], SOURCES[0])
    named = silent.fill(TEMPLATES, SOURCES, mask_token="<extra_id_0>")
    assert [one.tokens for one in named] == [one.tokens for one in session.fill(TEMPLATES, SOURCES)]


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("Le chat dort.", {}, "template 0 holds no blank: 'Le chat dort.'; write <extra_id_0> for each"),
        (TEMPLATES[0], {"mask_token": 10**6}, "mask_token 0 holds token 1000000, outside"),
        ("<extra_id_0>" * 24, {}, "template 0 has 25 tokens, and the model writes at most 24"),
        (TEMPLATES[0], {"mask_token": "<extra_id_100>"}, "has no special token '<extra_id_100>'"),
        (TEMPLATES[0], {"blok": 3}, "no option 'blok' of filling; did you mean 'block'"),
        (TEMPLATES[0], {"block": 0}, "block=0 ranks must be at least 1"),
        (TEMPLATES[0], {"sources": None}, "sources: what an encoder reads"),
    ],
)
def test_what_cannot_be_filled_is_said(session, template, options, message):
    with pytest.raises((ValueError, KeyError), match=message.replace("(", r"\(")):
        session.fill(template, **{"sources": SOURCES[0], **options})


def test_a_drafter_of_blocks_brings_its_mask_token(learned, tiny_run, capsys):
    """By flags and in a session, where its name does as well; what is written stays the same."""
    drafter = learned("mask_block")
    run = mlm.load(tiny_run, devices=jax.devices()[:1], batch_size=4, draft=drafter)
    token = run.vocabulary.special("<extra_id_0>")
    plain = run.generate(SOURCES, "fr")
    for given in ({}, {"mask_token": "<extra_id_0>"}, {"mask_token": token}):
        options = {"proposer": "mask_block", "guesses": 3, **given}
        assert run.generate(SOURCES, "fr", **options) == plain
        assert run.generator("greedy", options).config.mask_token == token
    assert run.generator("greedy", {"proposer": "mask_block"}).config.guesses == 3  # as many as it learned to fill
    command = ["generate", SOURCES[0], "--run_dir", str(tiny_run), "--to", "fr", "--draft", drafter]
    assert main(command) == 0
    assert capsys.readouterr().out.rstrip("\n") == plain[0]
    assert main([*command, "--mask_token", "<extra_id_0>"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == plain[0]


def test_filling_takes_no_other_models(any_order, capsys):
    command = ["fill", TEMPLATES[0], "--source", SOURCES[0], "--run_dir", any_order]
    for name in ("draft", "contrast", "ensemble", "ngram_text"):
        assert main([*command, f"--{name}", "other"]) == 2
        assert f"--{name} means nothing to filling" in capsys.readouterr().err


def test_a_decoder_alone_fills_without_sources(tiny_run, tmp_path):
    vocabulary = mlm.load(tiny_run, devices=jax.devices()[:1]).vocabulary
    rope = PositionSpec(kind="rope")
    size = {"vocab_size": vocabulary.vocab_size, "d_model": 16, "d_ff": 16, "heads": 2, "kv_heads": 1, "layers": 1}
    model = Transformer(llama_style(rope=rope, **size))
    run = RunDirectory(shutil.copytree(tiny_run, tmp_path / "alone", ignore=shutil.ignore_patterns("checkpoints")))
    run.write_json("model.json", to_json(model.config))
    masks = {"objective": "any_order", "mask_token": vocabulary.special("<extra_id_0>")}
    run.write_json("data.json", {**run.read_json("data.json"), "masks": masks})
    with Checkpointer(str(run.checkpoints), CheckpointConfig()) as checkpointer:
        checkpointer.save(1, {"params": model.init(jax.random.key(3))})
    session = mlm.load(run.path, devices=jax.devices()[:1], batch_size=4)
    (found,) = session.fill(TEMPLATES[0], to="fr")
    given = session.frame("fr").before
    written = [*given, *vocabulary.encode_prompt(TEMPLATES[0]), 1]
    want = Filler(session.model, mask_token=masks["mask_token"])(session.params, [written])
    assert found.tokens == want.tokens[0, : want.lengths[0]].tolist()
    assert found.text == session.text(found.tokens[len(given) :])
    with pytest.raises(ValueError, match="a decoder alone takes none"):
        session.fill(TEMPLATES[0], SOURCES[0])


def test_heads_on_a_run_keep_what_it_says_of_masks(any_order, tmp_path):
    from mlm.cli.train import Plan, _masks
    from mlm.training.trainer import TrainConfig

    said = RunDirectory(any_order).read_json("data.json")["masks"]
    train = TrainConfig(steps=1, objective="chimera")
    plan = Plan(model=None, data=None, train=train, optimizer=print, schedule=print, run_dir="", initial=any_order)
    assert _masks(plan, RunDirectory(tmp_path / "new")) == said
    assert _masks(plan, RunDirectory(any_order)) == said  # when it goes on
    assert _masks(replace(plan, train=TrainConfig(steps=1)), RunDirectory(tmp_path / "new")) is None


def test_a_run_of_lexical_units_brings_its_mask_token(learned, capsys):
    path = learned("lexical_units")
    run = mlm.load(path, devices=jax.devices()[:1], batch_size=4)
    token = run.vocabulary.special("<extra_id_0>")
    options = {"guesses": 3, "threshold": 0.01}
    assert run.generator("lexical_units", options).config.mask_token == token
    (want,) = run.generate(SOURCES[:1], "fr", "lexical_units", mask_token=token, **options)
    assert run.generator("lexical_units", {}).config.guesses == 3
    with pytest.raises(ValueError, match=r"guesses=4: the run learned to fill 3 placeholders in a row \(train.block=4"):
        run.generator("lexical_units", {"guesses": 4})
    command = ["generate", SOURCES[0], "--run_dir", path, "--to", "fr", "--method", "lexical_units"]
    assert main([*command, "--guesses", "3", "--threshold", "0.01"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == want
    other = mlm.load(learned("mask_block"), devices=jax.devices()[:1], batch_size=4)
    with pytest.raises(ValueError, match="method='lexical_units' needs the token that the model was trained to fill"):
        other.generate(SOURCES[:1], "fr", "lexical_units", **options)


def test_training_says_what_it_learned_to_fill():
    from mlm.objectives.any_order import AnyOrder
    from mlm.training.trainer import TrainConfig

    assert TrainConfig(steps=1).masks is None
    assert TrainConfig(steps=1, any_order=AnyOrder(mask_token=9)).masks == {"objective": "any_order", "mask_token": 9}
    for objective in ("mask_block", "lexical_units"):
        blocks = TrainConfig(steps=1, objective=objective, block=4, mask_token=7)
        assert blocks.masks == {"objective": objective, "mask_token": 7, "block": 4}
