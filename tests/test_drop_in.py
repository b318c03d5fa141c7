"""The drop-in modules and patched models inside what else PyTorch does to a model: hooks, parametrizations, copies,
compilers, transforms, checkpoints, wrappers that share the work among processes."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import test_patch as others
import transfuse
import transfuse.nn as ours
from transfuse.errors import BackendError

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")


def layer(library: Any = nn, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    made = library.TransformerEncoderLayer(12, 2, 20, **{"dropout": 0.0, "batch_first": True, **options}, dtype=dtype)
    assert isinstance(made, nn.Module)
    return made


def given(length: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, length, 12, dtype=dtype, generator=torch.Generator().manual_seed(length))


def padding(length: int) -> torch.Tensor:
    return torch.arange(length) >= torch.tensor([length, length - 2])[:, None]


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
    """Output and gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out, x.grad, *(p.grad for p in model.parameters())]


def near(got: list[Any], expected: list[Any]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def is_patched(model: nn.Module) -> bool:
    kinds = [k for m in model.modules() for k in type(m).__mro__]
    return any(k.__module__.startswith("transfuse.") or "fused_from" in vars(k) for k in kinds)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_hooks_on_all_modules_see_what_torch_s_see(direction: str) -> None:
    register = {
        "forward": nn.modules.module.register_module_forward_hook,
        "backward": nn.modules.module.register_module_full_backward_hook,
    }[direction]
    logs = []
    for library in (nn, ours):
        log: list[str] = []
        handle = register(lambda module, *_, log=log: log.append(type(module).__name__))  # type: ignore[operator]
        try:
            step(layer(library), given())
        finally:
            handle.remove()
        logs.append(log)
    assert logs[0] == logs[1]
    assert "Linear" in logs[0]


def noted(function: Any, log: list[Any]) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        log.append(sorted(options))
        return function(*args, **options)

    return call


@pytest.mark.parametrize("place", ["linear1", "norm2", "dropout"])
def test_hooks_with_keywords_and_forwards_of_one_s_own(place: str) -> None:
    logs = []
    for library in (nn, ours):
        model, log = layer(library), []
        part: Any = model.get_submodule(place)
        part.register_forward_pre_hook(lambda m, a, k, log=log: log.append((len(a), k)), with_kwargs=True)
        part.register_full_backward_pre_hook(lambda m, g, log=log: log.append("before"))
        model.self_attn.forward = noted(model.self_attn.forward, log)
        logs.append((log, step(model, given())))
    assert logs[0][0] == logs[1][0]
    near(logs[1][1], logs[0][1])


def test_parametrized_weights() -> None:
    def parametrized(model: nn.Module) -> nn.Module:
        for part in ("linear1", "linear2", "norm1", "norm2", "self_attn.out_proj"):
            parametrizations.weight_norm(model.get_submodule(part))
        parametrizations.weight_norm(model.self_attn, "in_proj_weight")  # type: ignore[arg-type]
        return model

    expected = step(parametrized(layer()), given())
    near(step(parametrized(layer(ours)), given()), expected)
    patched = layer()
    transfuse.patch(patched)
    near(step(parametrized(patched), given()), expected)
    transfuse.unpatch(patched)  # what torch put before our classes stays
    assert not is_patched(patched)
    near(step(patched, given()), expected)
    parametrize.remove_parametrizations(patched.norm1, "weight")  # type: ignore[arg-type]
    assert type(patched.norm1) is nn.LayerNorm
    near(step(patched, given())[:2], expected[:2])


class Scaled(torch.Tensor):
    """A weight that stands for twice its values, as a quantized one stands for others, and computes so in linear."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> Scaled:
        return Scaled(inner["inner"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return func(args[0], 2 * args[1].inner, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"only linear knows how to use this weight, not {func}")


def test_weights_of_another_kind_compute_in_their_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfuse.nn.transformer.ffn", lambda *_, **__: pytest.fail("a kernel got the weights"))
    results = []
    for library in (nn, ours):
        model: Any = layer(library)
        for part in (model.linear1, model.linear2):
            part.weight = nn.Parameter(Scaled(part.weight.detach()), requires_grad=False)
        results.append(model(given()))
    near([results[1]], [results[0]])


def test_parts_and_copies_are_unpatched_by_themselves() -> None:
    shared = layer()
    model = nn.Sequential(shared, nn.LayerNorm(12, dtype=torch.float64), shared)  # one module at two places
    before = step(model, given())
    transfuse.patch(model[0])
    transfuse.patch(model)
    transfuse.patch(model)
    near(step(model, given()), before)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    parts = copy.deepcopy(model[0])
    transfuse.unpatch(parts)
    assert not is_patched(parts)
    for made in copies:
        assert is_patched(made)
        assert list(made.state_dict()) == list(model.state_dict())
        near(step(made, given()), before)
        transfuse.unpatch(made)
        assert not is_patched(made)
    assert is_patched(model[0])
    transfuse.unpatch(model[0])
    assert not is_patched(model[0])
    assert is_patched(model[1])
    transfuse.unpatch(model)
    assert not is_patched(model)
    assert all(torch.equal(a, b) for a, b in zip(step(model, given()), before, strict=True))  # type: ignore[arg-type]


@needs_transformers
def test_models_of_two_configurations_get_each_its_attention_back() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel, ViTConfig, ViTModel

    encoder = ViTModel(ViTConfig(**others.MODELS["vit"][1]))
    decoder = GPT2LMHeadModel(GPT2Config(**others.MODELS["gpt2"][1], is_decoder=True, add_cross_attention=True))
    model: Any = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.encoder.config._attn_implementation = "eager"

    def chosen() -> list[str]:
        return [m.config._attn_implementation for m in (model, model.encoder, model.decoder)]

    before = chosen()
    assert before == ["sdpa", "eager", "sdpa"]
    with transfuse.patched(model.encoder):
        assert chosen() == ["sdpa", "transfuse", "sdpa"]
    with transfuse.patched(model):
        assert chosen() == ["transfuse"] * 3
        other = copy.deepcopy(model)
    assert chosen() == before
    transfuse.unpatch(other)
    assert other.encoder.config._attn_implementation == "eager"


@needs_transformers
def test_threads_in_blocks_of_one_model() -> None:
    model: Any = others.build("gpt2").float().eval()
    inputs = others.inputs(model)
    expected = model(**inputs).logits
    right: list[bool] = []

    @torch.no_grad()
    def run() -> None:
        for _ in range(6):
            with transfuse.patched(model):
                got = model(**inputs).logits
                right.append(model.config._attn_implementation == "transfuse")
            right.append(torch.allclose(got, expected, atol=1e-5))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 36
    assert all(right)
    assert not is_patched(model)
    assert model.config._attn_implementation == "sdpa"


@needs_transformers
def test_a_norm_of_one_s_own_in_a_fused_step() -> None:
    model: Any = others.build("bert").eval()
    for block in model.bert.encoder.layer:
        norm = block.output.LayerNorm
        norm.__class__ = type("Shifted", (nn.LayerNorm,), {"forward": lambda s, x: nn.LayerNorm.forward(s, x) + 1})
    inputs = others.inputs(model)
    before = model(**inputs).logits
    transfuse.patch(model)
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_draw_the_same_dropout_again(reentrant: bool) -> None:
    model = layer(ours, dropout=0.4)
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        model.zero_grad()
        x = given().requires_grad_()
        out = run(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in model.parameters())])
    near(results[1], results[0])


def test_transforms() -> None:
    results = []
    for library in (nn, ours):
        model = layer(library)
        weights = dict(model.named_parameters())

        def loss(weights: Any, x: torch.Tensor, model: nn.Module = model) -> torch.Tensor:
            return torch.func.functional_call(model, weights, (x[None],)).square().sum()

        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, given())
        results.append(list(found.values()))
    near(results[1], results[0])


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))])
def test_a_kernel_asked_for_by_name_says_that_it_has_no_derivative_there(transform: Any) -> None:
    norm, x = ours.LayerNorm(12), given(dtype=torch.float32)
    with (
        transfuse.use_backend("triton"),
        pytest.raises(BackendError, match=r"do not see into kernels \(leave the backend out"),
    ):
        transform(lambda x: norm(x).sum())(x)
    assert transform(lambda x: norm(x).sum())(x) is not None


def graphs(model: nn.Module, call: Callable[[Any, int], torch.Tensor]) -> int:
    """Of how many graphs a model compiled for dynamic shapes consists after several lengths."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for length in (7, 30, 4):
        torch.testing.assert_close(call(compiled, length), call(model, length), rtol=1e-4, atol=1e-5)
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_encoder_compiles_once_for_all_lengths(training: bool) -> None:
    model = ours.TransformerEncoder(layer(ours, torch.float32), 1).train(training)

    def call(model: Any, length: int) -> torch.Tensor:
        out = model(given(length, torch.float32), src_key_padding_mask=padding(length))
        return out[:, : length - 2]

    assert graphs(model, call) == 1


HEAVY = [
    pytest.param(n, marks=pytest.mark.slow)
    for n in ("bert", "roberta", "distilbert", "gpt_neo", "llama", "bart", "gpt2")
]


@needs_transformers
@pytest.mark.parametrize("name", ["t5", *HEAVY])
def test_a_patched_model_compiles_once_for_all_lengths(name: str) -> None:
    model: Any = others.build(name).float().eval()
    transfuse.patch(model)

    def call(compiled: Any, length: int) -> torch.Tensor:
        ids = torch.randint(1, 49, (2, length), generator=torch.Generator().manual_seed(length))
        decoder = {"decoder_input_ids": ids[:, : length // 2]} if model.config.is_encoder_decoder else {}
        out: torch.Tensor = compiled(input_ids=ids, attention_mask=(~padding(length)).long(), **decoder).logits
        return out

    assert graphs(model, call) == 1


def test_an_encoder_exports_with_any_length() -> None:
    model = ours.TransformerEncoder(layer(ours, torch.float32), 1).eval()
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {"src": {1: length}, "src_key_padding_mask": {1: length}}
    masked = {"src_key_padding_mask": padding(9)}
    exported = torch.export.export(model, (given(9, torch.float32),), masked, dynamic_shapes=shapes).module()
    with torch.no_grad():
        got, expected = (
            m(given(21, torch.float32), src_key_padding_mask=padding(21))[:, :19] for m in (exported, model)
        )
    torch.testing.assert_close(got, expected)


@needs_transformers
def test_a_patched_model_exports_with_any_length() -> None:
    model: Any = others.build("bert").float().eval()
    transfuse.patch(model)
    length = torch.export.Dim("length", min=2, max=60)

    def inputs(n: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(2 * n).view(2, n) % 48 + 1, "attention_mask": (~padding(n)).long()}

    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}}
    exported = torch.export.export(model, (), inputs(9), dynamic_shapes=shapes)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(**inputs(17)).logits, model(**inputs(17)).logits)


