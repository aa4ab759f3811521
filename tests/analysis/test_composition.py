from __future__ import annotations

import pytest
import torch
import transformers as hf
from stock_models import NAMES, STOCK, ByHand, by_hand, gain, stock
from torch import nn

import gohgraph as goh
from gohgraph.analysis.architectures.norms import gain_of, scale_of
from gohgraph.analysis.module_names import block_of

SITES = ("queries", "keys", "values")


def matrix_of(norm, width):
    """A norm without its scale as a matrix `[M, M]`, rows acting from the left."""
    if norm is None:
        return torch.eye(width).double()
    centre = torch.eye(width).double() - (1 / width if isinstance(norm, nn.LayerNorm) else 0)
    return centre @ torch.diag(gain(norm).detach())


def weight_of(module):
    return (module.weight.t() if type(module).__name__ == "Conv1D" else module.weight).detach()


def read_by(block: ByHand, site, width):
    """W `[heads, M, D]` of queries, keys or values, with the norm before them."""
    module, rows = block[2 + SITES.index(site)]
    norm = block.norm if site == "queries" or block.source_norm is False else block.source_norm
    return matrix_of(norm, width) @ weight_of(module)[rows].transpose(1, 2)


def own_norms(name, block, model):
    """Gains of QK norms, by head."""
    for attention in model.modules():
        if name in ("qwen3", "gemma3", "olmo2") and getattr(attention, "o_proj", None) is block.output:
            norms = (attention.q_norm, attention.k_norm)
            sizes = (len(block.queries[1]), len(block.keys[1]))
            size = block.queries[1].shape[1]
            return [gain(n).detach().reshape(-1, size).expand(h, -1) for n, h in zip(norms, sizes, strict=True)]
    return [torch.ones(()).double()] * 2


