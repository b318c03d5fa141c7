"""Whole models where every op is forced onto one backend: text, logits of padded rows and gradients as on PyTorch."""

from __future__ import annotations

import pytest
import torch

from attention_cases import quick_interpreted
from model_cases import make_config
from transfuse import Decoder, Encoder, Seq2Seq, use_backend

CONFIGS = {
    "gpt": {"position": "learned"},
    "llama": {"position": "rotary", "norm": "rms", "gated": True, "activation": "silu", "num_kv_heads": 2},
    "gemma": {"position": "rotary", "norm": "rms", "num_kv_heads": 1, "window": 4, "softcap": 3.0},
}


@pytest.fixture
def kernels(backend):
    if backend == "torch":
        pytest.skip("what the others are compared with")
    return backend


@quick_interpreted(lambda p: p["backend"] == "cuda" or p["case"] == "llama")
@pytest.mark.parametrize("case", CONFIGS)
def test_a_decoder_generates_the_same_text(case, kernels, device):
    model = Decoder(make_config("decoder", num_layers=1, **CONFIGS[case])).eval().to(device)
    ids = torch.randint(1, model.config.vocab_size, (2, 5), device=device)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], device=device)
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    with use_backend("torch"):
        expected = model.generate(ids, **options)
    with use_backend(kernels):
        assert torch.equal(model.generate(ids, **options), expected)


@quick_interpreted(lambda p: p["backend"] == "cuda" or p["architecture"] == "decoder")
@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder_decoder"])
def test_a_step_of_training_gives_the_same_gradients(architecture, kernels, device):
    build = {"encoder": Encoder, "decoder": Decoder, "encoder_decoder": Seq2Seq}[architecture]
    config = make_config(
        architecture, position="relative" if architecture == "encoder_decoder" else "rotary", num_layers=1
    )
    model = build(config).eval().to(device)
    ids = torch.randint(1, config.vocab_size, (2, 6), device=device)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.arange(6, device=device) < torch.tensor([[6], [4]], device=device),
    }
    if architecture == "encoder_decoder":
        inputs["decoder_input_ids"] = ids[:, :4]
    found = []
    for name in ("torch", kernels):
        model.zero_grad()
        with use_backend(name):
            out = model(**inputs)
            out = out.last_hidden_state if architecture == "encoder" else out.logits
            out[:, :4].square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
