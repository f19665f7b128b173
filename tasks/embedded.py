"""The text that is shipped with the package, in every language it has.

    corpus      file                 tasks
    help        help_mpl.tsv.gz      denoise, translate   help and interface sentences (LibreOffice, Firefox)
    ui          ui_parallel.tsv.gz   denoise, translate   interface sentences (Home Assistant, iD)
    tatoeba     tatoeba.tsv.gz       denoise, translate   everyday sentences
    udhr        udhr.tsv.gz          denoise, retrieve    the Universal Declaration of Human Rights
    uagec       uagec.tsv.gz         correct              grammatical error correction (Ukrainian)

Sources and licences: corpora/NOTICE.md, corpora/LICENSES.md.
"""

from functools import partial

from mlm.data.registration import (
    add_denoising_tasks,
    add_rewriting_tasks,
    add_translation_tasks,
    register_mixture,
)
from mlm.data.sources import TableSource, corrections, declaration, pairs
from mlm.evaluation.metrics import by_language, with_source
from mlm.sampling import unimax

# corpus -> (file, its languages beside English)
ALIGNED = {
    "help": (
        "help_mpl.tsv.gz",
        "ab ach af an ar as ast az be bg bn bo br brx bs ca ca-valencia cak cs da de dgo dsb dz el eo es et fa ff fi "
        "fr fur fy ga gd gl gn gu he hi hr hsb hu hy ia id it ja kab km kn ko kok ks ku lij lo lt lv mai mk ml mn mni "
        "mr ms my nb ne nl nn nr nso oc om or pa pl pt pt-BR rm ro ru rw sa sat sc sco sd si sid sk skr sl son sq sr "
        "sr-Latn ss st sv szl te tg th tl tn tr trs ts ug uk ur uz ve vec vi xh zh zh-Hant zu",
    ),
    "ui": (
        "ui_parallel.tsv.gz",
        "ar be bg br ca cs da de el eo es et fa fi fr fy ga gan gl he hr hu id it ja ko kw lb lt lv mk ms nb nl pl pt "
        "pt-BR ro ru sk sl sr sr-Latn sv th tr uk vi yue zh zh-Hant",
    ),
    "tatoeba": ("tatoeba.tsv.gz", "es fr uk"),
}
DECLARATION = (
    "udhr.tsv.gz",
    "aa ab abs ace acf acu ada ady af agr aii ajg ak-akuapem ak-asante alt am ame ami amr ar arl arn ast ay az "
    "az-Cyrl azb-Latn ban bax bba bci bcl be bem bfa bg bho bi bin bjn blt bm bn bo boa br bs bs-Cyrl buc bug bum bvi "
    "ca cab cak cbi cbr cbs cbt cbu ccp ceb cfm ch chj chk chr cic cjk cjs cjy ckb-Latn cnh cni cnr co cof cot cpu "
    "crh cri crs cs csa ctd cy da dag dbr ddn de dga dip dje duu dyo dyu dz ee el el-polyton emk en eo es et eu evn "
    "fa fat fi fj fkv fo fon fr fr-x-welche frp-x-fribourg frp-x-savoie frp-x-valais frp-x-vaud fuf fuf-Adlm fur "
    "fuv fvr fy ga gaa gag gan gax gd gej gex gjn gkp gl gld gn gsw gu guc guk guu gv ha hak he hea hi hil hlt hms "
    "hni hnj hns hr hsb hsn ht hu hus hus-x-otontepe hus-x-potosi huu hy ia ibb id idu ig ii ijs ilo io is it ja "
    "jam jii jiv jv jv-Java ka kaa kab kbd kbp kbr kde kdh kea kek kg kha kjh kk kkh kl km kmb kn ko ko-x-yanbian "
    "koi koo kqn kqs kr kri krl ktu ku kwi ky la lad lb lg lia lij lld ln lns lo lob loz lt lua lue lun lv mad mag "
    "mai mam mas maz mcd mcf men mfq mg mh mi mic min miq mk ml mn mnw mor mos mr ms ms-Arab mt mto mwl mxi mxv my "
    "mzi nan nb nba nds ne ng nhn niu niv njo nku nl nn not nr nso nv ny nym nyn nzi oaa oc oc-auvern oc-provenc "
    "oki orh os ote pa pam pap pau pbb pcd pcm pis piu pl pmy pnb pon pov ppl prs ps pt pt-BR qu qu-x-unified quc "
    "qug quh qul quy qva qvh qvm qvn qwh qxn qxu rar rgn rm rm-puter rm-surmiran rm-sursilv rm-sutsilv rm-vallader "
    "rmn rn ro ru rup rw sah sc sco se sey sg shk shn shp si sid sk skr sl slr sm smn sms sn snk snn so "
    "so-x-afmarka sq sr sr-Latn srr ss st su suk sus sv sw sw-x-chimwini sw-x-kibajuni swb ta tbz tdt te tem tet tg "
    "th ti tiv tji tk tk-Cyrl tl tly tn to tob toi toj top tpi tr ts tsz tt ty tyv tzh tzm tzo udu ug ug-Latn uk "
    "umb und-x-batak und-x-bizisa und-x-jinan und-x-klau und-x-maiunan und-x-mijisa und-x-minjiang "
    "und-x-minjiang-written und-x-muzzi ur ura uz uz-Cyrl vai ve vec vep vi vi-Hani vmw wa war wo wuu wwa xh xsm "
    "yad yao yap yi ymm yo yrk yua yue za zam zdj zgh zh zh-Hant ztu zu",
)
CORRECTION = ("uagec.tsv.gz", "uk")