@needs_transformers
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_autocast_is_as_near_to_the_truth_as_unpatched(name: str) -> None:
    model: Any = others.build(name).float().eval()
    inputs = others.inputs(model)
    truth = copy.deepcopy(model).double()(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        before = model(**inputs).logits
        transfuse.patch(model)
        after = model(**inputs).logits
    assert after.dtype == before.dtype
    budget = (before.double() - truth).abs().max() + torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert (after.double() - truth).abs().max() <= 2 * budget


def whole() -> nn.Module:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, 0.0, batch_first=True), 2)
    return nn.Sequential(encoder, nn.LayerNorm(12), nn.Linear(12, 3))


def share_the_work(rank: int, processes: int, folder: str) -> None:
    """A step of a patched model wrapped in each way has the gradients of the model by itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    try:
        x = torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(1))
        single, own = whole(), x.chunk(processes)[rank]
        single(x).square().mean().backward()
        expected = [p.grad for p in single.parameters()]

        def same(grads: list[torch.Tensor]) -> None:
            for a, b in zip(grads, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

        model: Any = whole()
        transfuse.patch(model)
        wrapped: nn.Module = DistributedDataParallel(model)
        wrapped(own).square().mean().backward()
        same([p.grad for p in model.parameters()])
        model = whole()
        transfuse.patch(model)
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        wrapped(own).square().mean().backward()
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            same([p.grad for p in wrapped.parameters()])
        model = whole()
        transfuse.patch(model)
        mesh = init_device_mesh("cpu", (processes,))
        for part in (*model[0].layers, model):
            fully_shard(part, mesh=mesh)
        for unpatched in (False, True):
            if unpatched:
                transfuse.unpatch(model)
            model.zero_grad()
            model(own).square().mean().backward()
            same([p.grad.full_tensor() for p in model.parameters()])
            assert is_patched(model) is not unpatched
    finally:
        dist.destroy_process_group()


@pytest.fixture
def no_process_group() -> None:
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs torch.distributed for itself")


@pytest.mark.usefixtures("no_process_group")
def test_wrappers_that_share_the_work(tmp_path: Path) -> None:
    share_the_work(0, 1, str(tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures("no_process_group")
def test_wrappers_that_share_the_work_among_two(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(share_the_work, (2, str(tmp_path)), nprocs=2)
