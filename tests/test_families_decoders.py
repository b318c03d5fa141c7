"""GPT-2, GPT-Neo and Llama with every head against transformers: written there, read and compared here, written here,
read there; caches, local layers, fp16, rotary scalings, old files, shards, and what does not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import assert_close, assert_comes_back, assert_same_outputs, hf, loaded, padded_batch, positions_of
from transfuse import Decoder, TransformerConfig, from_pretrained
from transfuse.errors import ArgumentError, CheckpointError, ConfigError
from transfuse.models import DecoderBody, RopeScaling, SequenceClassifier, checkpoint_writer
from transfuse.models.families import find_family
from transfuse.models.pretrained import save_pretrained

IDS = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {**IDS, "n_embd": 36, "n_layer": 3, "n_head": 3, "n_inner": 50, "n_positions": 29},
    "gpt_neo": {
        **IDS,
        "hidden_size": 36,
        "num_layers": 3,
        "num_heads": 3,
        "intermediate_size": 50,
        "max_position_embeddings": 29,
        "attention_types": [[["global", "local"], 1], [["local"], 1]],
        "window_size": 4,
    },
    "llama": {
        **IDS,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 70,
        "max_position_embeddings": 64,
    },
}
LABELS = {"sequence-classification": {"num_labels": 4}, "token-classification": {"num_labels": 5}}
EVERY_HEAD = [(family, task) for family in SIZES for task in find_family(family).tasks]
LM = "causal-lm"
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"{family}-{task}": (family, task, LABELS.get(task, {})) for family, task in EVERY_HEAD},
    "gpt2-untied-four-times": ("gpt2", LM, {"tie_word_embeddings": False, "n_inner": None}),
    "gpt2-scaled-by-layer": ("gpt2", LM, {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-unscaled-by-layer": ("gpt2", LM, {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2-upcast": ("gpt2", LM, {"reorder_and_upcast_attn": True}),
    "gpt2-one-head-relu": ("gpt2", LM, {"n_embd": 13, "n_head": 1, "activation_function": "relu"}),
    "gpt2-one-label": ("gpt2", "sequence-classification", {"num_labels": 1}),
    "gpt_neo-untied": ("gpt_neo", LM, {"tie_word_embeddings": False, "intermediate_size": None}),
    "gpt_neo-global": ("gpt_neo", LM, {"attention_types": [[["global"], 3]]}),
    "gpt_neo-local": ("gpt_neo", LM, {"attention_types": [[["local"], 3]], "window_size": 1}),
    "gpt_neo-wide-window": ("gpt_neo", LM, {"window_size": 40}),
    "gpt_neo-alternating": ("gpt_neo", LM, {"num_layers": 4, "attention_types": [[["global", "local"], 2]]}),
    "llama-tied-classes": ("llama", "sequence-classification", {"num_labels": 2, "tie_word_embeddings": True}),
}


def model_of(family: str, task: str = LM, **changes: Any) -> Any:
    return hf(find_family(family).tasks[task], {**SIZES[family], **changes})


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers_and_comes_back(tmp_path: Path, case: str) -> None:
    family, task, changes = CASES[case]
    theirs = model_of(family, task, **changes)
    ours = loaded(theirs, tmp_path / "theirs")
    types = {} if family == "llama" else {"token_type_ids": 61}  # GPT's types are tokens
    batch = padded_batch(theirs.config, "-lr", **types)
    assert_same_outputs(ours, theirs, batch, position_ids=positions_of(batch["attention_mask"]))
    del batch["attention_mask"]
    assert_comes_back(ours, theirs, tmp_path / "ours", batch)


@pytest.mark.parametrize("family", SIZES)
@torch.no_grad()
def test_cached_equals_uncached_and_transformers(tmp_path: Path, family: str) -> None:
    """Left-padded rows, far beyond GPT-Neo's window, read in parts of many lengths and one by one."""
    theirs = model_of(family)
    ours = loaded(theirs, tmp_path)
    batch = padded_batch(theirs.config, "-ll", length=23)
    ids, mask = batch.values()
    positions, tokens = positions_of(mask), mask.bool()
    whole, expected = ours(**batch).logits, theirs(**batch, position_ids=positions).logits
    assert_close(whole[tokens], expected[tokens])
    cache, past, start = ours.new_cache(3, 23), None, 0
    for part in (9, 1, 5, *[1] * 8):
        stop = start + part
        step = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        past = theirs(ids[:, start:stop], past_key_values=past and past.past_key_values, use_cache=True, **step)
        got = ours(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache, output_attentions=True)
        seen = tokens[:, start:stop]
        assert_close(got.logits[seen], past.logits[seen])
        assert_close(got.logits[seen], whole[:, start:stop][seen])
        assert all(weights.shape[-1] == stop for weights in got.attentions)
        start = stop


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
def test_generates_what_transformers_generates(tmp_path: Path, family: str) -> None:
    theirs = model_of(family)
    ids = torch.randint(1, 61, (2, 5))
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    assert torch.equal(loaded(theirs, tmp_path).generate(ids, max_new_tokens=20), expected)


