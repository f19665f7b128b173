"""Against transformers itself: `make parity`. Goldens are computed anew; what we write is read, and generates the same.

Needs the [parity] extra.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from mlm.checkpoints.streaming import StoredParams
from mlm.interop.family import Ids
from mlm.interop.huggingface import export_params, import_params, open_published
from tests.interop import recipe

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
MEMBERS = sorted(path.stem for path in recipe.GOLDENS.glob("*.npz"))
CLASSES = {"gemma3_text": "AutoModelForCausalLM", "xlm_r": "AutoModelForMaskedLM", "xlm_r_xl": "AutoModelForMaskedLM"}


@pytest.mark.parametrize("name", MEMBERS)
def test_goldens_are_what_pytorch_computes(name):
    from tests.interop.make_goldens import compute

    stored, now = recipe.load(recipe.GOLDENS / f"{name}.npz"), compute(name)
    assert (stored.config, stored.shapes) == (json.loads(json.dumps(now.config)), now.shapes)
    for field in ("source", "lengths", "target", "target_lengths", "generated"):
        np.testing.assert_array_equal(getattr(stored, field), getattr(now, field))
    for field in ("encoded", "logits", "loss"):
        np.testing.assert_allclose(getattr(stored, field), getattr(now, field), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MEMBERS)
def test_what_we_write_is_read_and_generates_the_same(name, tmp_path):
    """Through our checkpoint and back into transformers; greedy tokens are the golden's."""
    import torch
    import transformers

    from tests.interop.make_goldens import greedy, mend_mixtures

    golden = recipe.load(recipe.GOLDENS / f"{name}.npz")
    published = open_published(recipe.write_folder(tmp_path / "hf", golden.config, golden.shapes))
    import_params(published, tmp_path / "checkpoints")
    out = tmp_path / "out"
    out.mkdir()
    stored = StoredParams(tmp_path / "checkpoints")
    keep = published.record()["config"]
    export_params(stored, published.config, out, family=published.family.name, keep=keep)
    if name == "t5gemma2":  # images are no part of ours: their sizes come from the folder the model came from
        _add_images(out, golden)
    kind = getattr(transformers, CLASSES.get(name, "AutoModelForSeq2SeqLM"))
    model, report = kind.from_pretrained(out, output_loading_info=True, attn_implementation="eager")
    ours = {piece.name for piece in published.pieces}
    assert not report["unexpected_keys"]
    assert not {key for key in report["missing_keys"] if key in ours}
    assert not report["mismatched_keys"]
    model = model.eval()
    start = golden.config.get("decoder_start_token_id", 2)
    given = torch.tensor(np.concatenate([np.full((2, 1), start), golden.target[:, :-1]], 1))
    told = torch.arange(golden.target.shape[1]) < torch.tensor(golden.target_lengths)[:, None]
    read = torch.arange(recipe.SOURCE) < torch.tensor(golden.lengths)[:, None]
    if name == "t5gemma":
        _narrow(model)
    if name == "nllb_moe":
        mend_mixtures(model)
    with torch.no_grad():
        if name == "gemma3_text":
            logits = model(input_ids=given, attention_mask=told.long()).logits
        elif published.config.decoder is None:
            logits = model(torch.tensor(golden.source), attention_mask=read.long()).logits
        else:
            inputs = {"input_ids": torch.tensor(golden.source), "attention_mask": read.long()}
            logits = model(**inputs, decoder_input_ids=given).logits
            tokens = greedy(model, inputs, start)
            np.testing.assert_array_equal(tokens, golden.generated)
    scale = 16**-0.5 if name == "umt5" else 1.0  # transformers 5 declares every umT5 tied, and scales
    error = np.abs(np.asarray(logits)[told] / scale - golden.logits[told]).max() / np.abs(golden.logits[told]).max()
    print(f"{name}: {error:.1e}")
    assert error < 1e-4


def _narrow(model) -> None:
    """transformers 5 lets T5Gemma's encoder look one token farther than release 4.57, which published it."""
    encoder = model.model.encoder
    encoder.config.sliding_window -= 1
    for layer in encoder.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window -= 1


