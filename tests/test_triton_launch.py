"""What stands around Triton kernels: compiling them ahead, tuning them on request, and how much memory calls take."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import pytest
import torch

import transfuse
from attention_memory import Held, nothing_launched
from conftest import device_of
from transfuse.backends import why_not
from transfuse.errors import ArgumentError, BackendError
from transfuse.ops import _nested, _tuning

CPU = torch.device("cpu")
pytest.importorskip("triton")


# --- compiling ahead ------------------------------------------------------------------------------------------------

AHEAD = """
import doctest, json, sys
import torch, transfuse
from transfuse import ahead
from transfuse.errors import TransfuseError
from triton.runtime import driver

said = {}

def refused(name, *args, **kwargs):
    try:
        transfuse.warmup(*args, **kwargs)
    except TransfuseError as error:
        said[name] = f"{type(error).__name__}: {error}"

x = torch.randn(8, 64)
example = doctest.DocTestFinder().find(ahead.warmup, "warmup", globs={})[0]
for part in example.examples:
    part.options.pop(doctest.SKIP, None)
said["example"] = doctest.DocTestRunner().run(example)

if not torch.cuda.is_available():
    refused("no gpu", transfuse.layer_norm, x, None, None)
refused("no capability", transfuse.layer_norm, x, None, None, target="sm_90")
refused("reads values", lambda x: transfuse.layer_norm(x * x.max().item(), None, None), x, target=(9, 0))
refused("no gradient", transfuse.layer_norm, x, None, None, target=(9, 0), backward=True)
torch.set_autocast_enabled("cuda", True)
refused("autocast", transfuse.layer_norm, x, None, None, target=(9, 0))
torch.set_autocast_enabled("cuda", False)
refused("cuda", transfuse.layer_norm, x, None, None, target=(9, 0), backend="cuda")

torch.manual_seed(0)
sizes = {"vocab_size": 50, "hidden_size": 32, "num_layers": 1, "num_heads": 2}
model = transfuse.Encoder(transfuse.TransformerConfig("encoder", **sizes))
ids = torch.randint(50, (2, 32))
before = [(p.data_ptr(), p.device.type) for p in model.parameters()]
state = torch.get_rng_state()
kernels = transfuse.warmup(model, ids, target=(8, 0), backward=True)
said["model"] = sorted({k.name for k in kernels})
said["capabilities"] = sorted({k.capability for k in kernels})
said["undisturbed"] = (
    before == [(p.data_ptr(), p.device.type) for p in model.parameters()]
    and all(p.grad is None for p in model.parameters())
    and torch.equal(state, torch.get_rng_state())
    and driver._active is None
    and model(ids).last_hidden_state.device.type == "cpu"
)
with transfuse.use_backend("torch"):
    said["torch"] = len(transfuse.warmup(model, ids, target=(8, 0)))

decoder = transfuse.Decoder(transfuse.TransformerConfig("decoder", **sizes)).eval()
with torch.no_grad():
    cache = decoder.new_cache(batch=2, max_length=64)
    decoder(ids, cache=cache)
    said["step"] = len(transfuse.warmup(decoder, ids[:, :1], cache=cache, target=(8, 0)))
said["cache"] = [cache.length, cache.layers[0].keys.device.type]

def twice(x):
    return transfuse.rms_norm(transfuse.rms_norm(x, None), None)

said["once each"] = len(transfuse.warmup(twice, x, target=(9, 0)))
with torch.no_grad():
    wide = torch.empty(8, 80)
    odd = transfuse.warmup(transfuse.rms_norm, wide[:, 1:65], None, target=(9, 0))
    even = transfuse.warmup(transfuse.rms_norm, wide[:, :64], None, target=(9, 0))
    again = transfuse.warmup(transfuse.rms_norm, torch.empty(8, 80, device="meta")[:, :64], None, target=(9, 0))