@torch.no_grad()
def test_local_layers_see_their_window_and_no_further(tmp_path: Path) -> None:
    theirs = model_of("gpt_neo", attention_types=[[["global", "local", "local"], 1]])
    ours = loaded(theirs, tmp_path)
    maps = ours(torch.randint(1, 61, (1, 20)), output_attentions=True).attentions
    distance = torch.arange(20)[:, None] - torch.arange(20)
    for layer, far in enumerate((20, 4, 4)):
        seen = (distance >= 0) & (distance < far)
        assert (maps[layer][0][:, ~seen] == 0).all()
        assert (maps[layer][0][:, seen] > 0).all()


@torch.no_grad()
def test_fp16_gpt_neo_survives_scores_beyond_fp16(tmp_path: Path) -> None:
    """Unscaled products pass 65504, fp16's largest number; transformers computes them in fp32 and so stays finite."""
    theirs = model_of("gpt_neo", attention_types=[[["local", "global"], 1], [["local"], 1]])
    for layer in theirs.transformer.h:
        attention = layer.attn.attention
        attention.q_proj.weight.mul_(150)
        attention.k_proj.weight.mul_(150)
    ids = torch.randint(1, 61, (2, 17))
    first = theirs.transformer.h[0]
    x = first.ln_1(theirs.transformer.wte(ids) + theirs.transformer.wpe(torch.arange(17)))
    q, k = first.attn.attention.q_proj(x), first.attn.attention.k_proj(x)
    assert q.abs().max() < 65504
    assert (q.unflatten(-1, (3, 12)) @ k.unflatten(-1, (3, 12)).transpose(-1, -2)).abs().max() > 65504
    exact, theirs = theirs(ids).logits, theirs.half()
    ours = loaded(theirs, tmp_path)
    assert ours.dtype == torch.float16
    expected = theirs(ids).logits.float()
    assert expected.isfinite().all()
    cache = ours.new_cache(2, 17)
    steps = torch.cat([ours(part, cache=cache).logits for part in ids.split([9, *[1] * 8], 1)], 1)
    out = ours(ids, output_attentions=True)
    assert all(weights.isfinite().all() for weights in out.attentions)
    for got in (out.logits, steps):
        error, budget = (got.float() - exact).abs(), (expected - exact).abs()
        assert error.isfinite().all()
        assert error.mean() <= 2 * budget.mean(), "scores this large pick one key: a rounding may pick another"


@pytest.mark.parametrize("family", SIZES)
@torch.no_grad()
def test_classes_are_read_from_the_last_token(tmp_path: Path, family: str) -> None:
    theirs = model_of(family, "sequence-classification", num_labels=3)
    ours = loaded(theirs, tmp_path)
    batch = padded_batch(theirs.config, "-lr")
    ids, mask = batch.values()
    alone = torch.cat([theirs(row[m.bool()][None]).logits for row, m in zip(ids, mask, strict=True)])
    assert_close(ours(**batch).logits, alone)
    ids = torch.where(mask.bool(), ids, 7)  # only the mask tells what is padding
    assert_close(ours(ids, mask).logits, alone)
    ends = torch.tensor([[5, 9, 0, 0]])  # without a mask the padding id tells, as in transformers
    assert_close(ours(ends).logits, theirs(ends).logits)
    nothing = torch.zeros(1, 3, dtype=torch.long)  # nothing but padding ids, all of them tokens: the last one
    assert torch.equal(ours(nothing).logits, ours(nothing, torch.ones(1, 3, dtype=torch.long)).logits)
    with pytest.raises(ArgumentError, match=r"at least one token a row, got shape \(2, 0\)"):
        ours(ids[:2, :0])
    ours.config = TransformerConfig.from_dict({**ours.config.to_dict(), "pad_token_id": None})
    whole = ours.classifier(ours.body(ids).last_hidden_state)
    assert torch.equal(ours(ids).logits, whole[:, -1])


