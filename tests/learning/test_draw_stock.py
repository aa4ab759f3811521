from __future__ import annotations

import pytest
import torch
import transformers as hf
from helpers import moved
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers_models import IDS, SHAPE, build

import gohgraph as goh
from gohgraph.cli import main

WORDS = "heads talk to and some of them listen birds sing".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A causal and a masked model with a tokenizer of words, and a vision model."""
    root = tmp_path_factory.mktemp("stock")
    vocabulary = {"[UNK]": 0, "[MASK]": 1, **{word: number + 2 for number, word in enumerate(WORDS)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", mask_token="[MASK]")
    torch.manual_seed(0)
    shape = {**SHAPE, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**shape, **IDS))
    plain = hf.BertModel(hf.BertConfig(**SHAPE))
    for name, model in {"llama": llama, "bert": build("bert"), "vit": build("vit"), "plain": plain}.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def test_a_stock_model_is_shown_by_attribution_on_a_text(folders, tmp_path, capsys):
    out = tmp_path / "heads.png"
    text = ["--text", "heads talk to heads and some of them listen"]
    assert main(["draw", str(folders / "llama"), *text, "--out", str(out)]) == 0
    assert out.stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "llama: attribution to log p of every next token, 9 tokens of \u201c" in printed
    assert "0.0 -> 1.0kv" in printed
    files = tmp_path / "heads.json"
    other = ["--against", "birds sing to birds and some of them listen", "--target", "sing|talk"]
    assert main(["draw", str(folders / "llama"), *text, *other, "--out", str(files)]) == 0
    said = "logit('sing') - logit('talk') after the last token, 'listen', 9 tokens of "
    assert said in capsys.readouterr().out
    model = hf.LlamaForCausalLM.from_pretrained(folders / "llama").eval()
    tokens = torch.tensor([[2, 3, 4, 2, 5, 6, 7, 8, 9]])
    against = torch.tensor([[10, 11, 4, 10, 5, 6, 7, 8, 9]])
    metric = lambda output: output.logits[:, -1, 11] - output.logits[:, -1, 3]  # noqa: E731
    expected = goh.attribution_graph(model, tokens, against=against, metric=metric)
    torch.testing.assert_close(goh.load_head_graph(files).mean, expected.mean)


def test_what_stock_heads_attend_to(folders, tmp_path, capsys):
    arguments = ["draw", str(folders / "llama"), "--text", "heads talk to heads and some", "--attention"]
    assert main([*arguments, "--layer", "1", "--head", "5", "--out", str(tmp_path / "head.svg")]) == 0
    assert "llama: attention over 6 tokens" in capsys.readouterr().out
    assert main([*arguments, "--out", str(tmp_path / "heads.html")]) == 0
    assert "sender pattern" in (tmp_path / "heads.html").read_text()


def test_weights_alone_and_pages(folders, tmp_path, capsys):
    page = tmp_path / "heads.html"
    assert main(["draw", str(folders / "vit"), "--from", "weights", "--out", str(page)]) == 0
    assert "composition of weights" in capsys.readouterr().out and "bokeh" in page.read_text()
    own = goh.LanguageModel(goh.TransformerConfig(256, d_model=8, num_heads=2, num_layers=2, d_ff=8))
    own.save_pretrained(tmp_path / "own")
    out = ["--out", str(tmp_path / "own.csv"), "--text", "heads talk"]
    assert main(["draw", str(tmp_path / "own"), "--from", "attribution", *out]) == 0
    assert goh.load_head_graph(tmp_path / "own.csv").num_edges == 12


def test_masked_models_have_masked_tokens(folders, tmp_path, capsys):
    out = ["--out", str(tmp_path / "bert.json"), "--text", "heads talk to heads and some of them listen"]
    assert main(["draw", str(folders / "bert"), *out]) == 0
    assert "every 7th token, masked" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--from", "graph"], "Expected --from weights or attribution"),
        (["--from", "weights", "--against", "zero"], "Expected --against with --from attribution"),
        (["--from", "weights", "--text", "heads talk"], "Expected no --text for --from weights"),
        (["--no-learned"], "Expected --no-learned with head graphs"),
        (["--from", "weights", "--attention"], "Expected --attention of a model that reads a text"),
        (["--view", "circle", "--out", "x.png"], "Expected --view network"),
        (["--text", "heads"], "at least two"),
        (["--text", "heads talk", "--target", "sing|sing"], "Expected --target WORD"),
        (["--text", "heads talk to heads", "--target", "sing", "--length", "2"], "a text of up to --length 2"),
        (["--text", "heads talk", "--against", "heads"], "Expected --against of 2 tokens"),
        (["--text", "heads talk", "--against", "mean"], "Expected several examples for against='mean' (got 1"),
        (["--text", "heads talk", "--layer", "1", "--out", "x.png"], "Expected --layer with --attention for --from at"),
        (["--from", "weights", "--layer", "1", "--out", "x.png"], "Expected --layer with --attention for --from wei"),
    ],
)
def test_flags_that_do_not_fit_are_refused(folders, capsys, monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main(["draw", str(folders / "llama"), *flags]) != 0
    assert message in capsys.readouterr().err


def test_models_without_text_have_weights_alone(folders, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["draw", str(folders / "vit"), "--text", "heads talk"]) != 0
    assert "--from weights" in capsys.readouterr().err


def test_an_untrained_graph_says_why_its_views_are_refused(folders, tmp_path, capsys):
    model = hf.AutoModelForCausalLM.from_pretrained(folders / "llama")
    goh.convert(model, goh.HeadGraphConfig())
    goh.save_converted(model, tmp_path / "converted")
    for view in ("circle", "matrix", "tokens"):
        call = ["draw", str(tmp_path / "converted"), "--tokenizer", str(folders / "llama"), "--text", "heads talk"]
        assert main([*call, "--view", view, "--out", str(tmp_path / "x.png")]) == 2
        refused = capsys.readouterr().err
        assert "Expected --view network" in refused and "untrained, every weight is 0" in refused


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("view", [["--out", "x.json"], ["--attention", "--out", "x.png"]])
def test_a_text_that_is_cut_says_so(folders, tmp_path, monkeypatch, capsys, name, view):
    monkeypatch.chdir(tmp_path)
    words = "heads talk to heads and some of them listen"
    (tmp_path / "text.txt").write_text(words)
    for text in (["--text", words], ["--text-file", "text.txt"]):
        assert main(["draw", str(folders / name), *text, "--length", "5", *view]) == 0
        assert "the first 5 of the text's 9 tokens are read" in capsys.readouterr().out
        assert main(["draw", str(folders / name), *text, *view]) == 0
        assert "are read" not in capsys.readouterr().out


@pytest.mark.parametrize("against", [None, "birds sing to birds"])
def test_an_encoder_without_a_task_is_shown_by_its_embedding(folders, tmp_path, capsys, against):
    """The mean over tokens, from nothing or another text's to this one's."""
    from gohgraph.analysis.metrics import embedding_share

    other = [] if against is None else ["--against", against]
    out = tmp_path / "heads.json"
    assert main(["draw", str(folders / "plain"), "--text", "heads talk to heads", *other, "--out", str(out)]) == 0
    assert "attribution to the embedding, mean over tokens, 4 tokens of" in capsys.readouterr().out
    model = hf.BertModel.from_pretrained(folders / "plain").eval()
    tokens, others = torch.tensor([[2, 3, 4, 2]]), torch.tensor([[10, 11, 4, 10]])
    pool = lambda output: output.last_hidden_state.mean(dim=1)  # noqa: E731
    with torch.no_grad():
        own, its = pool(model(tokens)), pool(model(others))
    metric = embedding_share(own, torch.zeros_like(own) if against is None else its, pool)
    expected = goh.attribution_graph(model, tokens, against="zero" if against is None else others, metric=metric)
    torch.testing.assert_close(goh.load_head_graph(out).mean, expected.mean)
    assert main(["draw", str(folders / "plain"), "--text", "heads talk", "--target", "sing", "--out", str(out)]) == 2
    assert "Expected no --target" in capsys.readouterr().err


def test_a_converted_encoder_has_the_importance_of_its_embedding(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = hf.BertModel.from_pretrained(folders / "plain")
    goh.convert(model, goh.HeadGraphConfig(goh.SiteConfig(edges="static")))
    call = ["draw", "converted", "--tokenizer", str(folders / "plain"), "--text", "heads talk to heads and some"]
    goh.save_converted(model, "converted")
    assert main([*call, "--out", "heads.json"]) == 0
    assert "untrained, every weight is 0, so it is shown --from attribution" in capsys.readouterr().out
    moved(model)
    goh.save_converted(model, "converted")
    assert main([*call, "--length", "3", "--out", "heads.json"]) == 0
    said = capsys.readouterr().out
    assert "mean edge weights over 6 tokens" in said and "as a share of the embedding" in said
    assert goh.load_head_graph("heads.json").edge_importance.abs().max() > 0


@pytest.mark.parametrize("kind", ["T5Model", "BartModel", "ViTModel", "WhisperModel", "CLIPModel", "NoSuchModel"])
def test_models_of_more_than_one_text_have_weights_alone(tmp_path, kind):
    """Two texts, pictures, sounds: which is told by the folder."""
    from gohgraph.learning.readers.loading import kind_in

    config = getattr(hf, kind.replace("Model", "Config"), hf.BertConfig)()
    config.architectures = [kind]
    config.save_pretrained(tmp_path)
    assert kind_in(tmp_path) is None
    hf.BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path)
    assert kind_in(tmp_path).what == "an encoder without a task"