def aligned_source(file: str, code: str) -> TableSource:
    """Pairs of English and a language."""
    return TableSource(lambda split: pairs(file).table(code, split), ("english", "other"))


def text_source(file: str, code: str) -> TableSource:
    """Distinct sentences of one language."""
    return TableSource(lambda split: pairs(file).table(code, split), ("text",))


def declaration_source(code: str) -> TableSource:
    """Articles, in every version that the language has."""
    return TableSource(lambda split: declaration(DECLARATION[0]).table(code, split), ("text", "unit", "version"))


translation_metrics = by_language("bleu", "chrf++")  # by the language that is written

denoise, translate = [], []
for corpus, (file, codes) in ALIGNED.items():
    denoise += add_denoising_tasks(corpus, {code: text_source(file, code) for code in ["en", *codes.split()]})
    languages = {code: aligned_source(file, code) for code in codes.split()}
    translate += add_translation_tasks(corpus, languages, metrics=translation_metrics)

articles = {code: declaration_source(code) for code in DECLARATION[1].split()}
declaration_denoise = add_denoising_tasks("udhr", articles)
accuracy = by_language("accuracy")
retrieve = add_rewriting_tasks("udhr", articles, ("text", "unit"), objective="retrieve", metrics=accuracy)

corrected = TableSource(lambda split: corrections(CORRECTION[0]).table("uk", split), ("original", "corrected"))
correct = add_rewriting_tasks(
    "uagec",
    {"uk": corrected},
    ("original", "corrected"),
    objective="correct",
    metrics=by_language("correction_f05"),
    postprocess_fn=with_source,
)

# The quickstart reads the languages that have aligned text, and what the Declaration adds to them. Its budget is about
# what two CPU cores read in eight minutes.
aligned = {"en", *" ".join(codes for _, codes in ALIGNED.values()).split()}
unimax_by_characters = partial(unimax, budget=10e6, max_epochs=6)
register_mixture(
    "quickstart.denoise",
    [*denoise, *(name for name, code in zip(declaration_denoise, articles, strict=True) if code in aligned)],
    unimax_by_characters,
)
register_mixture("quickstart.translate", translate, unimax_by_characters)
register_mixture("quickstart", [("quickstart.denoise", 0.7), ("quickstart.translate", 0.3)])

# Every language and every objective.
register_mixture("embedded.denoise", [*denoise, *declaration_denoise], partial(unimax, budget=20e6, max_epochs=6))
register_mixture(
    "embedded.all", [("embedded.denoise", 0.65), ("quickstart.translate", 0.3), ("uagec.correct.uk", 0.05)]
)