def written_by(block: ByHand, width):
    """W_OV `[H, M, M]`, with a norm behind the block."""
    values, heads = read_by(block, "values", width), len(block.queries[1])
    output = weight_of(block.output).t().unflatten(0, (heads, -1)) @ matrix_of(block.post_norm, width)
    if isinstance(block.norm, nn.LayerNorm):
        output = output - output.mean(dim=-1, keepdim=True)
    return values.repeat_interleave(heads // len(values), dim=0) @ output


def expected_scores(name, model, width):
    """Composition of every pair by whole matrices."""
    blocks = by_hand(name, model)
    for reader in blocks:
        heads, groups = len(reader.queries[1]), len(reader.keys[1])
        queries, keys = read_by(reader, "queries", width), read_by(reader, "keys", width)
        of_queries, of_keys = own_norms(name, reader, model)
        if of_queries.dim():
            queries, keys = queries * of_queries[:, None], keys * of_keys[:, None]
        group = torch.arange(heads) // (heads // groups)
        own = written_by(reader, width)
        pairs = queries @ keys[group].transpose(1, 2)  # [H, M, M]
        sides = {
            "queries": pairs,
            "keys": torch.stack([torch.cat([p.T for p in pairs[group == g]], dim=1) for g in range(groups)]),
            "values": torch.stack([torch.cat(list(own[group == g]), dim=1) for g in range(groups)]),
        }
        for site in SITES:
            cross = site != "queries" and reader.source_norm is not False
            norm = reader.norm if not cross else reader.source_norm
            before = [b for b in blocks if b.stream == ("encoder" if cross else reader.stream)]
            rows = []
            for writer in before if cross else before[: before.index(reader)]:
                path = torch.eye(width).double()
                for block in before[before.index(writer) : None if cross else before.index(reader)]:
                    for stream_norm in block.stream_norms:
                        path = path @ matrix_of(stream_norm, width)
                left = written_by(writer, width) @ path
                if isinstance(norm, nn.LayerNorm):
                    left = left - left.mean(dim=-1, keepdim=True)
                products = (left[:, None] @ sides[site][None]).flatten(2).norm(dim=2)  # [H, R]
                rows.append(products / left.flatten(1).norm(dim=1)[:, None] / sides[site].flatten(1).norm(dim=1))
            if rows:
                yield reader, site, torch.cat(rows)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_whole_matrices(name):
    model = stock(name)
    network = goh.composition_graph(model)
    names = {id(module): name for name, module in model.named_modules()}
    width, found = 20 if name in ("gpt_neox", "phi") else 30, 0
    for reader, site, scores in expected_scores(name, model, width):
        graph = next(g for g in dict.fromkeys(network.graph) if names[id(reader.output)].startswith(f"{g}."))
        chosen = torch.tensor([g == graph and s == site for g, s in zip(network.graph, network.site, strict=True)])
        torch.testing.assert_close(network.mean[chosen].view(scores.shape), scores, rtol=1e-9, atol=1e-9)
        found += scores.numel()
    assert found == sum(block_of(graph) == graph for graph in network.graph) and (network.std == 0).all()


def test_leading_components_are_those_of_the_singular_value_decomposition():
    model = stock("gpt2")
    first, second = by_hand("gpt2", model)

    def cut(matrix):
        u, s, v = torch.linalg.svd(matrix)
        return u[:, :, :2] @ torch.diag_embed(s[:, :2]) @ v[:, :2]

    left = cut(written_by(first, 30))
    left = left - left.mean(dim=-1, keepdim=True)
    right = cut(read_by(second, "queries", 30) @ read_by(second, "keys", 30).transpose(1, 2))
    products = (left[:, None] @ right[None]).flatten(2).norm(dim=2)
    expected = products / left.flatten(1).norm(dim=1)[:, None] / right.flatten(1).norm(dim=1)
    network = goh.composition_graph(model, "q", components=2)
    torch.testing.assert_close(network.mean.view(5, 5), expected, rtol=1e-9, atol=1e-9)
    whole = goh.composition_graph(model, components=6).mean
    torch.testing.assert_close(whole, goh.composition_graph(model).mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert", "vit", "t5"])
def test_a_folder_is_read_layer_by_layer_and_never_loaded(name, tmp_path, monkeypatch):
    model = STOCK[name]()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    expected = goh.composition_graph(model).mean
    monkeypatch.setattr(hf.PreTrainedModel, "from_pretrained", None)
    network = goh.composition_graph(tmp_path)
    torch.testing.assert_close(network.mean, expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_compared_is_refused(tmp_path):
    model = stock("llama")
    with pytest.raises(ValueError, match="kinds of 'q', 'k' and 'v' .got 'qo'"):
        goh.composition_graph(model, "qo")
    with pytest.raises(ValueError, match="on meta"):
        goh.composition_graph(model.to("meta"))
    with pytest.raises(FileNotFoundError, match="config.json"):
        goh.composition_graph(tmp_path)
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=13, hidden_size=10, n_layer=2, n_head=5))
    with pytest.raises(ValueError, match="transformer.h.0 has input_layernorm, self_attention"):
        goh.composition_graph(bloom)
    with pytest.raises(ValueError, match="edges between its layers"):
        goh.composition_graph(goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, num_layers=1)))


@pytest.mark.parametrize("norm", [nn.LayerNorm(7), nn.LayerNorm(6, bias=False), nn.RMSNorm(5, eps=1e-6)])
def test_a_norm_is_its_gain_times_the_scale_of_the_token(norm):
    norm = norm.double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    width = norm.weight.numel()
    x = torch.randn(3, width).double()
    found = gain_of(norm, width)
    bias = getattr(norm, "bias", None)
    torch.testing.assert_close(found.weight, norm.weight.detach(), rtol=1e-9, atol=1e-9)
    linear = found(x) * scale_of(norm, x, found) + (0 if bias is None else bias)
    torch.testing.assert_close(linear, norm(x), rtol=1e-9, atol=1e-9)
