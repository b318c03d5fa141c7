"""Tokenizers: the same ids as transformers from the same files, batches that pad rightly, text that streams whole."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from transfuse.errors import ArgumentError, CheckpointError, DeviceError
from transfuse.models.tokenizer import Tokenizer, TokenizerSettings
from transfuse.models.tokenizer_files import load_tokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog, doesn't it? 1234 times!",
    "Größe, façade, naïve: ünïcödé – 日本語 and 🙂🚀 too.",
    "  leading, multiple   spaces\tand\nnew lines \n\n end",
]
SAMPLES = [*TEXT, "", " ", "unseen zebra 98765", "🙂", "a\u0301 combining", "[MASK] <mask> </s>"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def byte_level_bpe(special: list[str]) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    return backend


BPE = byte_level_bpe(["<|endoftext|>"])


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    BPE.model.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    words = ["the", "quick", "fox", "jump", "##s", "over", "dog", ",", ".", "!", "?", "'", "##t", "große", "12", "##34"]
    letters = sorted({c for text in TEXT for c in text.lower() if c.isalnum()})
    pieces = dict.fromkeys(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *(f"##{c}" for c in letters)]
    )
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return folder


def test_wordpiece_gives_the_ids_of_transformers(bert_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = load_tokenizer(bert_folder), transformers.BertTokenizerFast(str(bert_folder / "vocab.txt"))
    for text in SAMPLES:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, "the dog") == theirs.encode(text, "the dog")
    expected = theirs(SAMPLES, ["fox"] * len(SAMPLES), padding=True, return_tensors="pt")
    for name, tensor in ours(SAMPLES, ["fox"] * len(SAMPLES)).items():
        assert torch.equal(tensor, expected[name]), name
    assert (ours.pad_token_id, ours.cls_token_id, ours.sep_token_id, ours.mask_token_id) == (0, 2, 3, 4)
    assert ours.unk_token_id == 1
    assert ours.eos_token_id is None


def test_byte_level_bpe_gives_the_ids_of_transformers(gpt2_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(gpt2_folder)
    theirs = transformers.GPT2TokenizerFast.from_pretrained(str(gpt2_folder))
    for text in SAMPLES:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.eos_token_id == theirs.eos_token_id
    assert "token_type_ids" not in ours(SAMPLES)


def test_roberta_vocabulary_gets_its_ends(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    byte_level_bpe(SPECIAL).model.save(str(tmp_path))
    ours = load_tokenizer(tmp_path)
    mask = AddedToken("<mask>", lstrip=True, special=True)  # as roberta-base's own tokenizer.json has it
    theirs = transformers.RobertaTokenizerFast.from_pretrained(str(tmp_path), mask_token=mask)
    for text in SAMPLES:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, "a b") == theirs.encode(text, "a b")
    assert ours.bos_token_id == 0
    assert ours.pad_token_id == 1
    assert "token_type_ids" not in ours(SAMPLES)


def test_tokenizer_json_wins_and_its_padding_is_left_out(tmp_path: Path, bert_folder: Path) -> None:
    backend = load_tokenizer(bert_folder).backend
    backend.enable_padding(length=50)
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\nother\n")
    ours = load_tokenizer(tmp_path)
    assert ours.encode(TEXT[0]) == load_tokenizer(bert_folder).encode(TEXT[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_is_padded_on_the_side_asked_for(bert_folder: Path, side: str) -> None:
    tokenizer = load_tokenizer(bert_folder)
    batch = tokenizer(["the dog", "fox"], padding_side=side, pad_to_multiple_of=8)
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), ((2, 8), torch.int64)
    )
    for row, text in enumerate(["the dog", "fox"]):
        ids = tokenizer.encode(text)
        pad = [0] * (8 - len(ids))
        assert batch["input_ids"][row].tolist() == (pad + ids if side == "left" else ids + pad)
        ones = [1] * len(ids)
        assert batch["attention_mask"][row].tolist() == (pad + ones if side == "left" else ones + pad)


def test_max_length_cuts_and_keeps_the_ends(bert_folder: Path) -> None:
    tokenizer = load_tokenizer(bert_folder)
    full, cut = tokenizer.encode(TEXT[0]), tokenizer(TEXT[0], max_length=6)["input_ids"][0].tolist()
    assert cut == [*full[:5], full[-1]]
    assert tokenizer(TEXT[0])["input_ids"][0].tolist() == full, "the cut must not last"
    pair = tokenizer([TEXT[0]], ["fox"], max_length=9)["input_ids"][0].tolist()
    assert len(pair) == 9
    assert pair.count(tokenizer.sep_token_id) == 2


def test_empty_batch_has_empty_tensors(bert_folder: Path) -> None:
    batch = load_tokenizer(bert_folder)([])
    assert all(tuple(tensor.shape) == (0, 0) for tensor in batch.values())


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda t: t(["a", "b"], ["c"]), "got 2 texts and 1 pairs"),
        (lambda t: t(["a"], padding_side="middle"), "got 'middle'"),
        (lambda t: t(["a"], max_length=2), "max_length must be a whole number of at least 3, got 2"),
        (lambda t: t(["a"], pad_to_multiple_of=0), "at least 1, got 0"),
        (lambda t: t([1]), r"expected texts \(str\), got int"),
        (lambda t: t(None), "expected a text or several, got NoneType"),
        (lambda t: t(b"a"), "expected a text or several, got bytes"),
        (lambda t: t(["a", "b\udcff"]), r"not valid Unicode, character 1 is '\\udcff'"),
        (lambda t: t.encode("\udcff"), "not valid Unicode, character 0"),
        (lambda t: t.encode(None), r"expected texts \(str\), got NoneType"),
        (lambda t: t(["a"], max_length="9"), "max_length must be a whole number of at least 3, got '9'"),
        (lambda t: t.decode([[1, 2]]), "use batch_decode"),
        (lambda t: t.decode([1.5]), r"decode: expected a sequence of token ids, got \[1.5\]"),
        (lambda t: t.decode([-1]), r"expected a sequence of token ids, got \[-1\]"),
        (lambda t: t.decode(3), "expected a sequence of token ids, got 3"),
        (lambda t: t.batch_decode(torch.tensor([1, 2])), "expected a sequence of token ids, got 1"),
    ],
)
def test_wrong_arguments(bert_folder: Path, call: object, expected: str) -> None:
    with pytest.raises(ArgumentError, match=expected):
        call(load_tokenizer(bert_folder))  # type: ignore[operator]


def test_a_vocabulary_without_its_own_unknown_token(tmp_path: Path) -> None:
    backend = Backend(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"))
    (tmp_path / "tokenizer.json").write_text(backend.to_str().replace('"<unk>":1', '"other":1'))
    for call in (load_tokenizer(tmp_path).encode, load_tokenizer(tmp_path)):
        with pytest.raises(CheckpointError, match=r"tokenizer: cannot encode: .*<unk>"):
            call("b")


def test_no_such_device(bert_folder: Path) -> None:
    with pytest.raises(DeviceError, match="got 'nonsense'"):
        load_tokenizer(bert_folder)("a", device="nonsense")


def test_threads_do_not_cut_one_anothers_texts(bert_folder: Path) -> None:
    tokenizer, text = load_tokenizer(bert_folder), "unaffable " * 50
    whole, found = len(tokenizer.encode(text)), []

    def run(max_length: int | None) -> None:
        found.extend(tokenizer(text, max_length=max_length)["input_ids"].shape[1] for _ in range(200))

    threads = [threading.Thread(target=run, args=(max_length,)) for max_length in (None, 5, None, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [5] * 200 + [9] * 200 + [whole] * 400


def test_batch_decode_of_a_tensor(gpt2_folder: Path) -> None:
    tokenizer = load_tokenizer(gpt2_folder)
    assert tokenizer.batch_decode(tokenizer(TEXT)["input_ids"]) == TEXT


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_streamed_text_is_whole_and_complete(text: str) -> None:
    tokenizer = Tokenizer(BPE)
    stream = tokenizer.stream()
    pieces = [stream.put(i) for i in tokenizer.encode(text)]
    end = stream.end()
    assert "".join(pieces) + end == text
    if "\ufffd" not in text:
        assert end == ""
        assert not any("\ufffd" in piece for piece in pieces), "half a character was shown"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 399), max_size=30))
def test_streaming_any_ids_gives_their_decoding(ids: list[int]) -> None:
    tokenizer = Tokenizer(BPE)
    stream = tokenizer.stream()
    assert "".join(stream.put(i) for i in ids) + stream.end() == tokenizer.decode(ids)
    letter = BPE.token_to_id("a")
    assert stream.put(letter) == "a", "after end the decoder is as new"


def test_streaming_keeps_the_spaces_between_words() -> None:
    """Metaspace decoders drop the first space of what they decode: only the first piece may lose it."""
    vocab = {"▁the": 0, "▁cat": 1, "s": 2, "▁": 3}
    backend = Backend(models.BPE(vocab, []))
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    stream = tokenizer.stream()
    assert [stream.put(i) for i in (0, 1, 2, 0)] == ["the", " cat", "s", " the"]


CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def with_chat(template: str | None) -> Tokenizer:
    return Tokenizer(BPE, TokenizerSettings({"eos": "<|endoftext|>"}, chat_template=template))


def test_chat_template() -> None:
    messages = [{"role": "user", "content": "hi"}]
    expected = "<|user|>hi<|endoftext|>"
    assert with_chat(CHAT).apply_chat_template(messages) == expected + "<|assistant|>"
    assert with_chat(CHAT).apply_chat_template(messages, add_generation_prompt=False) == expected


@pytest.mark.parametrize(
    "template, kind, expected",
    [
        (None, CheckpointError, "no chat template"),
        ("{% for %}", CheckpointError, "TemplateSyntaxError"),
        ("{{ raise_exception('roles must alternate') }}", ArgumentError, "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", CheckpointError, "SecurityError"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", CheckpointError, "SecurityError"),
        ("{{ messages.append(1) }}", CheckpointError, "SecurityError"),
        ("{{ messages[0]['content'] + 1 }}", CheckpointError, "TypeError"),
    ],
)
def test_chat_template_that_fails(template: str | None, kind: type[Exception], expected: str) -> None:
    with pytest.raises(kind, match=expected):
        with_chat(template).apply_chat_template([{"role": "user", "content": "hi"}])


def test_saved_tokenizer_reads_back_here_and_in_transformers(tmp_path: Path, bert_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    before = load_tokenizer(bert_folder)
    before.save_pretrained(tmp_path)
    after = load_tokenizer(tmp_path)
    assert after.settings == before.settings
    assert after.encode(TEXT[0], TEXT[1]) == before.encode(TEXT[0], TEXT[1])
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs(TEXT[0], TEXT[1])["input_ids"] == before.encode(TEXT[0], TEXT[1])
    assert theirs.pad_token_id == before.pad_token_id
    chat = with_chat(CHAT)
    chat.save_pretrained(tmp_path / "chat")
    assert load_tokenizer(tmp_path / "chat").settings.chat_template == CHAT


def test_special_tokens_and_template_from_their_files(tmp_path: Path) -> None:
    BPE.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": {"content": "<|endoftext|>"}, "pad_token": "absent", "padding_side": "left"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 10**30}))
    (tmp_path / "chat_template.jinja").write_text("from the file")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.settings == TokenizerSettings(
        {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}, padding_side="left", chat_template="from the file"
    )
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, "expected tokenizer.json, vocab.txt"),
        ({"tokenizer.json": "{"}, "cannot read the tokenizer"),
        ({"tokenizer.json": '{"model": {"type": "Nonsense"}}'}, "cannot read the tokenizer"),
        ({"tokenizer.model": "x"}, "SentencePiece"),
        ({"vocab.txt": "a\nb\n"}, r"lacks \[UNK\], \[CLS\], \[SEP\]"),
        ({"vocab.json": "[]", "merges.txt": ""}, "expected a JSON object"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b c\n"}, "merge of two pieces"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "x y\n"}, "cannot read the tokenizer"),
        ({"vocab.json": '{"a": "zero"}', "merges.txt": ""}, "cannot read the tokenizer"),
        ({"vocab.txt": "[UNK]\n[CLS]\n[SEP]\n", "tokenizer_config.json": "nope"}, "not valid JSON"),
    ],
    ids=lambda value: "+".join(value) or "nothing" if isinstance(value, dict) else "",
)
def test_damaged_tokenizer_files(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def write_gguf_tokenizer(path: Path, model: str = "gpt2", pre: str = "smollm", drop: int = 0) -> None:
    gguf = pytest.importorskip("gguf")
    vocab = json.loads(BPE.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    tokens = sorted(vocab["vocab"], key=vocab["vocab"].get)[drop:]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in vocab["merges"]])
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_tokenizer_inside_gguf(tmp_path: Path) -> None:
    write_gguf_tokenizer(tmp_path / "m.gguf")
    ours = load_tokenizer(tmp_path / "m.gguf")
    for text in SAMPLES:
        assert ours.decode(ours.encode(text)) == text
        if not any(c.isdigit() for c in text):  # its pre-tokenizer splits digits one by one, GPT-2's does not
            assert ours.encode(text) == BPE.encode(text).ids
    assert len(ours.encode("98765")) == 5
    assert ours.encode("a<|endoftext|>")[-1] == ours.eos_token_id == 0
    assert ours.decode([0]) == ""
    assert ours.settings.chat_template == CHAT


@pytest.mark.parametrize(
    "change, expected",
    [({"model": "t5"}, "'t5'"), ({"pre": "new-thing"}, "known: .*smollm"), ({"drop": 10}, "do not fit its tokens")],
)
def test_gguf_tokenizer_that_cannot_be_read(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    write_gguf_tokenizer(tmp_path / "m.gguf", **change)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=expected):
        load_tokenizer(tmp_path / "m.gguf")


@pytest.mark.parametrize("prefix", [True, False], ids=["space-prefix", "no-prefix"])
def test_sentencepiece_bpe_inside_gguf(tmp_path: Path, prefix: bool) -> None:
    """Llama 2's kind of tokenizer, against SentencePiece itself on a model trained here."""
    spm, gguf = pytest.importorskip("sentencepiece"), pytest.importorskip("gguf")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        minloglevel=2,
    )
    theirs = spm.SentencePieceProcessor(model_proto=model.getvalue())
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    ids = range(theirs.vocab_size())
    writer.add_token_list([theirs.id_to_piece(i) for i in ids])
    writer.add_token_scores([theirs.get_score(i) for i in ids])
    types = [2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1 for i in ids]
    writer.add_token_types(types)
    writer.add_bos_token_id(theirs.bos_id())
    writer.add_eos_token_id(theirs.eos_id())
    writer.add_add_space_prefix(prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = load_tokenizer(tmp_path / "m.gguf")
    for text in [*TEXT, "unseen zebra 98765", "🙂 quick", "a", "  two spaces", "ё"]:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)
        assert ours.encode(text) == [theirs.bos_id(), *theirs.encode(text)]
        assert ours.decode(ours.encode(text)) == text
        stream = ours.stream()
        assert "".join(stream.put(i) for i in ours.encode(text)) + stream.end() == text