@torch.no_grad()
def test_old_gpt2_files(tmp_path: Path) -> None:
    """No prefix, the causal mask as buffers, both names of the tied table, a second head: what the first files hold."""
    theirs = hf("GPT2DoubleHeadsModel", SIZES["gpt2"])
    theirs.save_pretrained(tmp_path)
    stored = {n.removeprefix("transformer."): t for n, t in load_file(tmp_path / "model.safetensors").items()}
    assert "multiple_choice_head.summary.weight" in stored
    mask = torch.ones(1, 1, 29, 29, dtype=torch.uint8).tril()
    for i in range(3):
        stored |= {f"h.{i}.attn.bias": mask.clone(), f"h.{i}.attn.masked_bias": torch.tensor(-1e4)}
    save_file({**stored, "lm_head.weight": stored["wte.weight"].clone()}, tmp_path / "model.safetensors")
    ids = torch.randint(0, 61, (2, 9))
    assert_close(from_pretrained(tmp_path)(ids).logits, theirs(ids).logits)
    body = from_pretrained(tmp_path, "decoder")
    assert type(body) is DecoderBody
    assert_close(body(ids).last_hidden_state, theirs.transformer(ids).last_hidden_state)


@pytest.mark.parametrize("family", SIZES)
@torch.no_grad()
def test_every_task_reads_the_stack_of_another(tmp_path: Path, family: str) -> None:
    theirs = model_of(family, "question-answering")
    theirs.save_pretrained(tmp_path)
    body = from_pretrained(tmp_path, "decoder")
    ids = torch.randint(0, 61, (2, 9))
    assert_close(body(ids).last_hidden_state, theirs.transformer(ids).last_hidden_state)
    if family == "llama":
        with pytest.raises(CheckpointError, match=r"1 missing \(lm_head.weight\)"):
            from_pretrained(tmp_path, LM)
    else:
        assert isinstance(from_pretrained(tmp_path, LM), Decoder)


def test_matrices_that_were_not_transposed_are_told(tmp_path: Path) -> None:
    model_of("gpt2").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    stored[name] = stored[name].T.contiguous()
    stored["transformer.h.7.ln_1.weight"] = stored.pop("transformer.h.0.ln_1.weight")
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(tmp_path)
    message = str(caught.value)
    assert f"{name}: file (50, 36), model (36, 50)" in message
    assert "1 missing (transformer.h.0.ln_1.weight)" in message
    assert "1 unexpected (transformer.h.7.ln_1.weight)" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
@torch.no_grad()
def test_half_precision(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    theirs = model_of(family).to(dtype)
    ours = loaded(theirs, tmp_path)
    assert ours.dtype == dtype
    ids = torch.randint(1, 61, (2, 9))
    expected = theirs.float()(ids).logits
    assert_close(from_pretrained(tmp_path, dtype=torch.float32)(ids).logits, expected)
    budget = (theirs.to(dtype)(ids).logits.float() - expected).abs().max()
    error = (ours(ids).logits.float() - expected).abs().max()
    assert error <= 2 * budget + torch.finfo(dtype).eps * expected.abs().max()


def test_special_tokens_of_a_small_vocabulary() -> None:
    """transformers writes 50256 for every GPT-2; what the vocabulary lacks is none."""
    family = find_family("gpt2")
    small = family.read_config({**SIZES["gpt2"], "bos_token_id": 50256, "eos_token_id": 50256}, LM)
    assert (small.bos_token_id, small.eos_token_id) == (None, None)
    assert family.read_config({}, LM).eos_token_id == 50256
    with pytest.raises(ConfigError, match="eos_token_id must be a token id from 0 to 60, got 70"):
        family.read_config({**SIZES["gpt2"], "eos_token_id": 70}, LM)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "cross-attention": ("gpt2", {"add_cross_attention": True}, r"attends to an encoder .* is not supported"),
    "activation": ("gpt2", {"activation_function": "mish"}, "activation_function must be one of .*, got 'mish'"),
    "few-layers": ("gpt_neo", {"num_layers": 5}, r"attention_types must hold .* that make num_layers \(5\) layers"),
    "many-layers": (
        "gpt_neo",
        {"num_layers": 10**12, "attention_types": [[["local"], 10**12]]},
        "attention_types must",
    ),
    "odd-types": ("gpt_neo", {"attention_types": "global"}, "attention_types must hold pairs"),
    "other-kind": ("gpt_neo", {"attention_types": [[["sparse"], 3]]}, "attention_types must hold pairs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_configurations_that_are_refused(case: str) -> None:
    family, changes, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        find_family(family).read_config({**SIZES[family], **changes}, LM)


ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn-all": {
        "rope_type": "yarn",
        "factor": 4.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "beta_fast": 3,
        "beta_slow": 0.5,
        "truncate": False,
    },
    "yarn-factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2, 3.0, 4.0],
    },
}


def rope_model(name: str) -> Any:
    """A Llama that was trained for 16 tokens."""
    changes = {"rope_theta": 100.0, "rope_scaling": dict(ROPES[name]), "max_position_embeddings": 16}
    if name != "dynamic":
        changes["max_position_embeddings"] = 64
        changes["rope_scaling"]["original_max_position_embeddings"] = 16
    if name == "longrope":
        changes["original_max_position_embeddings"] = 16  # where transformers 4 looks
    return model_of("llama", **changes)