def _add_images(folder: Path, golden: recipe.Golden) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["encoder"] = {**golden.config["encoder"], **config["encoder"]}
    config["image_token_index"] = golden.config["image_token_index"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "family", "first", "settings"),
    [
        ("T5Tokenizer", "t5", (), {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
        ("XLMRobertaTokenizer", "xlm-roberta", (1, 2, 3, 0), {"unk_id": 0, "bos_id": 1, "eos_id": 2}),
        ("MBart50Tokenizer", "mbart", (1, 2, 3, 0), {"unk_id": 0, "bos_id": 1, "eos_id": 2}),
        ("NllbTokenizer", "m2m_100", (1, 2, 3, 0), {"unk_id": 0, "bos_id": 1, "eos_id": 2, "model_type": "bpe"}),
    ],
)
def test_tokenizers_of_transformers_give_our_ids(kind, family, first, settings, tmp_path):
    """From the tokenizer.json that transformers makes of a SentencePiece file."""
    import transformers

    from mlm.data.published import take_vocabulary
    from tests.data.published_test import LINES, train

    name = "spiece.model" if family == "t5" else "sentencepiece.bpe.model"
    train(tmp_path / name, **settings)
    tokenizer = getattr(transformers, kind).from_pretrained(tmp_path)
    (tmp_path / "run").mkdir()
    tokenizer.save_pretrained(tmp_path / "saved")
    vocabulary = take_vocabulary(tmp_path / "saved", tmp_path / "run", {"model_type": family}, first)
    assert vocabulary.vocab_size == len(tokenizer)
    # No space at the end, which SentencePiece drops and some of these tokenizers keep.
    for text in [*LINES[:20], "日本語 ☃ 𝔸", "ﬁne ½ Ⅷ", "  two  spaces"]:
        want = [Ids(first).ours(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert list(vocabulary.encode(text)) == want


GEMMA = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "model_type": "bpe", "byte_fallback": True}
GEMMA |= {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "normalization_rule_name": "identity"}
GEMMA |= {"add_dummy_prefix": False, "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    ("kind", "family", "first", "file", "settings"),
    [
        ("XLMRobertaTokenizer", "xlm-roberta", (1, 2, 3, 0), "sentencepiece.bpe.model", {"unk_id": 0, "eos_id": 2}),
        ("GemmaTokenizer", "t5gemma", (0, 1, 3, 2), "tokenizer.model", GEMMA),
    ],
)
@pytest.mark.parametrize("saved", [True, False])
def test_other_sources_are_what_their_tokenizers_prepare(kind, family, first, file, settings, saved, tmp_path):
    """saved: from the files of transformers 5, or from a SentencePiece file alone, as the family has it."""
    import transformers

    from mlm.data.published import take_template, take_vocabulary
    from tests.data.published_test import LINES, train

    train(tmp_path / file, **{"bos_id": 1, **settings})
    told = {"add_bos_token": True} if kind == "GemmaTokenizer" else {}
    tokenizer = getattr(transformers, kind).from_pretrained(tmp_path, **told)
    folder = tmp_path / "saved" if saved else tmp_path
    (tmp_path / "run").mkdir()
    tokenizer.save_pretrained(tmp_path / "saved")
    vocabulary = take_vocabulary(folder, tmp_path / "run", {"model_type": family}, first)
    frame = take_template(folder, {"model_type": family}, vocabulary).frame(vocabulary, None, None)
    for text in LINES[:5]:
        want = [Ids(first).ours(i) for i in tokenizer(text)["input_ids"]]
        assert [*frame.before, *vocabulary.encode(text), *frame.after] == want


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_our_vocabulary_is_a_tokenizer_of_transformers(kind, tmp_path):
    import transformers

    from mlm.data.published import give_vocabulary
    from mlm.data.vocabulary_training import train_vocabulary
    from tests.data.published_test import LINES, TEXTS

    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir(), out.mkdir()
    ours = train_vocabulary(LINES, run / "vocabulary.model", 512, model_type=kind, languages=["fr"], sentinels=100)
    (run / "data.json").write_text(json.dumps({"vocabulary": "vocabulary.model"}))
    give_vocabulary(run, out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == ours.vocab_size
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == ours.sentinel_ids[0]
    for text in [text for text in TEXTS if text != "▁"] + LINES[:20]:
        assert tokenizer(text)["input_ids"] == [*ours.encode(text), ours.eos_id]


# Tokenizer, model and codes of English and French there; model_type of the SentencePiece file.
TRANSLATORS = {
    "NllbTokenizer": ("M2M100", ("eng_Latn", "fra_Latn"), "bpe"),
    "M2M100Tokenizer": ("M2M100", ("en", "fr"), "bpe"),
    "MBart50Tokenizer": ("MBart", ("en_XX", "fr_XX"), "unigram"),
    "MBartTokenizer": ("MBart", ("en_XX", "fr_XX"), "unigram"),
}
NEW_TOKENS = 10


@pytest.mark.parametrize("kind", TRANSLATORS)
def test_a_converted_translator_reads_and_writes_the_same(kind, tmp_path):
    """Prepared sources and what `generate` writes behind the token of the language, from one folder."""
    import torch
    import transformers

    import mlm
    from mlm.cli.main import main
    from tests.interop.make_goldens import FAIRSEQ
    from tests.interop.recipe import tensors

    name, codes, pieces = TRANSLATORS[kind]
    tokenizer = _translator(kind, codes, pieces, tmp_path / "tokenizer")
    folder = tmp_path / "hf"
    tokenizer.save_pretrained(folder)
    fresh = {**FAIRSEQ, "vocab_size": len(tokenizer) + 120, "max_position_embeddings": 512}
    config = getattr(transformers, f"{name}Config")(**fresh)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    with torch.no_grad():
        for n, values in tensors(shapes).items():
            model.get_parameter(n).copy_(torch.tensor(values))
    model.save_pretrained(folder)

    assert main(["convert", "from-hf", str(folder), str(tmp_path / "run")]) == 0
    session = mlm.load(tmp_path / "run")
    ids = Ids((1, 2, 3, 0))
    texts = ["Where is the station?", "Good morning, how are you today", "no"]
    english, french = (_id_of(tokenizer, code) for code in codes)
    tokenizer.src_lang = codes[0]
    told = {"decoder_start_token_id": french} if kind == "MBartTokenizer" else {"forced_bos_token_id": french}
    prepared = [tokenizer(text)["input_ids"] for text in texts]
    assert [s.tokens for s in session.encode(texts, "fr", from_="en")] == [[*map(ids.ours, p)] for p in prepared]
    assert all(english in p for p in prepared)
    results = session.decode(texts, "fr", from_="en", max_length=NEW_TOKENS)
    for (best,), source in zip(results, prepared, strict=True):
        with torch.no_grad():
            out = model.generate(
                torch.tensor([source]),
                do_sample=False,
                num_beams=1,
                max_new_tokens=NEW_TOKENS,
                forced_eos_token_id=None,
                **told,
            )
        want = [ids.ours(int(token)) for token in out[0, 1:]]
        assert best.tokens == want
        assert (best.tokens[0] == session.vocabulary.language_token("fr")) == (kind != "MBartTokenizer")
    assert len({tuple(best.tokens) for (best,) in results}) > 1


def _translator(kind, codes, pieces, folder):
    """A tokenizer of the kind, from a SentencePiece file and what else it is made of."""
    import sentencepiece
    import transformers

    from tests.data.published_test import train

    folder.mkdir()
    file = train(folder / "sentencepiece.bpe.model", unk_id=0, bos_id=1, eos_id=2, model_type=pieces)
    if kind == "M2M100Tokenizer":
        read = sentencepiece.SentencePieceProcessor(model_file=str(file))
        words = ["<s>", "<pad>", "</s>", "<unk>", *(read.id_to_piece(i) for i in range(3, read.get_piece_size()))]
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    extra = {"extra_special_tokens": list(codes)} if kind == "NllbTokenizer" else {}
    return getattr(transformers, kind).from_pretrained(folder, **extra)


def _id_of(tokenizer, code: str) -> int:
    return tokenizer.get_lang_id(code) if hasattr(tokenizer, "get_lang_id") else tokenizer.convert_tokens_to_ids(code)
