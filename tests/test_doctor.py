"""The doctor: what it knows, what it says about broken machines, and that it never fails itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from transfuse import _extension, doctor
from transfuse.backends import NAMES, backends
from transfuse.cli import app

GPU = {"index": 0, "name": "NVIDIA [H100]", "capability": "9.0", "memory_bytes": 80 * 2**30, "multiprocessors": 132}


@pytest.fixture(scope="module")
def report() -> dict:
    return doctor.examine()


def shown(report: dict) -> str:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    doctor.show(report, console)
    return console.file.getvalue()


def shell(**environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    command = [sys.executable, "-m", "transfuse", "doctor"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=variables)


def test_json_has_every_part(report):
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == json.loads(json.dumps(report)), "the same facts twice, and all of them plain data"
    assert set(printed) == {
        "versions", "cpu", "gpus", "no_gpu", "extension", "triton", "backends", "chosen", "environment",
    }  # fmt: skip
    assert [backend["name"] for backend in printed["backends"]] == list(NAMES)
    for backend in printed["backends"]:
        assert set(backend) == {"name", "usable", "reason", "remedy", "tested"}
        assert (backend["reason"] is None) == backend["usable"]
    assert printed["versions"]["torch"] == torch.__version__
    assert printed["cpu"]["threads"] == torch.get_num_threads()
    assert set(printed["chosen"]) == {"backend", "device", "why", "problem"}
    assert bool(printed["gpus"]) == (printed["no_gpu"] is None) == torch.cuda.is_available()


def test_torch_and_reference_are_tried_out(report):
    tested = {backend["name"]: backend["tested"] for backend in report["backends"]}
    assert tested["torch"] is True
    assert tested["reference"] is True
    assert doctor.healthy(report)


def test_show_names_everything(report):
    text = shown(report)
    for word in (*NAMES, "GPU", "CPU", "CUDA extension", "versions", torch.__version__):
        assert word in text
    for backend in report["backends"]:
        if not backend["usable"]:
            assert backend["reason"] in text


def test_reasons_come_with_a_remedy(report):
    for backend in report["backends"]:
        if not backend["usable"]:
            said = f"{backend['reason']} {backend['remedy'] or ''}"
            assert any(verb in said for verb in ("install", "set ", "move ", "update ", "use ", "unset")), said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_says_why(report):
    assert report["chosen"]["backend"] == "torch"
    assert "CUDA" in report["no_gpu"] or "driver" in report["no_gpu"]


def test_gpus_are_described(report):
    text = shown({**report, "gpus": [GPU], "no_gpu": None})
    assert "NVIDIA [H100], capability 9.0, 80.0 GiB, 132 multiprocessors" in text


def test_backend_that_computes_wrongly_is_broken(report):
    statuses = [
        {**b, "tested": "layer_norm is wrong by 1e-1"} if b["name"] == "torch" else b for b in report["backends"]
    ]
    broken = {**report, "backends": statuses}
    assert not doctor.healthy(broken)
    assert "broken" in shown(broken)
    assert "layer_norm is wrong by 1e-1" in shown(broken)


def test_backend_that_raises_is_reported_and_not_raised(monkeypatch):
    def explode(*args, **kwargs):
        raise RuntimeError("CUDA error: the launch failed\nsecond line")

    monkeypatch.setattr(doctor.ops, "layer_norm", explode)
    report = doctor.examine()
    assert not doctor.healthy(report)
    tested = {backend["name"]: backend["tested"] for backend in report["backends"]}
    assert tested["torch"] == "layer_norm failed: RuntimeError: CUDA error: the launch failed"


def test_a_fact_that_cannot_be_had_says_why(monkeypatch):
    def explode():
        raise OSError("no such device")

    for name in ("_driver", "_nvcc", "_gpus", "backends"):
        monkeypatch.setattr(doctor, name, explode)
    monkeypatch.setattr(_extension, "info", explode)
    report = doctor.examine()
    assert report["versions"]["nvcc"] == "unknown (OSError: no such device)"
    assert report["no_gpu"] == "unknown (OSError: no such device)"
    assert [b["usable"] for b in report["backends"]] == [False, False, True, True]
    assert "no such device" in shown(report)


def test_without_triton_it_says_how_to_get_it(monkeypatch):
    find, version = importlib.util.find_spec, importlib.metadata.version

    def version_without(name):
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "triton" else find(n, *a))
    monkeypatch.setattr(importlib.metadata, "version", version_without)
    report = doctor.examine()
    triton = next(backend for backend in report["backends"] if backend["name"] == "triton")
    assert not triton["usable"]
    assert triton["remedy"] == "pip install triton"
    assert report["versions"]["triton"] is None
    assert "not there" in shown(report)


def test_triton_is_described(report, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    facts = report["triton"]
    assert facts["version"] == importlib.metadata.version("triton")
    assert facts["interpreted"] is (os.environ.get("TRITON_INTERPRET") == "1")
    assert os.access(facts["ptxas"], os.X_OK)
    tool = tmp_path / "ptxas"
    tool.touch(mode=0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tool))
    monkeypatch.setenv("TRITON_INTERPRET", "true")
    found = {b.name: b for b in backends()}["triton"]
    assert (found.facts["ptxas"], found.facts["interpreted"]) == (str(tool), True)
    assert found.usable
    assert "interpreted on the CPU" in shown({**report, "triton": found.facts})
    assert "nothing can be compiled" in shown({**report, "triton": {**facts, "ptxas": None}})


def test_nvcc_is_found_on_path_and_its_version_read(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._nvcc() == f"13.0.88 ({nvcc})"


@pytest.mark.parametrize("name, word", [("opencl", "is not a backend"), ("triton", "triton")])
def test_a_forced_backend_that_cannot_run_ends_with_status_1(name, word):
    if name == "triton" and torch.cuda.is_available():
        pytest.skip("there is a GPU: triton can run")
    result = shell(TRANSFUSE_BACKEND=name, TRITON_INTERPRET="0")
    assert result.returncode == 1, result.stdout + result.stderr
    assert word in result.stdout
    assert "Traceback" not in result.stderr
    assert f"TRANSFUSE_BACKEND  {name}" in result.stdout


def test_it_is_quiet_and_leaves_colour_to_terminals():
    result = shell()
    assert result.returncode == 0
    assert result.stderr == ""
    assert "\x1b[" not in result.stdout


def test_driver_is_read_from_the_kernel(monkeypatch, tmp_path):
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\nGCC version: 12.2.0\n")
    monkeypatch.setattr(doctor, "Path", lambda path: file if "nvidia/version" in str(path) else Path(path))
    assert doctor._driver() == "580.65.06"
