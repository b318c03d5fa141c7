"""SentencePiece files: the ids of SentencePiece itself, and T5's, Llama's and Marian's tokenizers around them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfuse.errors import CheckpointError
from transfuse.models.spm import backend_of, read_spm
from transfuse.models.tokenizer_files import load_tokenizer

spm = pytest.importorskip("sentencepiece")
TEXT = [
    "The quick brown fox jumps over the lazy dog, doesn't it? 1234 times!",
    "Größe, façade, naïve: ünïcödé – 日本語 and 🙂🚀 too.",
    "  leading, multiple   spaces\tand\nnew lines \n\n end",
]
SAMPLES = [*TEXT, "", " ", "   ", "unseen zebra 98765", "🙂", "ｆｕｌｌ ½ ﬁ", "a▁b", "two  words ", " x", "ё q"]
VARIANTS = {
    "plain": {},
    "bytes": {"byte_fallback": True, "vocab_size": 420},
    "no-prefix": {"add_dummy_prefix": False},
    "as-it-is": {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
}


def train(texts: list[str], **options: object) -> bytes:
    written = io.BytesIO()
    given = {"model_type": "unigram", "vocab_size": 120, "hard_vocab_limit": False, "minloglevel": 2, **options}
    spm.SentencePieceTrainer.train(sentence_iterator=iter(texts * 20), model_writer=written, **given)
    return written.getvalue()


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_cuts_as_sentencepiece_does(tmp_path: Path, kind: str, variant: str) -> None:
    options = {"model_type": kind, "vocab_size": 150 if kind == "bpe" else 120, **VARIANTS[variant]}
    (tmp_path / "m.model").write_bytes(train(TEXT, **options))
    theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    ours = backend_of(read_spm(tmp_path / "m.model"), tmp_path)

    # Left out: marks that join the character before them, which the tokenizers library normalises as one character.
    @settings(max_examples=60, deadline=None)
    @given(st.text(alphabet=" \u3000\tabcdeTHqu½ﬁＡß日本é,.?▁🙂ё\n", max_size=30))
    def check(text: str) -> None:
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False).ids == ids
        if theirs.unk_id() not in ids:  # SentencePiece writes " ⁇ " for it
            assert ours.decode(ids) == theirs.decode(ids)

    check()
    for text in SAMPLES:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    (folder / "spiece.model").write_bytes(train(TEXT, pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 100}')
    return folder


def test_t5_ends_texts_and_counts_its_sentinels_backwards(t5_folder: Path) -> None:
    ours, theirs = load_tokenizer(t5_folder), spm.SentencePieceProcessor(model_file=str(t5_folder / "spiece.model"))
    pieces = theirs.vocab_size()
    for text in SAMPLES:
        assert ours.encode(text) == [*theirs.encode(text), 1]
    assert ours.encode("a", "b") == [*theirs.encode("a"), 1, *theirs.encode("b"), 1]
    assert (ours.pad_token_id, ours.eos_token_id, ours.unk_token_id, ours.vocab_size) == (0, 1, 2, pieces + 100)
    assert ours.tokens([pieces, pieces + 99, pieces + 100]) == ["<extra_id_99>", "<extra_id_0>", f"<id {pieces + 100}>"]
    assert ours.encode("a <extra_id_0> b") == [*theirs.encode("a"), pieces + 99, *theirs.encode("b"), 1]
    assert ours.decode(ours.encode(TEXT[0])) == TEXT[0]


def test_t5_gives_the_ids_of_transformers(t5_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf", reason="transformers needs protobuf to read spiece.model")
    ours, theirs = load_tokenizer(t5_folder), transformers.AutoTokenizer.from_pretrained(str(t5_folder))
    for text in [*SAMPLES, "a <extra_id_0> b <extra_id_1>."]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_a_t5_tokenizer_is_saved_as_one_json(t5_folder: Path, tmp_path: Path) -> None:
    before = load_tokenizer(t5_folder)
    before.save_pretrained(tmp_path)
    after = load_tokenizer(tmp_path)
    assert after.settings == before.settings
    assert [after.encode(text) for text in SAMPLES] == [before.encode(text) for text in SAMPLES]


@pytest.mark.parametrize(
    "config, first, last", [({}, [1], []), ({"add_bos_token": False, "add_eos_token": True}, [], [2])]
)
def test_llamas_tokenizer_model(tmp_path: Path, config: dict[str, bool], first: list[int], last: list[int]) -> None:
    model = train(TEXT, model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False,
                  byte_fallback=True, vocab_size=420)  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(tmp_path), spm.SentencePieceProcessor(model_proto=model)
    for text in SAMPLES:
        assert ours.encode(text) == [*first, *theirs.encode(text), *last]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


@pytest.fixture(scope="module")
def marian_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two SentencePiece models that share some pieces, and a vocab.json of both in an order of its own."""
    folder = tmp_path_factory.mktemp("marian")
    names = set()
    for name, texts in (("source.spm", TEXT[:2]), ("target.spm", TEXT[1:])):
        (folder / name).write_bytes(train(texts, bos_id=-1, eos_id=0, unk_id=1, vocab_size=100))
        model = spm.SentencePieceProcessor(model_file=str(folder / name))
        names |= {model.id_to_piece(i) for i in range(model.vocab_size())}
    ordered = sorted(names - {"</s>", "<unk>", "x"}, key=lambda piece: piece[::-1])
    vocab = ["</s>", "<unk>", *ordered, ">>de<<", ">>pt_BR<<", "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocab)}))
    (folder / "tokenizer_config.json").write_text('{"source_lang": "en", "target_lang": "de"}')
    return folder


def test_marian_encodes_the_source_and_decodes_the_target(marian_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = load_tokenizer(marian_folder), transformers.MarianTokenizer.from_pretrained(str(marian_folder))
    for text in [*SAMPLES, ">>de<< the fox", ">>pt_BR<< the fox", "a </s> b"]:
        assert ours.encode(text) == theirs(text)["input_ids"]
        target = theirs(text_target=text)["input_ids"]
        assert ours.target.encode(text) == target
        assert ours.decode(target) == theirs.decode(target, skip_special_tokens=True)
    assert ours.encode(TEXT[1]) != ours.target.encode(TEXT[1])
    assert (ours.pad_token_id, ours.eos_token_id) == (theirs.pad_token_id, theirs.eos_token_id)
    expected = theirs(SAMPLES, padding=True, return_tensors="pt")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours(SAMPLES).items())
    ours.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert again(TEXT[0])["input_ids"] == load_tokenizer(tmp_path).encode(TEXT[0]) == ours.encode(TEXT[0])


def test_marian_with_a_vocabulary_for_each_language(marian_folder: Path, tmp_path: Path) -> None:
    for name in ("source.spm", "target.spm", "vocab.json"):
        (tmp_path / name).write_bytes((marian_folder / name).read_bytes())
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "target_vocab.json").write_text(json.dumps({name: len(vocab) - 1 - i for name, i in vocab.items()}))
    one, two = load_tokenizer(marian_folder), load_tokenizer(tmp_path)
    assert two.encode(TEXT[1]) == one.encode(TEXT[1])
    assert two.target.encode(TEXT[1]) == [len(vocab) - 1 - i for i in one.target.encode(TEXT[1])]
    assert two.decode(two.target.encode(TEXT[1])) == one.decode(one.target.encode(TEXT[1]))