@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_rotary_scalings(tmp_path: Path, name: str) -> None:
    theirs = rope_model(name)
    ours = loaded(theirs, tmp_path / "theirs")
    for length in (9, 16, 17, 40):
        ids = torch.randint(0, 61, (2, length))
        assert_close(ours(ids).logits, theirs(ids).logits)
    ids, cache, past = torch.randint(0, 61, (2, 25)), ours.new_cache(2, 25), None
    theirs = rope_model(name)  # it remembers the longest text
    for part in ids.split([12, *[1] * 13], 1):
        past = theirs(part, past_key_values=past and past.past_key_values, use_cache=True)
        assert_close(ours(part, cache=cache).logits, past.logits)
    assert_comes_back(ours, theirs, tmp_path / "ours", {"input_ids": ids[:, :12]})


@torch.no_grad()
def test_scalings_that_follow_the_length_follow_each_row(tmp_path: Path) -> None:
    """A short row beside a long one gets what it gets alone."""
    for name in ("dynamic", "longrope"):
        ours = loaded(rope_model(name), tmp_path / name)
        ids, mask = torch.randint(1, 61, (2, 30)), torch.ones(2, 30, dtype=torch.long)
        mask[1, :18] = 0
        both, alone = ours(ids, mask).logits, ours(ids[1:, 18:]).logits
        assert_close(both[1, 18:], alone[0])
        assert_close(both[:1], ours(ids[:1]).logits)
        assert ours.rotary(ids[:, :0])[0].shape == (2, 0, 1, 8)


def test_scalings_that_do_not_suit(tmp_path: Path) -> None:
    assert RopeScaling("yarn", 8.0).attention_factor == pytest.approx(0.1 * math.log(8) + 1)
    rope = RopeScaling("longrope", 2.0, short_factor=[1.0], long_factor=(2.0, 3.0))
    config = {"architecture": "decoder", "vocab_size": 9, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ConfigError, match=r"longrope needs 2 short_factor and long_factor for dim 4, got 1 and 2"):
        Decoder(TransformerConfig(**config, position="rotary", rope_scaling=rope))
    with pytest.raises(ConfigError, match="dynamic scaling needs a dim of 4 or more, got 2"):
        Decoder(TransformerConfig(**config, position="rotary", rotary_dim=2, rope_scaling=RopeScaling("dynamic", 2.0)))
    with pytest.raises(ConfigError, match="rope_scaling must hold positive numbers"):
        find_family("llama").read_config({"rope_scaling": {"type": "yarn", "mscale": "a", "mscale_all_dim": 1}}, LM)


def small_decoder(seed: int) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(TransformerConfig("decoder", 31, 24, 2, 4, family="llama", position="rotary"))


def test_shards_and_one_file_replace_each_other(tmp_path: Path) -> None:
    theirs = model_of("gpt2")
    ours = loaded(theirs, tmp_path / "theirs")
    for size, files in (("20KB", 8), (10**9, 1), (40000, 4), ("50GB", 1)):
        save_pretrained(ours, tmp_path / "ours", max_shard_size=size)
        assert len(list((tmp_path / "ours").glob("*.safetensors"))) == files
        again = from_pretrained(tmp_path / "ours").state_dict().values()
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again, strict=True))
        _, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for size in (0, -1, True, "much", "5", 2.5):
        with pytest.raises(ArgumentError, match="max_shard_size must be bytes or a string like '5GB', got "):
            ours.save_pretrained(tmp_path / "no", max_shard_size=size)
    assert not (tmp_path / "no").exists()


def test_crash_among_shards_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_decoder(0).save_pretrained(tmp_path, max_shard_size=5000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_file_really = checkpoint_writer.save_file

    def full_disk(tensors: dict[str, torch.Tensor], path: Path, metadata: object = None) -> None:
        if path.name.startswith("model-00002"):
            raise OSError(28, "No space left on device")
        save_file_really(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(checkpoint_writer, "save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        small_decoder(1).save_pretrained(tmp_path, max_shard_size=5000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    replace_really = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.name.startswith("model-00002"):
            raise KeyboardInterrupt
        return replace_really(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        small_decoder(1).save_pretrained(tmp_path, max_shard_size=5000)
    with pytest.raises(CheckpointError, match=r"expected model.safetensors or model.safetensors.index.json"):
        from_pretrained(tmp_path)


def test_own_decoders_with_heads_share_their_names(tmp_path: Path) -> None:
    config = TransformerConfig("decoder", 31, 24, 2, 4, softcap=5.0, tie_embeddings=False)
    model = SequenceClassifier(config, 3)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "transfuse"
    again, body = from_pretrained(tmp_path), from_pretrained(tmp_path, "decoder")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.decoder.parameters(), body.parameters(), strict=True))
