"""The table of languages: ids that never move, and every code of every source."""

import gzip
import subprocess
import sys

import pytest

from mlm.data.languages import LANGUAGES, index, language, language_id, parse
from mlm.shipped import corpora_path

MC4_CODES = """
    af am ar az be bg bg-Latn bn ca ceb co cs cy da de el el-Latn en eo es et eu fa fi fil fr fy ga gd gl gu ha
    haw hi hi-Latn hmn ht hu hy id ig is it iw ja ja-Latn jv ka kk km kn ko ku ky la lb lo lt lv mg mi mk ml mn mr
    ms mt my ne nl no ny pa pl ps pt ro ru ru-Latn sd si sk sl sm sn so sq sr st su sv sw ta te tg th tr uk ur uz
    vi xh yi yo zh zh-Latn zu
"""
MC4 = MC4_CODES.split()


def test_ids_are_the_places_in_the_table_and_never_move():
    assert [record.id for record in LANGUAGES] == list(range(len(LANGUAGES)))
    # The first, a middle and the last line of the first version: a later version may only append.
    assert [LANGUAGES[i].code for i in (1, 135, 151, 551)] == ["aa", "en", "fr", "zu"]
    assert len(LANGUAGES) >= 552


def test_every_code_leads_to_its_language():
    for record in LANGUAGES[1:]:
        assert language_id(record.code) == record.id
        for alias in record.aliases:
            source, _, code = alias.rpartition(":")
            assert language_id(code, source) == record.id, alias


def test_fields_are_wellformed():
    for record in LANGUAGES[1:]:
        assert len(record.script) == 4, record
        assert record.script.istitle(), record
        assert record.direction == ("rtl" if record.script in ("Adlm", "Arab", "Hebr", "Syrc", "Thaa") else "ltr"), (
            record
        )
        assert len(record.iso639_3) == 3, record
        assert record.name, record
    names = [record.name for record in LANGUAGES]
    assert len(set(names)) == len(names)


def test_mc4_is_covered():
    assert len(MC4) == 107
    assert len({language_id(code) for code in MC4}) == 107


@pytest.mark.parametrize("file", ["help_mpl.tsv.gz", "ui_parallel.tsv.gz", "tatoeba.tsv.gz", "udhr.tsv.gz"])
def test_the_shipped_corpora_are_covered(file):
    with gzip.open(corpora_path() / file, "rt", encoding="utf-8") as lines:
        codes = {line.split("\t", 1)[0] for line in lines}
    scripts = {language(code, "udhr" if file.startswith("udhr") else "").script for code in codes}
    assert "Latn" in scripts


SAME = [
    "iw he he-IL heb",
    "no nb nob nor",
    "fil tl tgl tgl_Latn",
    "zh zh_Hans zho_Hans cmn_hans zh-CN cmn",
    "pt_BR pt-br por_BR",
    "sr sr_Cyrl srp_Cyrl",
    "ku kmr kmr_Latn",
    "fr fra fra_Latn fr-Latn FR",
    "ko kor_Hang",
    "fa pes_1 fa-IR pes_Arab fas",
]
APART = [
    "pt pt_BR",
    "sr sr_Latn",
    "zh zh-Hant zh-Latn yue",
    "ca ca_valencia",
    "nb nn",
    "oc oc-provenc oc-auvern",
    "el el-polyton",
    "rm rm-puter",
]


@pytest.mark.parametrize("codes", SAME)
def test_codes_of_one_language(codes):
    assert len({language_id(code) for code in codes.split()}) == 1


@pytest.mark.parametrize("codes", APART)
def test_what_people_write_differently_stays_apart(codes):
    assert len({language_id(code) for code in codes.split()}) == len(codes.split())


def test_a_source_may_use_a_code_in_its_own_sense():
    assert language("ckb").script == "Arab"
    assert language("ckb", "udhr").script == "Latn"
    assert language("fr", "udhr") == language("fr")


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("frr", "'fr'"),
        ("German", r"'de' \(German\)"),
        ("zh_Hanz", r"'zh' \(Chinese"),
        ("xx", "'xh'"),
        ("", "like 'fr'"),
    ],
)
def test_an_unknown_code_gets_the_nearest(code, hint):
    with pytest.raises(KeyError, match=hint):
        language_id(code)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("2\taa\tAfar\tLatn\tltr\taar\t", "id 2, not 1"),
        ("1\taa\tAfar\tLatn\tltr\taar\tx\n2\tbb\tB\tLatn\tltr\tbbb\tX", "'x' is given to both 'aa' and 'bb'"),
    ],
)
def test_a_bad_table_is_refused(lines, message):
    with pytest.raises(ValueError, match=message):
        parse(lines)


def test_the_shortest_code_gets_the_bare_iso_form():
    records = parse("# note\n1\tpt-BR\tP\tLatn\tltr\tpor\t\n2\tpt\tQ\tLatn\tltr\tpor\t\n")
    assert index(records)["por"] == 2
    assert index(records)["por-latn"] == 2


def test_languages_need_no_tensorflow():
    code = "import sys, mlm.data.languages; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