def test_text_streamed_from_pieces_is_whole(t5_folder: Path, marian_folder: Path) -> None:
    for tokenizer in (load_tokenizer(t5_folder), load_tokenizer(marian_folder)):
        ids = tokenizer.target.encode("The quick 日本語 fox and more too.")
        stream = tokenizer.stream()
        assert "".join(stream.put(i) for i in ids) + stream.end() == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"spiece.model": b"nonsense"}, "spiece.model: not a SentencePiece model"),
        ({"spiece.model": b""}, "got kind 1 with 0 pieces"),
        ({"spiece.model": b"\x0a\x50abc"}, "it ends 77 bytes early"),
        ({"spiece.model": b"\x0a" + b"\xff" * 20}, "a number without an end"),
        ({"tokenizer.model": b"version https://git-lfs"}, "tokenizer.model: not a SentencePiece model"),
        ({"source.spm": b"x", "vocab.json": b"{}"}, "lacks target.spm, which a Marian tokenizer needs"),
        ({"source.spm": b"x", "target.spm": b"x", "vocab.json": b"{}"}, "the vocabulary lacks </s>, <unk>"),
    ],
    ids=["nonsense", "empty", "cut", "endless", "lfs", "no-target", "no-end"],
)
def test_damaged_files(tmp_path: Path, files: dict[str, bytes], expected: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_models_that_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(train(TEXT, model_type="char"))
    with pytest.raises(CheckpointError, match=r"expected a SentencePiece model of kind unigram .* got kind 4"):
        load_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(train(TEXT, control_symbols=["[CLS]"]))
    with pytest.raises(CheckpointError, match=r"spiece\.model: is not T5's"):
        load_tokenizer(tmp_path)


def test_a_model_cut_anywhere_is_one_clear_error(tmp_path: Path) -> None:
    whole = train(TEXT, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    for end in range(0, len(whole) // 2, 997):  # the second half is the normaliser, whose parts may be left out
        (tmp_path / "spiece.model").write_bytes(whole[:end])
        try:
            load_tokenizer(tmp_path)
        except CheckpointError as error:
            assert "spiece.model" in str(error)  # noqa: PT017
