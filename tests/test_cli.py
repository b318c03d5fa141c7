"""The command line: what each command prints, one line and status 2 for every mistake, quiet ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers import models as tokenizer_models
from typer.testing import CliRunner, Result

import transfuse
from transfuse.cli import app
from transfuse.models.tokenizer import Tokenizer

COMMANDS = (
    "doctor", "demo", "generate", "translate", "summarize", "classify", "token-classify", "answer", "fill-mask",
    "embed", "attention", "count",
)  # fmt: skip
ALPHABET = " abcdefghijklmnopqrstuvwxyz"


def run(*arguments: str, text: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=text)


def shell(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "transfuse", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def assert_mistake(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A decoder and an encoder that know 27 characters, on disk with their tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")
    vocabulary = {character: i for i, character in enumerate(ALPHABET)}
    torch.manual_seed(0)
    config = transfuse.TransformerConfig("decoder", len(vocabulary), 16, num_layers=1, num_heads=2, position="rotary")
    encoder = transfuse.TransformerConfig("encoder", len(vocabulary), 16, num_layers=1, num_heads=2)
    transfuse.Decoder(config).save_pretrained(root / "decoder")
    transfuse.Encoder(encoder).save_pretrained(root / "encoder")
    backend = Backend(tokenizer_models.BPE(vocabulary, []))
    backend.decoder = decoders.Fuse()
    for name in ("decoder", "encoder"):
        Tokenizer(backend).save_pretrained(root / name)
    return {name: str(root / name) for name in ("decoder", "encoder")}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout
    assert "\x1b[" not in result.stdout, "colour codes where nobody asked for them"


def test_help_lists_the_commands():
    for arguments in (("--help",), ("-h",)):
        result = run(*arguments)
        assert result.exit_code == 0
        for command in COMMANDS:
            assert command in result.stdout


def test_no_command_shows_the_help_and_is_a_mistake():
    result = run()
    assert result.exit_code == 2
    assert "Usage: " in result.stdout + result.stderr
    assert "error: " not in result.stderr


def test_version():
    assert run("--version").stdout == f"transfuse {transfuse.__version__}\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nonsense"], ["nonsense"]),
        (["doctor", "--nonsense"], ["--nonsense"]),
        (["doctor", "extra"], ["extra"]),
        (["demo", "--steps", "0"], ["--steps"]),
        (["demo", "--seed", "-1"], ["--seed"]),
        (["demo", "--seed", str(2**64)], ["--seed"]),
        (["demo", "--backend", "opencl"], ["unknown backend 'opencl'", "cuda, triton, torch, reference"]),
        (["demo", "--out", "/proc/nowhere"], ["cannot make the folder /proc/nowhere"]),
        (["generate"], ["MODEL"]),
        (["generate", "m", "--prompt", "a", "--top-k", "many"], ["--top-k"]),
        (["generate", "m", "--prompt", "a", "--top-k", "0"], ["top_k must be a whole number of at least 1, got 0"]),
        (["generate", "m", "--prompt", "a", "--top-p", "1.5"], ["top_p must be above 0 and at most 1, got 1.5"]),
        (["generate", "m", "--prompt", "a", "--temperature", "-1"], ["temperature must be at least 0, got -1"]),
        (["generate", "m", "--prompt", "a", "--temperature", "nan"], ["temperature must be at least 0, got nan"]),
        (["generate", "m", "--prompt", "a", "--max-new-tokens", "0"], ["max_new_tokens"]),
        (["generate", "m", "--prompt", "a", "--repetition-penalty", "0"], ["repetition_penalty must be above 0"]),
        (["generate", "m", "--prompt", "a", "--seed", "-3"], ["--seed"]),
        (["generate", "m", "--prompt", "a", "--seed", str(2**64)], ["--seed"]),
        (["generate", "m", "--prompt", "a", "--backend", "opencl"], ["unknown backend 'opencl'"]),
        (["generate", "m", "--prompt", "a", "--device", "tpu"], ["--device", "'tpu'"]),
        (["generate", "m", "--prompt", "a", "--device", "cuda:99"], ["there is no GPU 99 here"]),
        (["generate", "m", "--prompt", "a", "--dtype", "int8"], ["--dtype", "int8"]),
        (["generate", "m", "--prompt", "a", "--system", "Be brief."], ["--system needs --chat"]),
        (["generate", "m", "--prompt", ""], ["the prompt is empty"]),
        (["generate", "m", "--prompt", "a", "--file", "f"], ["not both"]),
        (["generate", "m", "--file", "/no/such/file"], ["cannot read /no/such/file"]),
        (["generate", "/no/such/model", "--prompt", "a"], ["/no/such/model"]),
        (["generate", "a" * 300, "--prompt", "a"], ["cannot be looked up: File name too long"]),
        (["generate", "~nobody-of-this-name/model", "--prompt", "a"], ["no such file or folder"]),
        (["embed", "/no/such/model", "a"], ["/no/such/model"]),
        (["embed", "m", "a", "--file", "f"], ["not both"]),
        (["embed", "m", " "], ["there is no text"]),
        (["embed", "m", "a", "--format", "xml"], ["--format", "xml"]),
        (["embed", "m", *"abcdefghijklmnopq", "--format", "table"], ["at most 16 texts, got 17"]),
        (["embed", "m", "a", "--pooling", "median"], ["--pooling", "median"]),
        (["embed", "m", "a", "--batch-size", "0"], ["--batch-size"]),
    ],
    ids=lambda value: " ".join(value)[:60] if value and isinstance(value[0], str) else None,
)
def test_a_mistake_is_one_line_and_status_2(arguments, words):
    assert_mistake(run(*arguments), *words)


def test_a_backend_that_cannot_run_is_told_before_the_demo_prints():
    result = shell("demo", "--steps", "1", env=os.environ | {"TRANSFUSE_BACKEND": "nonsense"})
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: unknown backend 'nonsense'")


def test_empty_standard_input_is_a_mistake():
    assert_mistake(run("generate", "m", text=""), "the prompt is empty")
    assert_mistake(run("embed", "m", text="\n \n"), "there is no text")


def test_file_that_is_not_text(tmp_path):
    file = tmp_path / "picture.bin"
    file.write_bytes(b"ab\xff\xfe")
    assert_mistake(run("generate", "m", "--file", str(file)), "is not UTF-8 text: byte 2 is 0xff")


def test_a_folder_is_not_a_prompt(tmp_path):
    assert_mistake(run("generate", "m", "--file", str(tmp_path)), "cannot read", "directory")


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("TRANSFUSE_DEBUG", "1")
    result = run("generate", "/no/such/model", "--prompt", "a")
    assert result.exit_code == 1
    assert isinstance(result.exception, transfuse.TransfuseError)


def test_interrupt_ends_with_130(monkeypatch):
    from transfuse import doctor

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert run("doctor").exit_code == 130


def test_a_bug_is_not_taken_for_a_mistake(monkeypatch):
    from transfuse import doctor

    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "examine", broken)
    result = run("doctor")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_generate_is_greedy_and_repeats(checkpoints):
    arguments = ("generate", checkpoints["decoder"], "--prompt", "to be or", "-n", "12")
    first, second = run(*arguments), run(*arguments)
    assert first.exit_code == 0, first.output
    assert len(first.stdout) == 13
    assert first.stdout == second.stdout == run(*arguments, "--temperature", "0").stdout
    model, tokenizer = (
        transfuse.from_pretrained(checkpoints["decoder"]),
        transfuse.load_tokenizer(checkpoints["decoder"]),
    )
    ids = model.generate(torch.tensor([tokenizer.encode("to be or")]), max_new_tokens=12)
    assert first.stdout == tokenizer.decode(ids[0, 8:]) + "\n"


def test_generate_draws_by_seed(checkpoints):
    arguments = ("generate", checkpoints["decoder"], "-p", "a", "-n", "40", "--temperature", "1.5", "--top-k", "20")
    first = run(*arguments, "--seed", "1")
    assert first.exit_code == 0, first.output
    assert run(*arguments, "--seed", "1").stdout == first.stdout
    assert run(*arguments, "--seed", "2").stdout != first.stdout
    assert len({run(*arguments).stdout for _ in range(3)}) > 1, "without a seed every run draws anew"


def test_prompt_from_option_file_and_standard_input(checkpoints, tmp_path):
    (tmp_path / "prompt.txt").write_text("to be or not\n")
    base = ("generate", checkpoints["decoder"], "-n", "5")
    outputs = [
        run(*base, "--prompt", "to be or not").stdout,
        run(*base, "--file", str(tmp_path / "prompt.txt")).stdout,
        run(*base, text="to be or not\n").stdout,
    ]
    assert len(set(outputs)) == 1
    assert len(outputs[0]) == 6


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_generate_on_a_forced_backend(checkpoints, backend):
    base = ("generate", checkpoints["decoder"], "-p", "abc", "-n", "5")
    assert run(*base, "--backend", backend).stdout == run(*base).stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: triton can run")
def test_generate_on_a_backend_that_cannot_run(checkpoints, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = run("generate", checkpoints["decoder"], "-p", "abc", "-n", "2", "--backend", "triton")
    assert_mistake(result, "backend 'triton' cannot run this call")


def test_generate_with_an_encoder_says_what_to_use(checkpoints):
    result = run("generate", checkpoints["encoder"], "-p", "abc")
    assert_mistake(result, "cannot generate text", "transfuse embed")


def test_chat_without_a_template(checkpoints):
    assert_mistake(run("generate", checkpoints["decoder"], "-p", "abc", "--chat"), "no chat template")


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_embed_writes_one_object_a_text(checkpoints, kind):
    result = run("embed", checkpoints[kind], "a cat", "the law", "a cat")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["a cat", "the law", "a cat"]
    vectors = torch.tensor([row["embedding"] for row in rows])
    assert vectors.shape == (3, 16)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(vectors[0], vectors[2])


def test_embed_reads_lines_and_skips_empty_ones(checkpoints, tmp_path):
    (tmp_path / "texts.txt").write_text("a cat\n\nthe law\n")
    given = run("embed", checkpoints["encoder"], "a cat", "the law").stdout
    assert run("embed", checkpoints["encoder"], "--file", str(tmp_path / "texts.txt")).stdout == given
    assert run("embed", checkpoints["encoder"], text="a cat\n\nthe law\n").stdout == given


def test_embed_table(checkpoints):
    result = run("embed", checkpoints["encoder"], "[red]a cat", "the law", "--format", "table")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "[red]a cat" in lines[1], "texts are not markup"
    assert lines[1].split()[-2] == "1.00"
    assert lines[2].split()[-1] == "1.00"


def test_python_dash_m_runs_the_command(tmp_path):
    result = shell("generate", str(tmp_path), "--prompt", "a", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "transfuse", "doctor"]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert result.returncode == 141
    assert result.stderr == ""


def test_importing_the_package_imports_no_command_line():
    code = "import sys, transfuse; sys.exit(bool({'typer', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_told():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "transfuse", "doctor", "--json"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: cannot go on: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("closed, message", [("<&-", "or pipe text in"), (">&-", "standard output is closed")])
def test_closed_streams_are_told(closed, message):
    command = f"{sys.executable} -m transfuse embed /no/such/model {closed}"
    result = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_what_the_output_cannot_spell_is_replaced(checkpoints):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = shell("embed", checkpoints["encoder"], "na\u00efve", "a", "--format", "table", env=environment)
    assert result.returncode == 0
    assert "na?ve" in result.stdout


def test_the_mark_that_opens_some_utf8_files_is_no_text(checkpoints, tmp_path):
    file = tmp_path / "sentences.txt"
    file.write_bytes(b"\xef\xbb\xbfa cat\n")
    assert json.loads(run("embed", checkpoints["encoder"], "--file", str(file)).stdout)["text"] == "a cat"


def test_text_that_is_not_unicode(checkpoints):
    for command in (["generate", checkpoints["decoder"], "--prompt"], ["embed", checkpoints["encoder"]]):
        assert_mistake(run(*command, "a\udcff"), "not valid Unicode", "character 1")
