"""One call registers a table; rates come from sizes by a policy over languages; names that do not exist get the
nearest.
"""

from functools import partial

import numpy as np
import pytest
import seqio

from mlm.data.recipes import DOUBLY_TAGGED_TRANSLATION, FORCED_TRANSLATION, Lengths, denoising, with_vocabulary
from mlm.data.registration import (
    add_denoising_tasks,
    add_rewriting_tasks,
    add_translation_tasks,
    default_vocabulary,
    get,
    load_tasks,
    mixture_rates,
    register_mixture,
)
from mlm.data.sources import TableSource
from mlm.data.vocabulary import ByteVocabulary
from mlm.sampling import temperature, unimax

LENGTHS = {"inputs": 48, "targets": 40}


def texts(*sentences):
    return TableSource(lambda split: {"text": [s.encode() for s in sentences]}, ("text",), ("train",))


def aligned(*records):
    columns = {"english": [a.encode() for a, _ in records], "other": [b.encode() for _, b in records]}
    return TableSource(lambda split: columns, ("english", "other"), ("train",))


def decoded(name, count=1):
    vocabulary = default_vocabulary()
    for example in get(name).get_dataset(LENGTHS, "train", shuffle=False, seed=0).take(count).as_numpy_iterator():
        yield tuple(vocabulary.decode(example[side].tolist()) for side in ("inputs", "targets"))


def test_names_and_texts_of_translation():
    names = add_translation_tasks("rt1", {"pt_BR": aligned(("Good day.", "Bom  dia.\u00a0"))})
    assert names == ["rt1.translate.en.pt_BR", "rt1.translate.pt_BR.en"]
    assert list(decoded(names[0])) == [("<2pt-BR>Good day.", "Bom dia.")]  # cleaned on the way
    assert list(decoded(names[1])) == [("<2en>Bom dia.", "Good day.")]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (FORCED_TRANSLATION, ("Good day.", "<2fr>Bonjour.")),
        (DOUBLY_TAGGED_TRANSLATION, ("<2en>Good day.", "<2fr>Bonjour.")),
    ],
)
def test_places_of_the_language_token(recipe, expected):
    names = add_translation_tasks(f"rt_{recipe.name}", {"fr": aligned(("Good day.", "Bonjour."))}, recipe=recipe)
    assert list(decoded(names[0])) == [expected]


def test_long_texts_are_cut_and_keep_their_end():
    (name, _) = add_translation_tasks("rt2", {"fr": aligned(("a" * 99, "b" * 99))})
    (example,) = get(name).get_dataset(LENGTHS, "train").as_numpy_iterator()
    assert (len(example["inputs"]), len(example["targets"])) == (48, 40)
    assert example["inputs"][-1] == example["targets"][-1] == 1


def test_records_with_an_empty_side_are_dropped():
    names = add_translation_tasks("rt3", {"fr": aligned(("a", "b"), ("c", " \u00a0"), ("d", "e"))})
    assert [target for _, target in decoded(names[0], 9)] == ["b", "e"]


def test_denoising_loses_no_text():
    words = [f"word{i}" for i in range(40)]
    (name,) = add_denoising_tasks("rt4", {"sw": texts(*words)}, recipe=denoising(records=16))
    rebuilt = []
    for example in get(name).get_dataset(LENGTHS, "train", shuffle=False, seed=3).as_numpy_iterator():
        vocabulary = default_vocabulary()
        first = vocabulary.sentinel_ids[0]
        spans, hidden = {}, None
        for token in example["targets"][:-1].tolist():
            if token > first - 100:
                hidden = spans.setdefault(token, [])
            else:
                hidden.append(token)
        tokens = [t for token in example["inputs"][:-1].tolist() for t in spans.get(token, [token])]
        rebuilt.append(vocabulary.decode(tokens))
    # Records are joined 16 at a time; pieces are cut inside these.
    text = " ".join(words)
    assert "".join(rebuilt) == "".join(" ".join(words[i : i + 16]) for i in (0, 16, 32))
    assert len("".join(rebuilt)) == len(text) - 2


def test_rewriting():
    source = TableSource(
        lambda split: {"original": [b"he go"], "corrected": [b"he goes"]}, ("original", "corrected"), ("train",)
    )
    (name,) = add_rewriting_tasks("rt5", {"en": source}, ("original", "corrected"), "correct")
    assert name == "rt5.correct.en"
    assert list(decoded(name)) == [("he go", "he goes")]


