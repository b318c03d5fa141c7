"""The choice of a backend: order, forcing, threads, reasons, logging, and what importing costs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

import transfuse
from transfuse.backends import BackendStatus, _logged, _process, choose, forced, why_not
from transfuse.errors import BackendError

CPU = torch.device("cpu")


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The code in a fresh interpreter, with the environment variables added."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )


def test_cpu_tensors_take_torch():
    assert choose("op", CPU, None, lambda b: None) == "torch"


def test_argument_beats_with_beats_process():
    transfuse.use_backend("torch")
    assert forced() == "torch"
    with transfuse.use_backend("reference"):
        assert choose("op", CPU, None, lambda b: None) == "reference"
        assert choose("op", CPU, "torch", lambda b: None) == "torch"
        with transfuse.use_backend(None):
            assert forced() is None
        assert forced() == "reference"
    assert forced() == "torch"
    transfuse.use_backend(None)
    assert forced() is None


def test_with_block_is_for_its_thread_alone():
    seen = []
    with transfuse.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(forced()))
        thread.start()
        thread.join()
    transfuse.use_backend("reference")
    thread = threading.Thread(target=lambda: seen.append(forced()))
    thread.start()
    thread.join()
    assert seen == [None, "reference"]


def test_with_blocks_that_open_at_a_time_leave_nothing_behind():
    """As when two threads do so: both are made before either is entered."""
    first, second = transfuse.use_backend("reference"), transfuse.use_backend("torch")
    for block in (first, second):
        block.__enter__()
    for block in (second, first):
        block.__exit__(None, None, None)
    assert forced() is None


def test_many_plain_calls_leave_the_last():
    for name in ("reference", "torch") * 100:
        transfuse.use_backend(name)
    assert forced() == "torch"
    assert len(_process) <= 64
    transfuse.use_backend(None)
    assert forced() is None


def test_with_block_may_be_entered_again():
    block = transfuse.use_backend("reference")
    with block, block:
        assert forced() == "reference"
    with block:
        assert forced() == "reference"
    assert forced() is None


def test_with_block_restores_after_an_error():
    with pytest.raises(ZeroDivisionError), transfuse.use_backend("reference"):
        _ = 1 / 0
    assert forced() is None


def test_unknown_name_lists_the_known():
    with pytest.raises(BackendError, match="unknown backend 'gpu': expected one of cuda, triton, torch, reference"):
        transfuse.use_backend("gpu")


def test_forced_backend_names_reason_and_remedy(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=r"op: backend 'triton' cannot run this call: .*CUDA tensors.*\(move the"):
        choose("op", CPU, "triton", lambda b: None)
    with pytest.raises(BackendError, match="no kernel for it"):
        choose("op", CPU, "torch", lambda b: "no kernel for it")


def test_environment_variable_forces():
    code = "import torch, transfuse; transfuse.layer_norm(torch.ones(2, 4), None, None)"
    assert run_python(code, TRANSFUSE_BACKEND="reference").returncode == 0
    wrong = run_python(code, TRANSFUSE_BACKEND="cudda")
    assert "unknown backend 'cudda'" in wrong.stderr
    if not torch.cuda.is_available():
        assert (
            "BackendError: layer_norm: backend 'cuda' cannot run" in run_python(code, TRANSFUSE_BACKEND="cuda").stderr
        )


def test_automatic_choice_is_logged_once(caplog):
    _logged.clear()
    with caplog.at_level(logging.INFO, logger="transfuse"):
        for _ in range(3):
            transfuse.layer_norm(torch.ones(2, 4), None, None)
    assert [r.getMessage() for r in caplog.records] == ["layer_norm runs on torch (the tensors are on the CPU)"]


def test_status_of_every_backend():
    found = transfuse.backends()
    assert [b.name for b in found] == ["cuda", "triton", "torch", "reference"]
    for status in found:
        assert isinstance(status, BackendStatus)
        assert status.usable == (status.reason is None)
        assert (status.reason is None) == (status.remedy is None)
    assert found[2].usable


def test_compiled_code_follows_the_choice():
    def norm(x):
        return transfuse.layer_norm(x, None, None)

    compiled = torch.compile(norm, fullgraph=True, backend="eager")
    x = torch.randn(3, 8)
    torch.testing.assert_close(compiled(x), norm(x))
    with transfuse.use_backend("reference"):
        torch.testing.assert_close(compiled(x), norm(x))
    if why_not("triton", CPU) is None:  # interpreted
        with transfuse.use_backend("triton"):
            torch.testing.assert_close(compiled(x), norm(x))
    else:
        with pytest.raises(Exception, match=r"CUDA tensors|not installed"), transfuse.use_backend("triton"):
            compiled(x)


# --- importing ------------------------------------------------------------------------------------------------------


def test_import_brings_nothing_heavy():
    code = (
        "import sys, transfuse, torch; heavy = {'triton', 'transformers', 'matplotlib', 'tokenizers', 'safetensors',"
        " 'typer', 'rich', 'huggingface_hub', 'gguf'} & set(sys.modules); assert not heavy, heavy;"
        "assert not torch.cuda.is_initialized()"
    )
    before = run_python("import sys, torch; print({'triton'} & set(sys.modules))").stdout
    done = run_python(code)
    assert done.returncode == 0 or "triton" in before, done.stderr


def test_import_costs_little_over_torch():
    # CPU seconds: the clock on the wall counts what other processes do meanwhile
    code = "import time, torch; a = time.process_time(); import transfuse; print(time.process_time() - a)"
    assert min(float(run_python(code).stdout) for _ in range(3)) <= 0.3


def test_import_needs_no_network_and_no_gpu_and_survives_fork():
    code = """
import os, socket
socket.socket.connect = lambda *a: (_ for _ in ()).throw(AssertionError("network"))
import torch, transfuse
x = torch.randn(4, 16)
expected = transfuse.layer_norm(x, None, None)
pid = os.fork()
if pid == 0:
    os._exit(0 if torch.equal(transfuse.layer_norm(x, None, None), expected) else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    done = run_python(code, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr


def test_two_threads_get_what_one_gets():
    x = torch.randn(64, 32)
    w = torch.randn(32, requires_grad=True)
    expected = transfuse.layer_norm(x, w, None).detach()
    wrong = []

    def work():
        for _ in range(50):
            y = transfuse.layer_norm(x, w, None)
            y.sum().backward()
            if not torch.equal(y.detach(), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert dir(transfuse) == sorted(transfuse.__all__)
    with pytest.raises(AttributeError, match="no attribute 'attenton'"):
        _ = transfuse.attenton
