"""What `benchmark.py attribution` compares with: TransformerLens 4.3, on the same weights and tokens."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

WHOLE, HOOKS = "TransformerLens", "its hooks, one product a reader"
# The forms of each kind, its own function first.
FORMS = {"composition": (WHOLE,), "attribution": (WHOLE, HOOKS)}
MODES = {"Q": "queries", "K": "keys", "V": "values"}
READERS = {"q_input": "queries", "k_input": "keys", "v_input": "values", "mlp_in": "mlp", "logits": "logits"}
Edge = tuple[str, str, str]


def check_installed() -> None:
    """Raises `ImportError` where TransformerLens is not installed."""
    if importlib.util.find_spec("transformer_lens") is None:
        raise ImportError("Expected TransformerLens for --opponent (got none). Do pip install transformer-lens==4.3.0.")


def gpt2(case: Any, vocabulary: int) -> Any:
    """Returns a GPT-2 of a case's shape with random weights, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ids: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_layer=case.layers, n_head=case.heads, n_embd=case.d_model, **ids)
    return GPT2LMHeadModel(config).eval()


def inputs(case: Any, vocabulary: int) -> Tensor:
    """Returns the two inputs, `[2, 1, T]`."""
    return torch.randint(1, vocabulary, (2, 1, case.tokens), generator=torch.Generator().manual_seed(1))


def values_of(network: Any) -> dict[Edge, float]:
    """Returns the values of our edges by sender, receiver and site; attribution with TransformerLens's sign."""
    ends = ((network.label[j], network.label[i]) for j, i in network.edge_index.t().tolist())
    sign = -1 if "by_token" in network else 1
    numbers = (sign * network.mean).tolist()
    return {(*pair, site): value for pair, site, value in zip(ends, network.site, numbers, strict=True)}


def work(
    case: Any, model: Any, clean: Tensor, other: Tensor
) -> tuple[Callable[[], Any], Callable[[Any], dict[Edge, float]]]:
    """Returns what is measured of TransformerLens, and what makes values by edge of its result."""
    bridge = _bridge(model)
    if case.kind == "composition":
        # Folds the norms and centres what is written, as ours does; both are loading.
        bridge.enable_compatibility_mode(disable_warnings=True)
        return partial(_scores, bridge), _of_scores
    metric = lambda logits: logits[0, -1, 5] - logits[0, -1, 7]  # noqa: E731
    if case.who == HOOKS:
        return lambda: _by_products(bridge, clean, other, metric), lambda found: found
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    config = EdgeAttributionConfig(granularity="edge")
    return lambda: attribution_patch(bridge, clean, other, metric, config), _of_edges


def _bridge(model: Any) -> Any:
    """The model as TransformerLens has it; it asks for a folder and a tokenizer, of which nothing is used."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
        ends = dict.fromkeys(("eos_token", "bos_token", "pad_token"), "<end>")
        PreTrainedTokenizerFast(tokenizer_object=words, **ends).save_pretrained(folder)
        model.config.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(
            folder, hf_model=model, tokenizer=tokenizer, dtype=next(model.parameters()).dtype, device="cpu"
        )
    return bridge.eval()


@torch.no_grad()
def _scores(bridge: Any) -> dict[str, Tensor]:
    """Its scores of each mode; with gradients they would take far more memory."""
    return {mode: bridge.all_composition_scores(mode).scores for mode in MODES}


def _of_scores(scores: dict[str, Tensor]) -> dict[Edge, float]:
    of_edge: dict[Edge, float] = {}
    for mode, site in MODES.items():
        layers, heads, _, _ = scores[mode].shape
        numbers = scores[mode].tolist()
        of_edge |= {
            (f"{a}.{u}", f"{b}.{r}", site): numbers[a][u][b][r]
            for b in range(layers) for a in range(b) for u in range(heads) for r in range(heads)
        }  # fmt: skip
    return of_edge


def _of_edges(result: Any) -> dict[Edge, float]:
    """Its edges are those of every token: summed."""
    of_edge: dict[Edge, float] = {}
    for (writer, reader), value in result.edge_scores.items():
        edge = (_name(writer), _name(reader), READERS[reader.kind])
        of_edge[edge] = of_edge.get(edge, 0.0) + value
    return of_edge


def _name(node: Any) -> str:
    if node.kind in ("embed", "logits"):
        return {"embed": "embedding", "logits": "logits"}[node.kind]
    return f"{node.layer}.mlp" if node.head is None else f"{node.layer}.{node.head}"


def _by_products(bridge: Any, clean: Tensor, other: Tensor, metric: Callable[[Tensor], Tensor]) -> dict[Edge, float]:
    """Its caches of activations and gradients, and one product of all writers' changes with each reader's gradients."""
    from transformer_lens.tools.analysis import attribution_patching as patching

    layers = int(bridge.cfg.n_layers)
    names = patching._edge_hook_names(layers)
    with patching._edge_hook_flags(bridge):
        first = patching.cache_activation_and_gradient(bridge, clean, metric, names, compute_gradient=False)
        second = patching.cache_activation_and_gradient(bridge, other, metric, names)
    change = lambda name: (first.activations[name] - second.activations[name])[0]  # noqa: E731
    slope = lambda name: second.gradients[name][0]  # noqa: E731
    writers, parts, found = ["embedding"], [change("hook_embed")[:, None]], {}

    def read(labels: list[str], site: str, gradients: Tensor) -> None:
        changes = torch.cat(parts, dim=1)  # [T, W, M]
        numbers = torch.einsum("twm,trm->twr", changes, gradients).sum(dim=0).tolist()
        found.update({
            (writer, label, site): numbers[w][r]
            for w, writer in enumerate(writers) for r, label in enumerate(labels)
        })  # fmt: skip

    for layer in range(layers):
        block = f"blocks.{layer}"
        heads = [f"{layer}.{head}" for head in range(bridge.cfg.n_heads)]
        for kind in ("q_input", "k_input", "v_input"):
            read(heads, READERS[kind], slope(f"{block}.attn.hook_{kind}"))
        writers += heads
        parts.append(change(f"{block}.attn.hook_result"))
        read([f"{layer}.mlp"], "mlp", slope(f"{block}.hook_mlp_in")[:, None])
        writers.append(f"{layer}.mlp")
        parts.append(change(f"{block}.hook_mlp_out")[:, None])
    read(["logits"], "logits", slope(f"blocks.{layers - 1}.hook_resid_post")[:, None])
    return found