said["alignment"] = [odd[0].cubin != even[0].cubin, even[0].cubin == again[0].cubin]
json.dump(said, sys.stdout)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What a process without an interpreter says."""
    variables = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    variables.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", AHEAD], capture_output=True, text=True, env=variables, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_example_of_warmup_runs(said):
    failed, attempted = said["example"][:2]
    assert (failed, attempted) == (0, 4)


def test_a_model_is_compiled_with_its_gradients_and_left_alone(said):
    assert said["undisturbed"]
    assert said["capabilities"] == [[8, 0]]
    names = " ".join(said["model"])
    for part in ("attention_forward", "attention_backward", "norm_forward", "norm_backward"):
        assert part in names
    assert said["torch"] == 0
    assert said["step"] > 0
    assert said["cache"] == [32, "cpu"]
    assert said["once each"] == 1


def test_kernels_are_compiled_for_the_alignment_that_calls_have(said):
    assert said["alignment"] == [True, True]


@pytest.mark.parametrize(
    "case, message",
    [
        ("no gpu", "BackendError: warmup: there is no GPU to compile for (name one by its capability"),
        ("no capability", "ArgumentError: warmup: target must be a compute capability such as (9, 0), got 'sm_90'"),
        ("reads values", "ArgumentError: warmup: the function reads values of tensors"),
        ("no gradient", "ArgumentError: warmup: backward=True, but no output depends on"),
        ("autocast", "ArgumentError: warmup: autocast is on"),
        ("cuda", "BackendError: layer_norm: backend 'cuda' cannot run this call: only Triton kernels"),
    ],
)
def test_what_cannot_be_compiled_says_why(said, case, message):
    if case == "no gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert said[case].startswith(message)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's kernels are compiled here")
def test_interpreted_kernels_cannot_be_compiled():
    with pytest.raises(BackendError, match="interpreted in this process"):
        transfuse.warmup(transfuse.layer_norm, torch.ones(2, 4), None, None, target=(9, 0))


def test_without_triton_nothing_is_compiled(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a))
    with pytest.raises(BackendError, match=r"triton is not installed \(pip install triton\)"):
        transfuse.warmup(transfuse.layer_norm, torch.ones(2, 4), None, None, target=(9, 0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_call_after_warmup_compiles_nothing():
    import triton

    q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    call = {"causal": True, "backend": "triton"}
    assert transfuse.warmup(transfuse.attention, q, q, q, backward=True, **call)
    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **facts: compiled.append(facts)
    try:
        out = transfuse.attention(q, q, q, **call)
        out.backward(torch.ones_like(out))
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert not compiled


def test_twins_share_what_their_tensors_share_and_originals_stay():
    layer = torch.nn.Linear(4, 4)
    tied = torch.nn.ModuleList([layer, layer])
    tied.alias = layer.weight
    twin, kept = _nested.without_data((tied, {"w": [layer.weight], "n": 3}))
    assert twin[0] is twin[1]
    assert twin[0].weight is kept["w"][0] is twin.alias
    assert twin[0].weight.is_meta
    assert isinstance(twin[0].weight, torch.nn.Parameter)
    assert kept["n"] == 3
    assert not layer.weight.is_meta
    assert _nested.without_data(layer.forward)(torch.empty(2, 4, device="meta")).is_meta
    strided = torch.empty(6, 8, dtype=torch.float16)[1:, 3::2]
    like = _nested.without_data(strided)
    assert (like.shape, like.stride(), like.dtype) == (strided.shape, strided.stride(), strided.dtype)
    assert like.storage_offset() * 2 == strided.data_ptr() % 16


# --- tuning ---------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    BLOCK: int
    num_warps: int


CHOSEN, FAST, SLOW, BROKEN = Tiles(64, 4), Tiles(32, 4), Tiles(128, 8), Tiles(256, 8)


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "tuning.json"
    monkeypatch.setenv("TRANSFUSE_TUNING", str(path))
    monkeypatch.setattr(_tuning, "_tables", {})
    return path


class Launches:
    """An op whose launches are counted and take as long as their tiles say."""

    def __init__(self, key=(torch.float16, 64, True), candidates=(FAST, SLOW, BROKEN)):
        self.key, self.candidates, self.ran = key, candidates, []

    def __call__(self):
        _tuning.tuned("an_op", self.key, CHOSEN, self.candidates, self.run, CPU)

    def run(self, tiles):
        if tiles == BROKEN:
            from triton.runtime.errors import OutOfResources

            raise OutOfResources(300000, 232448, "shared memory")
        self.ran.append(tiles)
        time.sleep({CHOSEN: 0.01, FAST: 0.002, SLOW: 0.03}[tiles])


def test_nothing_is_measured_without_a_request(file):
    launches = Launches()
    launches()
    launches()
    assert launches.ran == [CHOSEN, CHOSEN]
    assert not file.exists()


def test_the_fastest_is_kept_and_read_by_later_processes(file, monkeypatch):
    launches = Launches()
    (found,) = transfuse.autotune(launches)
    assert (found.op, found.key, found.tiles, found.skipped) == ("an_op", launches.key, FAST, 1)
    assert found.microseconds < found.default_microseconds
    launches.ran.clear()
    launches()
    assert launches.ran == [FAST]
    monkeypatch.setattr(_tuning, "_tables", {})  # as in a later process
    launches.ran.clear()
    launches()
    Launches.__call__(other := Launches(key=(torch.float16, 128, True)))
    assert (launches.ran, other.ran) == ([FAST], [CHOSEN])
    transfuse.autotune(other)
    assert len(json.loads(file.read_text())["devices"].popitem()[1]["an_op"]) == 2
    assert {path.name for path in file.parent.iterdir()} == {"tuning.json", "tuning.json.lock"}


def test_what_the_op_would_not_try_is_not_taken(file, monkeypatch):
    transfuse.autotune(Launches())
    monkeypatch.setattr(_tuning, "_tables", {})
    newer = Launches(candidates=(SLOW,))
    newer()
    assert newer.ran == [CHOSEN]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 7}', '{"format": 1, "devices": {"a": {"b": [1]}}}', "\udc80"]
)
def test_a_damaged_file_is_a_warning(file, content):
    file.parent.mkdir()
    file.write_bytes(content.encode(errors="surrogateescape"))
    launches = Launches()
    with pytest.warns(UserWarning, match=r"tuning.json is left aside, tiles are the default ones"):
        launches()
    launches()
    assert launches.ran == [CHOSEN, CHOSEN]
    with pytest.warns(UserWarning, match="left aside"):
        transfuse.autotune(launches)
    assert json.loads(file.read_text())["format"] == 1


def test_a_file_that_cannot_be_written_is_a_warning(file):
    file.parent.write_text("no folder")
    launches = Launches()
    with pytest.warns(UserWarning, match="lasts for this process only"):
        transfuse.autotune(launches)
    launches.ran.clear()
    launches()
    assert launches.ran == [FAST]


def test_off_keeps_no_file(file, monkeypatch):
    monkeypatch.setenv("TRANSFUSE_TUNING", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file.parent))
    launches = Launches()
    assert transfuse.autotune(launches)[0].tiles == FAST
    assert not file.parent.exists()


def test_the_file_lies_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TRANSFUSE_TUNING")
    monkeypatch.delenv("TRANSFUSE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _tuning._path() == tmp_path / "transfuse" / "tuning.json"


def test_a_choice_that_fails_is_an_error_and_so_is_a_wrong_candidate(file):
    launches = Launches()
    launches.run = lambda tiles: 1 // 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        transfuse.autotune(launches)

    def wrong(tiles):
        if tiles == SLOW:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    launches.run = wrong  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        transfuse.autotune(launches)


def test_other_threads_are_not_measured(file):
    mine, others = Launches(), Launches()

    def both():
        thread = threading.Thread(target=others)
        thread.start()
        thread.join()
        mine()

    transfuse.autotune(both)
    assert others.ran == [CHOSEN]
    assert len(mine.ran) > 3


def test_an_op_is_measured_with_its_gradient(file):
    device = device_of("triton")
    if (reason := why_not("triton", device)) is not None:
        pytest.skip(reason)
    x = torch.randn(4, 48, device=device, requires_grad=True)
    w = torch.randn(48, device=device, requires_grad=True)
    untuned = transfuse.rms_norm(x, w, backend="triton")
    found = transfuse.autotune(transfuse.rms_norm, x, w, backend="triton", backward=True)
    assert {measured.op for measured in found} == {"norm_forward", "norm_backward"}
    assert x.grad is None
    torch.testing.assert_close(transfuse.rms_norm(x, w, backend="triton"), untuned)
    with pytest.raises(ArgumentError, match="backward=True, but no output depends"):
        transfuse.autotune(transfuse.rms_norm, x.detach(), w.detach(), backend="triton", backward=True)


# --- memory ---------------------------------------------------------------------------------------------------------


def held(length: int, variant: str, backward: bool) -> Held:
    """Of attention over so many tokens: beyond its arguments, outputs and gradients included."""
    like = {"device": "meta", "dtype": torch.float16}
    q, k, v = (torch.empty(1, heads, length, 64, **like, requires_grad=True) for heads in (8, 2, 2))
    given: dict[str, object] = {
        "plain": {"causal": True},
        "dropout": {"dropout_p": 0.1},
        "padding": {"mask": torch.empty(1, 1, 1, length, device="meta", dtype=torch.bool)},
        "bias": {"bias": torch.empty(8, 1, length, **like, requires_grad=True)},
        "scores": {
            "alibi_slopes": torch.empty(8, device="meta", requires_grad=True),
            "sinks": torch.empty(8, device="meta", requires_grad=True),
            "softcap": 20.0,
            "window": (128, 0),
        },
        "varlen": {"causal": True},
    }[variant]
    with Held() as held:
        if variant == "varlen":
            bounds = torch.empty(3, device="meta", dtype=torch.int32)
            q, k, v = (t.squeeze(0).transpose(0, 1) for t in (q, k, v))
            out = transfuse.attention_varlen(q, k, v, bounds, bounds, length, length, backend="triton", **given)
        else:
            out = transfuse.attention(q, k, v, backend="triton", **given)
        if backward:
            out.backward(torch.empty_like(out))
    return held


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("variant", ["plain", "dropout", "padding", "bias", "scores", "varlen"])
def test_the_memory_of_attention_grows_with_its_length_and_not_with_its_square(variant, backward, monkeypatch):
    with nothing_launched(monkeypatch.setattr):
        short, long = held(4096, variant, backward), held(16384, variant, backward)
    assert short.height > 4096 * 8 * 64 * 2, "not even the output was counted"
    assert long.height <= 4.1 * short.height
    assert long.largest <= 16384 * 8 * 64 * 4, "larger than the output in fp32"


def test_the_counter_sees_a_square():
    def scores(length):
        with Held() as held:
            q = torch.empty(length, 64, device="meta", requires_grad=True)
            torch.softmax(q @ q.T, -1).sum().backward()
        return held

    assert scores(1024).height >= 2 * 1024**2 * 4  # the probabilities and their gradient
    assert scores(4096).height >= 15 * scores(1024).height
