"""The commands of the tasks: what each prints as text and as JSON lines, the same as the task gives; their mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

import transfuse
from test_cli import assert_mistake, run
from transfuse import tasks
from transfuse.models import MaskedLM, SequenceClassifier, SpanClassifier, TokenClassifier
from transfuse.models.tokenizer import Tokenizer, TokenizerSettings

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [
    "[PAD]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[UNK]",
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "who",
    "where",
    *"bcdefgh",
]


def tokenizer() -> Tokenizer:
    """One token a word, in BERT's frame."""
    backend = Backend(tokenizer_models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(WORDS[:5])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    roles = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "unk": "[UNK]"}
    return Tokenizer(backend, TokenizerSettings(roles))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder for each kind of model, with the same tokenizer."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "num_layers": 2, "num_heads": 2, "initializer_range": 0.5}
    plain = transfuse.TransformerConfig("encoder", **sizes)
    pooled = transfuse.TransformerConfig("encoder", **sizes, pooler=True)
    both = transfuse.TransformerConfig("encoder_decoder", **sizes, decoder_start_token_id=1, eos_token_id=2)
    models = {
        "classify": SequenceClassifier(pooled, 3),
        "token-classify": TokenClassifier(plain, 2),
        "answer": SpanClassifier(plain),
        "fill-mask": MaskedLM(plain),
        "seq2seq": transfuse.Seq2Seq(both),
        "encoder": transfuse.Encoder(plain),
        "decoder": transfuse.Decoder(transfuse.TransformerConfig("decoder", **sizes)),
    }
    models["classify"].labels = ("bad", "fair", "good")
    models["token-classify"].labels = ("B-X", "Y")
    models["seq2seq"].task_settings = {
        "task_specific_params": {
            "summarization": {"prefix": "the cat ", "max_length": 4, "early_stopping": True},
            "translation_a_to_b": {"prefix": "who ", "max_length": 5, "num_beams": 2},
            "translation_a_to_c": {"prefix": "where "},
        }
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    return {name: str(root / name) for name in models}


def loaded(folder: str) -> tuple:
    return transfuse.from_pretrained(folder), transfuse.load_tokenizer(folder)


def rows(*arguments: str, text: str | None = None) -> list[list[str]]:
    result = run(*arguments, text=text)
    assert result.exit_code == 0, result.output + result.stderr
    return [line.split("\t") for line in result.stdout.splitlines()]


def objects(*arguments: str) -> list[dict]:
    return [json.loads(line[0]) for line in rows(*arguments, "--format", "jsonl")]


TEXTS = ("the cat sat", "a mat", "who sat on the mat")


def test_classify(checkpoints, tmp_path):
    expected = tasks.classify(*loaded(checkpoints["classify"]), TEXTS, top_k=2)
    got = rows("classify", checkpoints["classify"], *TEXTS, "--top-k", "2")
    assert got == [
        [e.label, f"{e.score:.4f}", text] for text, found in zip(TEXTS, expected, strict=True) for e in found
    ]
    assert {row[0] for row in got} <= {"bad", "fair", "good"}
    (tmp_path / "texts").write_text("\n\n".join(TEXTS))
    assert rows("classify", checkpoints["classify"], "--file", str(tmp_path / "texts"), "--top-k", "2") == got
    assert rows("classify", checkpoints["classify"], "--top-k", "2", text="\n".join(TEXTS)) == got
    found = objects("classify", checkpoints["classify"], *TEXTS, "--multi-label")
    assert [row["text"] for row in found] == list(TEXTS)
    one = tasks.classify(*loaded(checkpoints["classify"]), TEXTS, multi_label=True)
    assert [row["labels"][0]["score"] for row in found] == pytest.approx([labels[0].score for labels in one])


def test_token_classify(checkpoints):
    folder = checkpoints["token-classify"]
    expected = tasks.token_classify(*loaded(folder), TEXTS)
    got = rows("token-classify", folder, *TEXTS)
    assert [(int(n), label, int(start), int(end), text) for n, label, _, start, end, text in got] == [
        (n, e.label, e.start, e.end, e.text) for n, entities in enumerate(expected, 1) for e in entities
    ]
    assert len(rows("token-classify", folder, *TEXTS, "--each")) == sum(len(text.split()) for text in TEXTS)
    found = objects("token-classify", folder, *TEXTS)
    assert [[e["start"] for e in row["entities"]] for row in found] == [[e.start for e in row] for row in expected]


def test_answer(checkpoints, tmp_path):
    folder, context = checkpoints["answer"], "the cat sat on a mat\nwhere the cat sat"
    expected = tasks.answer(*loaded(folder), ["who", "where"], context, top_k=2)
    (tmp_path / "context").write_text(context)
    for given in (["--context", context], ["--file", str(tmp_path / "context")]):
        got = rows("answer", folder, "who", "where", *given, "--top-k", "2")
        assert [(int(n), int(start), int(end), text) for n, _, start, end, text in got] == [
            (n, a.start, a.end, " ".join(a.text.split())) for n, answers in enumerate(expected, 1) for a in answers
        ]
    found = objects("answer", folder, "who", "--context", context, "--no-answer", "--top-k", "3")
    assert found[0]["question"] == "who"
    assert [a["text"] for a in found[0]["answers"]] == [
        a.text for a in tasks.answer(*loaded(folder), "who", context, top_k=3, no_answer=True)[0]
    ]


def test_fill_mask(checkpoints):
    folder, text = checkpoints["fill-mask"], "the [MASK] sat on [MASK] mat"
    expected = tasks.fill_mask(*loaded(folder), text, top_k=2)[0]
    got = rows("fill-mask", folder, text, "--top-k", "2")
    assert got == [["1", str(n), f"{f.score:.4f}", f.token, f.text] for n, gap in enumerate(expected, 1) for f in gap]
    found = objects("fill-mask", folder, text, "--target", "cat", "--target", "mat")[0]["gaps"]
    assert {filling["token"] for gap in found for filling in gap} == {"cat", "mat"}


def test_translate_and_summarize_as_the_checkpoint_says(checkpoints, tmp_path):
    folder = checkpoints["seq2seq"]
    model, tokens = loaded(folder)
    expected = tasks.generate(model, tokens, [f"who {text}" for text in TEXTS], max_length=5, num_beams=2)
    languages = ("--source", "a", "--target", "b")
    assert rows("translate", folder, *TEXTS, *languages) == [[text] for text in expected]
    found = objects("translate", folder, *TEXTS, *languages)
    assert found == [{"text": t, "translation": e} for t, e in zip(TEXTS, expected, strict=True)]
    two = objects("translate", folder, TEXTS[0], *languages, "--num-beams", "3", "--knob", "num_return_sequences=2")
    assert len(two[0]["translation"]) == 2
    (tmp_path / "one").write_text("who sat\non the mat\n")
    expected = tasks.generate(model, tokens, "the cat who sat\non the mat", max_length=4, early_stopping=True)
    for given in (["--file", str(tmp_path / "one")], ["who sat\non the mat"]):
        assert rows("summarize", folder, *given) == [[text] for text in expected]
    longer = tasks.generate(model, tokens, "the cat who sat\non the mat", max_new_tokens=7)
    assert rows("summarize", folder, "-n", "7", text="who sat\non the mat\n") == [[text] for text in longer]
    assert rows("summarize", folder, "who", "--prefix", "a ", "-n", "6") == [
        [text] for text in tasks.generate(model, tokens, "a who", max_new_tokens=6)
    ]


def test_generate_with_beams_and_any_knob(checkpoints):
    folder = checkpoints["decoder"]
    expected = tasks.generate(*loaded(folder), "the cat", max_new_tokens=6, num_beams=3, num_return_sequences=2)
    knobs = ("--knob", "num_beams=3", "--knob", "num_return_sequences=2", "-n", "6")
    assert run("generate", folder, "-p", "the cat", *knobs).stdout == "\n".join(expected) + "\n"
    stopped = run("generate", folder, "-p", "the cat", "-n", "6", "--knob", 'stop_strings=[" "]')
    assert stopped.exit_code == 0, stopped.output


def test_generate_several_drawn_texts(checkpoints):
    folder = checkpoints["decoder"]
    knobs = {"max_new_tokens": 4, "temperature": 0.8, "num_return_sequences": 3}
    expected = tasks.generate(*loaded(folder), "the cat", generator=torch.Generator().manual_seed(2), **knobs)
    options = ("-n", "4", "--temperature", "0.8", "--knob", "num_return_sequences=3", "--seed", "2")
    assert run("generate", folder, "-p", "the cat", *options).stdout == "\n".join(expected) + "\n"


def test_count(checkpoints):
    assert rows("count", checkpoints["encoder"], *TEXTS) == [
        ["5", TEXTS[0]], ["4", TEXTS[1]], ["7", TEXTS[2]], ["16", "total"],
    ]  # fmt: skip
    assert rows("count", checkpoints["encoder"], TEXTS[0], "--no-special") == [["3", TEXTS[0]]]
    assert objects("count", checkpoints["encoder"], "a") == [{"text": "a", "tokens": 3}]


@pytest.mark.parametrize("ending, head", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_attention_draws(checkpoints, tmp_path, ending, head):
    for name, options in [
        ("encoder", ["--layer", "2", "--head", "1"]),
        ("decoder", ["--layer", "1"]),
        ("seq2seq", ["--target", "a mat"]),
        ("seq2seq", ["--kind", "encoder", "--layer", "1", "--head", "2"]),
    ]:
        file = tmp_path / "new" / f"{name}{len(options)}.{ending}"
        result = run("attention", checkpoints[name], "the cat sat", *options, "-o", str(file))
        assert (result.exit_code, result.stdout) == (0, f"{file}\n"), result.output + result.stderr
        assert file.read_bytes().startswith(head)


@pytest.mark.parametrize(
    "command, arguments, words",
    [
        ("classify", ["ENCODER", "a"], ["expected a model of kind SequenceClassifier, got Encoder", "task="]),
        ("token-classify", ["CLASSIFY", "a"], ["expected a model of kind TokenClassifier, got SequenceClassifier"]),
        ("answer", ["ENCODER", "who", "--context", "a"], ["expected a model of kind SpanClassifier, got Encoder"]),
        ("answer", ["ANSWER", " ", "--context", "a"], ["every question must hold a word"]),
        ("answer", ["ANSWER", "who", "--context", " "], ["the text is empty; give --context"]),
        ("answer", ["ANSWER", "who", "--context", "a", "--file", "f"], ["give --context or --file, not both"]),
        ("answer", ["ANSWER"], ["QUESTION"]),
        ("fill-mask", ["FILL-MASK", "a cat"], ["every text must hold the gap [MASK], texts[0] is 'a cat'"]),
        ("fill-mask", ["FILL-MASK", "[MASK]", "--target", "zebra"], ["'zebra' is [UNK]"]),
        ("fill-mask", ["ENCODER", "[MASK]"], ["expected a model of kind MaskedLM, got Encoder"]),
        ("translate", ["DECODER", "a"], ["expected a model of kind Seq2Seq, got Decoder"]),
        ("translate", ["SEQ2SEQ", "a"], ["the checkpoint translates a_to_b, a_to_c; got source None"]),
        ("translate", ["SEQ2SEQ", "a", "--target", "d", "--source", "a"], ["got source 'a' and target 'd'"]),
        ("translate", ["m", "a", "--knob", "beams=3"], ["unknown argument 'beams'; did you mean 'num_beams'"]),
        ("translate", ["m", "a", "--knob", "num_beams"], ["--knob: expected NAME=VALUE, each name once"]),
        ("translate", ["m", "a", "--knob", "num_beams=0"], ["num_beams must be a whole number of at least 1, got 0"]),
        ("summarize", ["m", "a", "--file", "f"], ["not both"]),
        ("summarize", ["m", "--file", "/no/such/file"], ["cannot read /no/such/file"]),
        ("summarize", ["DECODER", "a"], ["expected a model of kind Seq2Seq, got Decoder"]),
        ("count", ["m", " "], ["there is no text"]),
        ("count", ["/no/such/model", "a"], ["/no/such/model"]),
        ("attention", ["m", "a", "-o", "map.doc"], ["must end in .png, .svg or .pdf, got 'map.doc'"]),
        ("attention", ["m", "a", "--head", "1"], ["--head needs --layer"]),
        ("attention", ["m", "a", "--layer", "0"], ["--layer"]),
        ("attention", ["ENCODER", "a", "--layer", "9"], ["layer must be from 1 to 2, got 9"]),
        ("attention", ["ENCODER", "a", "--layer", "1", "--head", "3"], ["head must be from 1 to 2, got 3"]),
        ("attention", ["ENCODER", "a", "--kind", "cross"], ["has encoder attention, not cross"]),
        ("attention", ["ENCODER", "a", "--target", "b"], ["target needs an encoder-decoder"]),
        ("attention", ["ENCODER", "a", "--layer", "1", "-o", "/proc/no/map.png"], ["cannot go on"]),
        ("generate", ["ENCODER", "-p", "a"], ["cannot generate text"]),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else value,
)  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(checkpoints, command, arguments, words):
    given = [checkpoints.get(argument.lower(), argument) if argument.isupper() else argument for argument in arguments]
    assert_mistake(run(command, *given), *words)


def test_a_tokenizer_of_another_model(checkpoints, tmp_path):
    transfuse.Decoder(transfuse.TransformerConfig("decoder", 7, 16, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path
    )
    tokenizer().save_pretrained(tmp_path)
    result = run("generate", str(tmp_path), "-p", "a")
    assert_mistake(result, f"gives ids up to {len(WORDS) - 1}, the model's vocabulary has 7 tokens")


@pytest.mark.parametrize("arguments", [["--help"], ["embed", "--help"]], ids=" ".join)
def test_help_to_a_closed_pipe_is_quiet(arguments):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "transfuse", *arguments]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


def heed_interrupts():
    """For a child process: one that was started in the background of a shell would inherit that they are ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("command", [["-m", "transfuse"], ["transfuse"]], ids=["module", "script"])
def test_interrupt_while_torch_is_imported_leaves_no_traceback(tmp_path, command):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "transfuse").write_text("from transfuse.cli import main\nmain()\n")
    package = str(Path(transfuse.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{package}"}
    process = subprocess.Popen(
        [sys.executable, *command, "--help"], cwd=tmp_path if command == ["transfuse"] else None, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == -signal.SIGINT, "the shell's name for this is 130"


def test_importing_the_package_leaves_interrupts_alone():
    code = "import signal, transfuse; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    done = subprocess.run([sys.executable, "-c", code], check=False, preexec_fn=heed_interrupts)
    assert done.returncode == 0
