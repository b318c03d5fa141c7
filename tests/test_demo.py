"""The demo: every op checked, a model that learns, pictures, and status 1 when an op is wrong."""

from __future__ import annotations

import math
import re
import socket

import pytest
import torch
from typer.testing import CliRunner

from transfuse import demo, ops, weights
from transfuse.cli import app
from transfuse.demo import checks
from transfuse.demo.cases import cases
from transfuse.demo.shakespeare import (
    Corpus,
    Recipe,
    attention_maps,
    far_sighted_head,
    make_model,
    sample,
    train,
    uniform_loss,
)
from transfuse.demo.threads import Threads
from transfuse.errors import ArgumentError

CPU = torch.device("cpu")
OPS = [
    "attention", "attention_varlen", "attention_decode", "attention_weights", "scaled_dot_product_attention",
    "causal_softmax", "layer_norm", "rms_norm", "ffn", "linear_act",
]  # fmt: skip
SMALL = Recipe(steps=60, batch=8, length=32, hidden_size=64)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


@pytest.fixture
def quick(monkeypatch):
    """Times are taken once, which is enough to see that they are printed."""
    monkeypatch.setattr(checks, "_SECONDS", 0.0)
    monkeypatch.setattr(checks, "_ROUNDS", (1, 1))


def test_demo_runs_without_a_network(quick, monkeypatch, tmp_path):
    def refuse(*args):
        raise AssertionError("the demo asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    result = CliRunner().invoke(app, ["demo", "--steps", "5", "--out", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "backend: " in result.stdout
    for op in OPS:
        row = next(line for line in lines if line.startswith(f"{op} "))
        assert re.search(r"\de-\d+ ≤ \de-\d+ +\de-\d+ ≤ \de-\d+ +[\d.]+ +[\d.]+$", row.strip()), row
    assert "tokens/s" in result.stdout
    assert "validation loss" in result.stdout
    assert "MACBETH." in result.stdout
    for name in ("transfuse-attention.png", "transfuse-attention-heads.png"):
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")
        assert name in result.stdout
    assert "every op is within its budget" in result.stdout


def test_a_wrong_op_ends_with_status_1(quick, monkeypatch, tmp_path):
    right = ops.rms_norm

    def wrong(x, weight, *, residual, backend=None):
        y, summed = right(x, weight, residual=residual, backend=backend)
        return (y, summed) if backend == "reference" else (y * (1 + 1e-5), summed)

    monkeypatch.setattr(ops, "rms_norm", wrong)
    norms = [case for case in cases(CPU, torch.float32, seed=0) if case.name in ("layer_norm", "rms_norm")]
    monkeypatch.setattr(demo, "cases", lambda *_: norms)
    result = CliRunner().invoke(app, ["demo", "--steps", "1", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert re.search(r"rms_norm: error \S+ exceeds the budget \S+", result.stdout)
    assert "layer_norm: error" not in result.stdout
    assert "an op exceeds its error budget" in result.stdout


def test_a_wrong_gradient_is_seen():
    case = next(c for c in cases(CPU, torch.float32, seed=0) if c.name == "linear_act")

    def op(t, backend):
        out = case.op(t, backend)
        return out if backend else out + (0.0001 * (t["b"] - t["b"].detach()))

    result = checks.run_case(checks.Case(case.name, case.shape, case.tensors, op, case.torch_op, case.output_shape))
    assert result.forward.ok
    assert not result.backward.ok
    assert not result.ok


def test_every_op_has_a_case_and_torch_agrees():
    found = list(cases(CPU, torch.float32, seed=3))
    assert [case.name for case in found] == OPS
    assert set(OPS) == {name for name in ops.__all__ if name in OPS}, "an op without a case"
    for case in found:
        torch.testing.assert_close(case.op(case.tensors, None), case.torch_op(case.tensors), rtol=1e-4, atol=1e-4)
        assert case.op(case.tensors, None).shape == case.output_shape


@pytest.mark.parametrize("dtype, seed", [(torch.float32, 1), (torch.bfloat16, 0)], ids=["fp32", "bf16"])
def test_ops_are_within_their_budgets(quick, dtype, seed):
    bad = [result for case in cases(CPU, dtype, seed) if not (result := checks.run_case(case)).ok]
    assert not bad


def test_worst_error_is_found_and_nan_is_over_every_budget():
    truth = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    exact = truth.float()
    assert checks._worst([exact], [truth], [exact]).ok
    assert not checks._worst([exact + torch.tensor([0, 1e-4, 0])], [truth], [exact]).ok
    nan = checks._worst([exact, torch.full((3,), math.nan)], [truth, truth], [exact, exact])
    assert math.isnan(nan.error)
    assert not nan.ok
    assert checks._worst([exact + torch.tensor([0, 1e-4, 0])], [truth], [exact + torch.tensor([1e-4, 0, 0])]).ok


def test_corpus_is_the_plays_and_nothing_else(corpus):
    text = corpus.decode(torch.cat([corpus.train, corpus.validation]).tolist())
    assert len(text) == 907_266
    assert text.startswith("FIRST WITCH.\nWhen shall we three meet again?\n")
    assert "Is this a dagger which I see before me" in text
    assert text.isascii()
    for word in ("gutenberg", "copyright", "etext", "http", "*", "["):
        assert word not in text.lower()
    assert not re.search(r"^(ACT|SCENE) [IVX]+", text, re.MULTILINE)
    assert corpus.encode("O Romeo") == [corpus.characters.index(c) for c in "O Romeo"]


def test_corpus_refuses_what_it_cannot_spell(corpus):
    with pytest.raises(ArgumentError, match="no character '5'"):
        corpus.encode("O 5")


def trained(corpus, seed: int):
    torch.manual_seed(seed)
    model = make_model(SMALL, corpus, CPU)
    progress = []
    with Threads() as threads:
        loss, speed = train(model, corpus, SMALL, seed, threads, progress.append)
    return model, loss, speed, progress


def test_training_learns_and_repeats_by_seed(corpus):
    model, loss, speed, progress = trained(corpus, 0)
    assert [p.step for p in progress] == list(range(1, 61))
    assert sum(p.validation_loss is not None for p in progress) == 10
    assert progress[0].loss > 3.9
    assert loss < 3.1 < uniform_loss(corpus)
    assert speed > 0
    again, same_loss, _, same_progress = trained(corpus, 0)
    assert same_loss == loss
    assert [p.loss for p in same_progress] == [p.loss for p in progress]
    assert trained(corpus, 1)[1] != loss
    first = "".join(sample(model, corpus, "MACBETH.\n", 100, 0.8, seed=0))
    assert len(first) == 100, "longer than the training length"
    assert "".join(sample(again, corpus, "MACBETH.\n", 100, 0.8, seed=0)) == first
    assert "".join(sample(model, corpus, "MACBETH.\n", 100, 0.8, seed=1)) != first


def test_threads_follow_what_is_faster_at_the_moment():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cost, used = {1: 1.0, 2: 0.7}, []
        with Threads(window=3, retry=10) as threads:
            for step in range(120):
                if step == 60:  # the machine gets busy
                    cost = {1: 1.0, 2: 5.0}
                used.append(torch.get_num_threads())
                threads.step(cost[used[-1]])
        assert used[:6] == [1, 1, 1, 2, 2, 2]
        assert used[6:60].count(2) > 45
        assert used[64:].count(1) > 45
        assert used[64:].count(2) > 0, "it tries again"
        assert torch.get_num_threads() == 2, "the setting is restored"
    finally:
        torch.set_num_threads(before)


def test_attention_maps_are_causal_probabilities(corpus):
    maps = attention_maps(make_model(SMALL, corpus, CPU), corpus, "To be, or not")
    assert maps.shape == (2, 4, 13, 13)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 13))
    assert maps.triu(1).abs().max() == 0
    layer, head = far_sighted_head(maps)
    assert 0 <= layer < 2
    assert 0 <= head < 4


def test_recipe_refuses_no_steps():
    with pytest.raises(ArgumentError, match="steps must be at least 1, got 0"):
        Recipe(steps=0)


@pytest.mark.slow
@pytest.mark.skipif(
    not (weights.is_cached("minilm") and weights.is_cached("smollm2")),
    reason="MiniLM and SmolLM2 are not in the cache: run `transfuse demo --weights` once",
)
def test_demo_with_real_weights(quick, tmp_path):
    result = CliRunner().invoke(app, ["demo", "--weights", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if re.match(r" *[1-5]  ", line)}
    similarity = {int(number): [float(cell) for cell in row[-5:]] for number, row in rows.items()}
    assert similarity[1][1] > 0.4 > 0.2 > similarity[1][2], "paraphrases are alike, strangers are not"
    assert similarity[3][3] > 0.4 > 0.2 > similarity[3][4]
    assert "scatter" in result.stdout.lower() or "light" in result.stdout.lower()
    assert (tmp_path / "transfuse-attention-minilm.png").exists()
