"""`mlm decode list` leaves nothing out that is registered, on a screen of 100 columns and as JSON."""

import json

from mlm.cli import main
from mlm.decoding.config import METHODS, DecodeConfig
from mlm.decoding.processors import PROCESSORS
from mlm.decoding.proposers import PROPOSERS
from mlm.evaluation.hierarchy import RULES
from mlm.session.choosing import POSTPROCESSORS

KINDS = {
    "method": METHODS,
    "processor": PROCESSORS,
    "proposer": PROPOSERS,
    "postprocessor": POSTPROCESSORS,
    "filler": ("any_subset",),
    "tree_rule": RULES,
}


def shown(capsys, *arguments):
    assert main.main(["decode", "list", *arguments]) == 0
    return capsys.readouterr().out


def test_every_registered_name_is_listed(capsys):
    text = shown(capsys)
    assert max(map(len, text.splitlines())) <= 100
    first_words = {line.split()[0] for line in text.splitlines() if line.strip() and not line.startswith(" ")}
    assert {name for names in KINDS.values() for name in names} <= first_words


def test_a_record_says_what_may_be_given_to_what(capsys):
    records = json.loads(shown(capsys, "--json"))
    assert [(r["kind"], r["name"]) for r in records] == [(kind, n) for kind, names in KINDS.items() for n in names]
    found = {(r["kind"], r["name"]): r for r in records}
    assert found["processor", "repetition_penalty"]["methods"] == ["greedy", "sample"]
    assert found["processor", "no_repeat_ngram"]["methods"] == list(METHODS)
    assert found["processor", "dola_layers"]["options"] == {"dola_layers": [], "contrast_alpha": 0.1}
    assert found["proposer", "input_copy"]["options"] == {"guesses": 8}
    assert found["proposer", "mask_block"]["options"] == {"guesses": 8, "mask_token": None}
    assert "Xia et al. 2022" in found["proposer", "mask_block"]["summary"]
    assert found["method", "diverse_beam"]["options"]["groups"] == 2
    assert found["postprocessor", "mbr"]["options"] == {
        "utility": "chrf",
        "references": 0,
        "aggregate": False,
        "seed": 0,
    }
    assert found["postprocessor", "mbr"]["methods"] == [name for name, m in METHODS.items() if "n_best" in m.options]
    assert found["filler", "any_subset"]["options"] == {"block": 8, "temperature": 1.0, "seed": 0}
    assert found["postprocessor", "energy"]["methods"] == ["sample"]
    for record in records:
        assert record["summary"]
        if record["kind"] == "method":  # the defaults are the method's own
            options = {n: () if value == [] else value for n, value in record["options"].items()}
            needed = {name: value for name, value in (("value", len), ("mask_token", 2)) if name in options}
            needed = {} if "proposer" in options else needed
            own = DecodeConfig(method=record["name"], **needed)
            assert DecodeConfig(method=record["name"], **options | needed) == own
