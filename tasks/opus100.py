"""OPUS-100 (Zhang et al. 2020): English and 99 languages, up to a million sentence pairs each, and development and test
sets.

Read from TFDS when `opus100/<pair>` is prepared in $TFDS_DATA_DIR, else from the files that OPUS publishes, below
$DATA_ROOT: opus-100-corpus/v1.0/supervised/<a>-<b>/opus.<a>-<b>-{train,dev,test}.<language>, one sentence a line, a
before b in the alphabet.
"""

from functools import partial

from mlm.data.registration import add_translation_tasks, register_mixture
from mlm.data.sources import Counts, Layout, PublishedSource, read_aligned_lines
from mlm.evaluation.metrics import by_language
from mlm.sampling import temperature

# Language, training pairs in thousands (1000: the cap). Five of them have no development and test set: an dz hy mn yo.
SIZES = """
    af 276, am 89, an 7, ar 1000, as 138, az 262, be 67, bg 1000, bn 1000, br 153, bs 1000, ca 1000, cs 1000,
    cy 290, da 1000, de 1000, dz 1, el 1000, eo 337, es 1000, et 1000, eu 1000, fa 1000, fi 1000, fr 1000, fy 54,
    ga 290, gd 16, gl 515, gu 318, ha 98, he 1000, hi 534, hr 1000, hu 1000, hy 7, id 1000, ig 18, is 1000, it 1000,
    ja 1000, ka 377, kk 80, km 111, kn 15, ko 1000, ku 145, ky 27, li 26, lt 1000, lv 1000, mg 591, mk 1000, ml 823,
    mn 4, mr 27, ms 1000, mt 1000, my 25, nb 143, ne 406, nl 1000, nn 486, no 1000, oc 36, or 14, pa 107, pl 1000,
    ps 79, pt 1000, ro 1000, ru 1000, rw 174, se 36, sh 267, si 979, sk 1000, sl 1000, sq 1000, sr 1000, sv 1000,
    ta 227, te 64, tg 194, th 1000, tk 13, tr 1000, tt 101, ug 72, uk 1000, ur 754, uz 173, vi 1000, wa 104, xh 440,
    yi 15, yo 10, zh 1000, zu 39
"""
WITHOUT_HELD_OUT = {"an", "dz", "hy", "mn", "yo"}


def source(code: str, thousands: int) -> PublishedSource:
    """English and one language, aligned."""
    a, b = sorted((code, "en"))
    held_out = {} if code in WITHOUT_HELD_OUT else {"validation": "dev", "test": "test"}
    folder = f"opus-100-corpus/v1.0/supervised/{a}-{b}"
    files = {
        split: tuple(f"{folder}/opus.{a}-{b}-{part}.{c}" for c in ("en", code))
        for split, part in {"train": "train", **held_out}.items()
    }
    return PublishedSource(
        Layout(files, read_aligned_lines("english", "other"), "OPUS-100 (opus.nlpl.eu/opus-100.php)"),
        tfds=f"opus100/{a}-{b}:0.0.0",
        tfds_splits={split: split for split in files},
        from_tfds=lambda record: {"english": record["translation"]["en"], "other": record["translation"][code]},
        counts={"train": Counts(examples=1000 * thousands)},
    )


def sources() -> dict[str, PublishedSource]:
    """Language code of the corpus -> source."""
    table = dict(entry.split() for entry in SIZES.split(","))
    return {code: source(code, int(thousands)) for code, thousands in table.items()}


# The corpus has both `no` (Norwegian) and `nb` (Bokmål); they are one language here, and `no` is the larger part.
opus100 = add_translation_tasks(
    "opus100",
    {code: source for code, source in sources().items() if code != "nb"},
    metrics=by_language("bleu", "chrf++"),
)
register_mixture("opus100.all", opus100, partial(temperature, alpha=0.2), count="examples")
