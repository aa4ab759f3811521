"""Converted transformers models, and what reads text with them."""

from __future__ import annotations

import pytest
import torch

import gohgraph as goh
from gohgraph.cli import main
from gohgraph.learning.readers.loading import load_reader

WORDS = "heads talk to heads, and some of them listen"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama with random edges and a tokenizer of its own, as `save_converted` writes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator([WORDS] * 3, trainers.BpeTrainer(vocab_size=270, initial_alphabet=letters))
    torch.manual_seed(0)
    shape = {"hidden_size": 20, "intermediate_size": 7, "num_hidden_layers": 2, "num_attention_heads": 5}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=270, max_position_embeddings=64, **shape))
    goh.convert(model)
    for module in model.modules():
        if isinstance(module, goh.HeadGraphConv):
            for parameter in module.edges.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("models") / "llama"
    goh.save_converted(model, folder)
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder / "backbone")
    return folder


def test_a_converted_model_reads_text_by_its_tokenizer(llama):
    source = load_reader(llama)
    tokens = source.tokens.words(WORDS.encode())
    strings = source.tokens.strings(tokens)
    assert "".join(strings) == WORDS and len(strings) < len(WORDS) and source.longest == 64
    loss = source.loss(source.model, ({"input_ids": tokens[None, :-1]}, tokens[None, 1:]))
    expected = source.model(input_ids=tokens[None], labels=tokens[None]).loss
    torch.testing.assert_close(loss, expected)


def test_own_models_read_bytes(tmp_path):
    shape = {"d_model": 30, "num_heads": 5, "num_layers": 2, "d_ff": 11, "max_length": 64}
    config = goh.TransformerConfig(256, **shape, positions="learned")
    goh.LanguageModel(config).save_pretrained(tmp_path / "model")
    source = load_reader(tmp_path / "model")
    assert source.longest == 64 and source.tokens.strings(source.tokens.words(b"h")) == ["h"]


@pytest.mark.parametrize("out", ["heads.html", "circle.png", "heads.json"])
def test_the_tool_shows_converted_models(llama, tmp_path, capsys, out):
    flags = [str(llama), "--out", str(tmp_path / out), "--text", WORDS, "--length", "13"]
    assert main(["draw", *flags]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / out).stat().st_size > 1000
    assert printed.count(" -> ") == 20 and "nan" not in printed


def test_pruning_and_differences_of_converted_models(llama, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("quite another text, with other words in it")
    flags = [str(llama), "--text", WORDS, "--length", "13"]
    assert main(["draw", *flags, "--view", "pruning", "--out", str(tmp_path / "pruning.png")]) == 0
    difference = ["--view", "difference", "--compare", str(other), "--out", str(tmp_path / "difference.png")]
    assert main(["draw", *flags, *difference]) == 0


def test_a_converted_model_without_tokenizer_is_refused(llama, tmp_path, capsys, monkeypatch):
    model, bare, asked = load_reader(llama).model, tmp_path / "bare", []

    def nothing(place):
        asked.append(place)
        raise OSError("no tokenizer")

    goh.save_converted(model, bare)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", nothing)
    assert main(["draw", str(bare), "--out", str(tmp_path / "x.png")]) == 2
    assert "Expected the model's tokenizer" in capsys.readouterr().err
    # A folder that is not there would be looked for on the hub, for a minute where there is no network.
    assert str(bare) in asked and str(bare / "backbone") not in asked
