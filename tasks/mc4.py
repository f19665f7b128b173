"""mC4 (Xue et al. 2021): web text of 107 languages and transliterations, by `c4/multilingual`.

Read from TFDS when `c4/multilingual:3.1.0` is prepared in $TFDS_DATA_DIR, else from the JSON lines that allenai
publishes, below $DATA_ROOT/c4/multilingual: c4-<language>.tfrecord-00000-of-01024.json.gz,
c4-<language>-validation.tfrecord-00000-of-00001.json.gz.
"""

from functools import partial

from mlm.data.registration import add_denoising_tasks, register_mixture
from mlm.data.sources import Counts, Layout, PublishedSource, read_json_lines
from mlm.sampling import temperature, unimax

# Language, tokens (10^9), pages (10^6). Recalled from table 6 of the mT5 paper and checked against its totals (6.3 T
# tokens, 6.6 G pages) and its sampling rates, which pages^0.3 reproduces; verify before quoting.
SIZES = """
    en 2733 3067, ru 713 756, es 433 416, de 347 397, fr 318 333, it 162 186, pt 146 169, pl 130 126, nl 73 96,
    tr 71 88, ja 164 87, vi 116 79, id 69 70, cs 63 60, zh 39 55, fa 52 54, ar 57 53, sv 45 49, ro 52 46, el 43 42,
    uk 41 39, hu 39 37, da 29 29, fi 25 27, no 27 25, bg 22 23, hi 24 19, sk 18 18, ko 26 16, th 11 15, ca 13 14,
    ms 13 13, iw 17 12, lt 11 11, sl 8.8 8.5, mr 14 7.8, bn 7.3 7.4, et 6.9 6.9, lv 7.0 6.4, az 4.4 5.3, gl 2.4 4.6,
    cy 4.9 4.1, sq 4.0 4.1, ta 3.4 3.5, sr 4.3 3.4, ne 3.2 2.9, lb 1.0 2.7, hy 2.4 2.4, kk 3.1 2.4, ka 2.5 2.3,
    mt 5.2 2.3, af 1.7 2.2, fil 2.1 2.1, is 2.6 2.1, mk 1.8 2.1, ml 1.8 2.1, mn 2.7 2.1, ur 2.4 1.9, be 2.0 1.7,
    la 1.3 1.7, eu 1.4 1.6, tg 1.4 1.3, te 1.3 1.2, fy 0.4 1.1, kn 1.1 1.1, ky 1.0 1.0, sw 1.0 1.0, so 1.4 0.9,
    my 0.9 0.8, uz 0.9 0.8, km 0.6 0.8, ru-Latn 0.9 0.7, sd 1.6 0.7, gu 0.8 0.6, hi-Latn 0.6 0.6, jv 0.3 0.6,
    zu 0.2 0.6, si 0.8 0.5, ja-Latn 0.3 0.5, eo 0.7 0.5, co 0.2 0.5, ga 0.5 0.5, el-Latn 0.4 0.4, zh-Latn 0.2 0.4,
    pa 0.6 0.4, ceb 0.2 0.4, mg 0.2 0.3, ps 0.4 0.3, sn 0.2 0.3, gd 0.4 0.3, ku 0.4 0.3, hmn 0.2 0.3, su 0.1 0.3,
    ht 0.2 0.3, ha 0.2 0.2, ny 0.1 0.2, am 0.3 0.2, bg-Latn 0.09 0.2, yi 0.3 0.1, lo 0.1 0.1, mi 0.1 0.1,
    sm 0.09 0.1, ig 0.09 0.09, haw 0.09 0.08, xh 0.06 0.07, st 0.08 0.07, yo 0.05 0.05
"""

TFDS = "c4/multilingual:3.1.0"


def sizes() -> dict[str, Counts]:
    """Language code of the corpus -> size of its training text. Characters are estimated, four to a token."""
    table = {}
    for entry in SIZES.split(","):
        code, tokens, pages = entry.split()
        tokens = float(tokens) * 1e9
        table[code] = Counts(examples=round(float(pages) * 1e6), characters=round(4 * tokens), tokens=round(tokens))
    return table


def source(code: str, size: Counts) -> PublishedSource:
    """One language's pages, as `text`."""
    files = {
        "train": (f"c4/multilingual/c4-{code}.tfrecord-*.json.gz",),
        "validation": (f"c4/multilingual/c4-{code}-validation.tfrecord-*.json.gz",),
    }
    return PublishedSource(
        Layout(files, read_json_lines("text"), "huggingface.co/datasets/allenai/c4 (multilingual)"),
        tfds=TFDS,
        tfds_splits={"train": code, "validation": f"{code}-validation"},
        counts={"train": size},
    )


SOURCES = {code: source(code, size) for code, size in sizes().items()}

mc4 = add_denoising_tasks("mc4", SOURCES)
# mT5: rates of the pages to the power of 0.3. umT5: UniMax on characters, here for 10^12 tokens and one epoch.
register_mixture("mc4.mt5", mc4, partial(temperature, alpha=0.3), count="examples")
register_mixture("mc4.unimax", mc4, partial(unimax, budget=4e12, max_epochs=1))
