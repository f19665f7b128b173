"""The languages of the project: one shipped table, ids that never change, and every source's code for each of them.

    >>> LANGUAGES[language_id("pt_BR")].name
    'Portuguese (Brazil)'

Corpora disagree about codes: mC4 writes `iw` and `no`, LibreOffice `sr_Cyrl`, FLORES `fra_Latn`, the UDHR collection
`cmn_hans`. `languages.tsv` joins them as aliases of one BCP-47 code. What people write differently stays apart: `pt`
and `pt-BR`, `sr` and `sr-Latn`, `zh` and `zh-Hant`, `oc` and `oc-provenc`.
"""

import difflib
import importlib.resources
from collections.abc import Collection
from typing import NamedTuple


class Language(NamedTuple):
    """One line of `languages.tsv`."""

    id: int  # 1, 2, …; 0 is padding
    code: str  # BCP-47, as in the language token `<2pt-BR>`
    name: str  # English
    script: str  # ISO 15924, e.g. "Latn"
    direction: str  # "ltr" or "rtl"
    iso639_3: str  # "und" where there is none
    aliases: tuple[str, ...]


PADDING = Language(0, "", "(padding)", "Zyyy", "ltr", "und", ())


def language_id(code: str, source: str = "") -> int:
    """Id of a language, under any code that a source uses for it; case, `_` and `-` do not matter.

    source: name of a corpus with codes of its own ("udhr": its `ckb` is Central Kurdish in Latin letters).
    Raises KeyError with the nearest codes for a code that no language has.
    """
    for key in (f"{source}:{code}", code):
        if (found := _IDS.get(_normal(key))) is not None:
            return found
    raise KeyError(
        f"no language has the code {code!r}; {nearest_languages(code)} A new language is a new last line in "
        "mlm/data/languages.tsv"
    )


def nearest_languages(code: str, known: Collection[str] | None = None) -> str:
    """Text for an error message: the languages whose codes or names are closest to what was asked for.

    known: codes (`Language.code`) to choose from; None: all.

    >>> nearest_languages("frensh", ["de", "fr", "sw"])
    "did you mean 'fr' (French)?"
    """
    wanted = _normal(code)
    records = [record for record in LANGUAGES[1:] if known is None or record.code in known]

    def closeness(record: Language) -> float:
        forms = (record.code, f"{record.code}-{record.script}", record.iso639_3, *record.aliases, record.name)
        contained = 0.75 if len(wanted) > 3 and wanted in record.name.lower() else 0.0
        return max(contained, *(difflib.SequenceMatcher(None, wanted, _normal(form)).ratio() for form in forms))

    ranks = sorted(((closeness(record), -record.id, record) for record in records), reverse=True)
    close = [record for value, _, record in ranks if value >= 0.6]
    if not close and len(records) <= 12:
        return f"known: {', '.join(f'{r.code} ({r.name})' for r in records) or 'none'}."
    found = (close or [record for value, _, record in ranks if value > 0])[:3]
    if not found:
        return "a code is like 'fr', 'pt-BR' or 'zh-Hant'."
    return f"did you mean {', '.join(f'{r.code!r} ({r.name})' for r in found)}?"


def language(code: str, source: str = "") -> Language:
    """The record of a language, under any of its codes. Raises KeyError with the nearest codes."""
    return LANGUAGES[language_id(code, source)]


def parse(text: str) -> tuple[Language, ...]:
    """The records of a table, padding first, so that `parse(text)[i].id == i`. Raises ValueError for a gap or a code
    given twice.
    """
    records, owners = [PADDING], {}
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        number, code, name, script, direction, iso, aliases = line.split("\t")
        record = Language(int(number), code, name, script, direction, iso, tuple(aliases.split()))
        if record.id != len(records):
            raise ValueError(f"language {code!r} has id {record.id}, not {len(records)}: ids are 1, 2, … in file order")
        for key in map(_normal, (code, *record.aliases)):
            if owners.setdefault(key, code) != code:
                raise ValueError(f"the code {key!r} is given to both {owners[key]!r} and {code!r}")
        records.append(record)
    return tuple(records)


def index(records: tuple[Language, ...]) -> dict[str, int]:
    """Every normalised code -> id. ISO 639-3 and language-Script forms go to the language with the shortest code."""
    ids = {_normal(code): r.id for r in records[1:] for code in (r.code, *r.aliases)}
    for r in sorted(records[1:], key=lambda r: len(r.code)):
        implied = (r.iso639_3, f"{r.iso639_3}-{r.script}") if r.iso639_3 != "und" else ()
        for code in (*implied, f"{r.code}-{r.script}"):
            ids.setdefault(_normal(code), r.id)
    return ids


def _normal(code: str) -> str:
    return code.strip().replace("_", "-").lower()


LANGUAGES = parse((importlib.resources.files("mlm.data") / "languages.tsv").read_text(encoding="utf-8"))
_IDS = index(LANGUAGES)
