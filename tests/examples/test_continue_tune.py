"""Continued training on a tiny scale: what the variants are, the table, going on, and models of the hub."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import load_script
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers_models import build, tokens

import gohgraph as goh
from gohgraph.learning.contests.matching import count_parameters

TEXT = "heads talk to heads, and some of them listen. " * 200


@pytest.fixture
def example(monkeypatch):
    example = load_script("examples", "continue_tune")

    def run_here(command):
        """The base is trained by its script in this process: to start another one takes longer."""
        assert command[0] == sys.executable
        script = Path(command[1])
        return SimpleNamespace(returncode=load_script(script.parent.name, script.stem).main(command[2:]))

    monkeypatch.setattr(example, "subprocess", SimpleNamespace(run=run_here))
    return example


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


def hub_model(folder):
    """A model and tokenizer as the hub has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=97, initial_alphabet=sorted(alphabet)[:60]))
    model = build("gpt2")
    four = type(model)(type(model.config)(**{**model.config.to_dict(), "n_head": 4, "n_embd": 20}))
    four.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


def own_model():
    return own_model_of(heads=4)


def own_model_of(heads):
    shape = {"d_model": 30 if heads == 5 else 24, "num_layers": 2, "d_ff": 11, "max_length": 23}
    return goh.LanguageModel(goh.TransformerConfig(256, num_heads=heads, **shape))


def batches(example, model):
    ids = tokens()
    return [(ids[:, :-1], ids[:, 1:])] * 2


@pytest.mark.parametrize("make", [own_model, lambda: build("llama", "sdpa")], ids=["own", "transformers"])
def test_variants_start_as_the_model_and_train_what_they_say(example, make):
    stock = make().eval()
    batch = batches(example, stock)[0]
    before = example.output_of(None, stock, batch)
    trained = {}
    for name in ("continued", "outputs", "graph-only", "lora"):
        model = copy.deepcopy(stock)
        config = example.prepare(model, name, [batch])
        assert example.output_of(config, model.eval(), batch).loss.item() == pytest.approx(before.loss.item(), abs=1e-6)
        trained[name] = count_parameters(model)
        names = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        if name in ("graph-only", "lora"):
            assert names and all(("lora_" if name == "lora" else "output_graph") in key for key in names)
    assert trained["continued"] < trained["outputs"] == trained["continued"] + trained["graph-only"]
    smallest_step = trained["lora"] / max(1, rank_of(stock, example, trained["lora"]))
    assert abs(trained["lora"] - trained["graph-only"]) <= smallest_step / 2 + 1


def rank_of(stock, example, parameters):
    model = copy.deepcopy(stock)
    example.add_lora(model, parameters)
    return next(parameter.shape[0] for name, parameter in model.named_parameters() if "lora_A" in name)


def test_routers_share_the_important_heads_and_start_as_the_model(example):
    stock = own_model().eval()
    batch = batches(example, stock)[0]
    before = stock(batch[0]).logits
    model = copy.deepcopy(stock)
    config = example.prepare(model, "moh", [batch])
    assert (config.routing.num_shared, config.routing.top_k) == (1, 2)
    for module in model.modules():
        if isinstance(module, goh.HeadRouter):
            module.top_k = module.num_routed
    torch.testing.assert_close(model(batch[0]).logits, before, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="Do leave out moh"):
        example.prepare(own_model_of(heads=5), "moh", [batch])


@pytest.mark.slow
def test_table_and_going_on(example, text, tmp_path, capsys):
    flags = ["--smoke", "--data", text, "--run", str(tmp_path / "run"), "--jobs", "1"]
    assert example.main(flags) == 0
    table = (tmp_path / "run" / "table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == ["before", *example.VARIANTS]
    before, *after = (float(row[3]) for row in rows[2:])
    assert all(loss < before for loss in after)
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    stamps = [file.stat().st_mtime_ns for file in sorted((tmp_path / "run" / "results").glob("*.json"))]
    assert len(stamps) == 5 and example.main(flags) == 0
    assert stamps == [file.stat().st_mtime_ns for file in sorted((tmp_path / "run" / "results").glob("*.json"))]
    assert table in capsys.readouterr().out
    run = tmp_path / "run" / "runs" / "moh-0.001-0"
    assert "load_cv" in (run / "log.csv").read_text()
    assert json.loads((run / "config.json").read_text())["training"]["optimizer"] == "adamw"


def test_a_model_of_the_hub(example, text, tmp_path):
    model = hub_model(tmp_path / "model")
    flags = ["--smoke", "--model", model, "--data", text, "--run", str(tmp_path / "run"), "--jobs", "1"]
    assert example.main(flags) == 0
    results = {file.stem: json.loads(file.read_text())["result"] for file in (tmp_path / "run" / "results").iterdir()}
    assert len(results) == 5 and not (tmp_path / "run" / "base").exists()
    assert len({result["before"] for result in results.values()}) == 1
    assert all(result["rows"][-1]["validation_loss"] < result["before"] for result in results.values())
    assert "load_cv" in results["moh-0.001-0"]["rows"][-1]


BAD = [(["--steps", "1"], "--steps of at"), (["--variants", "other"], "invalid choice"), (["--data", "no"], "no")]


@pytest.mark.parametrize("flags, message", BAD)
def test_bad_input_is_one_line(example, flags, message, tmp_path, capsys):
    folder = tmp_path / "base"
    own_model().save_pretrained(folder)
    assert example.main([*flags, "--model", str(folder), "--run", str(tmp_path / "run"), "--jobs", "1"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