def test_nothing_is_read_before_data_are_asked_for():
    def load(split):
        raise AssertionError("read too early")

    names = add_denoising_tasks("rt6", {"sw": TableSource(load, ("text",))})
    register_mixture("rt6.all", names, temperature)
    with pytest.raises(AssertionError, match="read too early"):
        mixture_rates("rt6.all")


def test_policies_see_languages_and_divide_among_tasks():
    small, large = texts("a" * 10), texts("b" * 1000)
    names = add_denoising_tasks("rt7a", {"sw": small, "fr": large}) + add_denoising_tasks(
        "rt7b", {"fr": texts("c" * 3000)}
    )
    names += add_translation_tasks("rt7", {"sw": aligned(("d" * 45, "e" * 45))})  # belongs to Swahili, both ways
    seen = []

    def policy(counts):
        seen.append(sorted(counts.tolist()))
        return temperature(counts, alpha=0.0)

    register_mixture("rt7.all", names, policy)
    rates = mixture_rates("rt7.all")
    assert seen == [[10 + 90 + 90, 4000]]
    expected = {
        "rt7a.denoise.sw": 0.5 * 10 / 190,
        "rt7.translate.en.sw": 0.5 * 90 / 190,
        "rt7.translate.sw.en": 0.5 * 90 / 190,
        "rt7a.denoise.fr": 0.5 * 1000 / 4000,
        "rt7b.denoise.fr": 0.5 * 3000 / 4000,
    }
    assert rates == pytest.approx(expected)
    mixture = get("rt7.all")
    for task in mixture.tasks:  # SeqIO's own reading of the rates
        assert mixture.get_rate(task) == pytest.approx(expected[task.name])


def test_mixtures_of_mixtures():
    names = add_denoising_tasks("rt8", {"sw": texts("a" * 10), "fr": texts("a" * 30), "th": texts("a" * 60)})
    register_mixture("rt8.two", names[:2], partial(unimax, budget=20, max_epochs=1))
    register_mixture("rt8.all", [("rt8.two", 3.0), (names[2], 1.0)])
    rates = mixture_rates("rt8.all")
    assert rates == pytest.approx({names[0]: 0.375, names[1]: 0.375, names[2]: 0.25})
    mixture = get("rt8.all")
    total = sum(mixture.get_rate(task) for task in mixture.tasks)
    assert {task.name: mixture.get_rate(task) / total for task in mixture.tasks} == pytest.approx(rates)
    assert mixture_rates(names[0]) == {names[0]: 1.0}
    batch = next(iter(mixture.get_dataset(LENGTHS, "train", seed=0)))
    assert set(batch) == {"inputs", "targets", "language", "task"}


def test_another_vocabulary():
    (name,) = add_denoising_tasks("rt9", {"sw": texts("habari " * 30)})
    vocabulary = ByteVocabulary(30)
    task = with_vocabulary(get(name), vocabulary)
    example = next(iter(task.get_dataset(LENGTHS, "train", seed=0)))
    assert example["inputs"].numpy().max() == vocabulary.vocab_size - 1
    assert get(name).output_features["inputs"].vocabulary == default_vocabulary()


def test_errors_name_what_is_near():
    add_denoising_tasks("rt10", {"sw": texts("a")})
    with pytest.raises(KeyError, match=r"no task or mixture named 'rt10.denoise.ws'; did you mean 'rt10.denoise.sw'"):
        register_mixture("rt10.all", ["rt10.denoise.ws"], temperature)
    with pytest.raises(ValueError, match=r"'rt10.denoise.sw' has neither a rate nor a sampling policy"):
        register_mixture("rt10.all", ["rt10.denoise.sw"])
    with pytest.raises(KeyError, match="no language has the code 'swahilii'"):
        add_denoising_tasks("rt10", {"swahilii": texts("a")})
    with pytest.raises(KeyError, match="no text objective named 'span_coruption'; did you mean 'span_corruption'"):
        denoising("span_coruption")
    with pytest.raises(ValueError, match=r"sequence_length=None: give the longest example"):
        get("rt10.denoise.sw").get_dataset(None, "train")


def test_loading_names_modules_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_registrations.py").write_text(
        "import mlm.data.registration as r, mlm.data.sources as s\n"
        "r.add_denoising_tasks('users', {'sw': s.TableSource(lambda split: {'text': [b'a']}, ('text',))})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    load_tasks("my_registrations")
    assert "users.denoise.sw" in seqio.TaskRegistry.names()
    assert "quickstart" in seqio.MixtureRegistry.names()


def test_lengths_are_a_tuple_of_inputs_and_targets():
    assert Lengths(**LENGTHS) == (48, 40)
    assert np.isclose(sum(mixture_rates("rt10.denoise.sw").values()), 1)
