from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import torch
from ranks import start
from safetensors.torch import load_file, save_file
from torch import nn

import gohgraph as goh
from gohgraph.common import checkpoint
from gohgraph.common.checkpoint import PretrainedMixin, load_pretrained, save_pretrained


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    vocab_size: int = 7
    d_model: int = 5
    edges: int = 3

    def to_dict(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"Expected known keys (got {sorted(unknown)}). Remove them.")
        return cls(**values)


class Tiny(PretrainedMixin, nn.Module):
    """Tied embeddings, an integer buffer shared by two modules, an empty buffer and one that is not saved."""

    config_class = TinyConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.transposed = nn.Parameter(torch.randn(config.d_model, config.edges).t())
        self.register_buffer("edge_index", torch.zeros(2, config.edges, dtype=torch.long))
        self.register_buffer("same_edge_index", self.edge_index)
        self.register_buffer("no_edges", torch.zeros(2, 0, dtype=torch.long))
        self.register_buffer("cache", torch.ones(3), persistent=False)


class Other(Tiny):
    pass


@pytest.fixture
def model():
    model = Tiny(TinyConfig())
    model.edge_index.copy_(torch.tensor([[0, 1, 2], [2, 0, 1]]))
    return model


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_same(left, right):
    assert left.config == right.config
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


def test_round_trip_keeps_every_tensor_and_the_tie(model, tmp_path):
    model.save_pretrained(tmp_path / "run" / "model")
    loaded = Tiny.from_pretrained(tmp_path / "run" / "model")
    assert_same(model, loaded)
    assert loaded.head.weight is loaded.embedding.weight
    assert names(tmp_path / "run" / "model") == ["config.json", "model.safetensors"]
    assert "head.weight" not in load_file(tmp_path / "run" / "model" / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_of_the_file_is_kept(model, tmp_path, dtype):
    model.to(dtype).save_pretrained(tmp_path)
    loaded = Tiny.from_pretrained(tmp_path)
    assert_same(model, loaded)
    assert loaded.head.weight is loaded.embedding.weight


def test_loading_leaves_the_random_state(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    Tiny.from_pretrained(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_config_file_has_the_documented_keys(model, tmp_path):
    model.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    assert document.keys() == {"model", "format", "gohgraph", "config"}
    assert (document["model"], document["format"]) == ("Tiny", 1)
    assert document["config"] == {"vocab_size": 7, "d_model": 5, "edges": 3}


def test_loading_writes_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / ".config.json.new")
    assert_same(model, Tiny.from_pretrained(tmp_path))
    assert names(tmp_path) == [".config.json.new", "model.safetensors"]


class Crash(BaseException):
    """Neither Exception nor OSError: nothing may swallow it."""


STEPS = ["write_text", "save_model", "half_save_model", "replace_weights", "replace_config"]


def crash_at(step, monkeypatch):
    replace, save_model = os.replace, checkpoint.save_model

    broken_target = {"replace_weights": "model.safetensors", "replace_config": "config.json"}.get(step)

    def broken_replace(source, target):
        if os.path.basename(target) == broken_target:
            raise Crash
        replace(source, target)

    def broken_save_model(model, path, metadata):
        if step == "half_save_model":
            save_model(model, path, metadata=metadata)
            os.truncate(path, os.path.getsize(path) // 2)
        if step in ("save_model", "half_save_model"):
            raise Crash
        save_model(model, path, metadata=metadata)

    def half_write_text(path, text, flush):
        path.write_text(text[: len(text) // 2])
        raise Crash

    monkeypatch.setattr(os, "replace", broken_replace)
    monkeypatch.setattr(checkpoint, "save_model", broken_save_model)
    if step == "write_text":
        monkeypatch.setattr(checkpoint, "write_text_whole", half_write_text)


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_leaves_the_old_or_the_new_checkpoint(model, tmp_path, step):
    model.save_pretrained(tmp_path)
    new = Tiny(TinyConfig(d_model=11))
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Crash):
        crash_at(step, monkeypatch)
        new.save_pretrained(tmp_path)
    assert_same(new if step == "replace_config" else model, Tiny.from_pretrained(tmp_path))
    assert ".model.safetensors.new" not in names(tmp_path)


@pytest.mark.parametrize("second", STEPS)
@pytest.mark.parametrize("first", STEPS)
def test_two_crashes_in_a_row_and_a_good_save(model, tmp_path, first, second):
    model.save_pretrained(tmp_path)
    survivor = model
    for step, width in ((first, 11), (second, 13)):
        new = Tiny(TinyConfig(d_model=width))
        with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Crash):
            crash_at(step, monkeypatch)
            new.save_pretrained(tmp_path)
        # A save after a crash at the last step begins with that step and crashes there before its commit.
        if step == "replace_config" and survivor is model:
            survivor = new
        assert_same(survivor, Tiny.from_pretrained(tmp_path))
    last = Tiny(TinyConfig(d_model=17))
    last.save_pretrained(tmp_path)
    assert_same(last, Tiny.from_pretrained(tmp_path))
    assert names(tmp_path) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_in_the_first_save_is_a_missing_file_or_the_whole_model(model, tmp_path, step):
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Crash):
        crash_at(step, monkeypatch)
        model.save_pretrained(tmp_path)
    if step == "replace_config":
        assert_same(model, Tiny.from_pretrained(tmp_path))
    else:
        with pytest.raises(FileNotFoundError, match=r"Expected model\.safetensors"):
            Tiny.from_pretrained(tmp_path)


def die_at(target, folder):
    """Saves a model, in a process that ends as by SIGKILL where the file would be replaced."""
    replace = os.replace

    def kill(source, path):
        if os.path.basename(path) == target:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, path)

    os.replace = kill
    Tiny(TinyConfig(d_model=11)).save_pretrained(folder)


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("target, width", [("model.safetensors", 5), ("config.json", 11)])
def test_a_killed_process_leaves_a_whole_checkpoint(model, tmp_path, target, width):
    model.save_pretrained(tmp_path)
    process = start(die_at, target, tmp_path)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert Tiny.from_pretrained(tmp_path).config.d_model == width
    model.save_pretrained(tmp_path)
    assert_same(model, Tiny.from_pretrained(tmp_path))
    assert names(tmp_path) == ["config.json", "model.safetensors"]


def rewrite(path, **changes):
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **changes}))


def truncate(path):
    os.truncate(path, os.path.getsize(path) - 10)


NOT_WHOLE = "Expected a whole safetensors file"
NOT_OURS = "Expected a gohgraph checkpoint"
DAMAGE = {
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), NOT_WHOLE),
    "garbage weights": (lambda f: (f / "model.safetensors").write_bytes(b"\x07" * 999), NOT_WHOLE),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), NOT_WHOLE),
    "foreign weights": (
        lambda f: save_file({"a": torch.ones(2)}, f / "model.safetensors"),
        "Expected weights written by gohgraph",
    ),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "Expected JSON in"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "Expected JSON in"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), NOT_OURS + r".*\(got list\)"),
    "foreign config": (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), NOT_OURS),
    "other format": (
        lambda f: rewrite(f / "config.json", format=2),
        r"Expected checkpoint format 1 .*\(got 2\)",
    ),
    "other config": (
        lambda f: rewrite(f / "config.json", config={"vocab_size": 7, "d_model": 6, "edges": 3}),
        r"Expected config\.json and model\.safetensors of one .*config\.d_model is 6, the weights have 5",
    ),
    "other class": (
        lambda f: Other(TinyConfig()).save_pretrained(f),
        r"Expected a checkpoint of Tiny .*\(got one of Other\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_sentence(model, tmp_path, name):
    damage, sentence = DAMAGE[name]
    model.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=sentence) as caught:
        Tiny.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def resave(folder, change):
    """Write the weights again with other tensors or another document under the same metadata key."""
    document = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(document, tensors)
    text = json.dumps(document)
    (folder / "config.json").write_text(text)
    metadata = {checkpoint.METADATA_KEY: text, "head.weight": "embedding.weight"}
    save_file(tensors, folder / "model.safetensors", metadata=metadata)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda d, t: d["config"].update(depth=3), r"Expected a configuration of Tiny .*\['depth'\]"),
        (
            lambda d, t: t.update(transposed=torch.ones(2, 5)),
            r"Expected shape \[3, 5\] for 'transposed' .*shape \[2, 5\]",
        ),
        (lambda d, t: t.pop("edge_index"), r"Expected shape \[2, 3\] for 'edge_index' .*\(got none\)"),
        (lambda d, t: t.update(extra=torch.ones(2)), r"Expected no such tensor for 'extra'"),
    ],
)
def test_weights_that_do_not_fit_the_model(model, tmp_path, change, sentence):
    model.save_pretrained(tmp_path)
    resave(tmp_path, lambda document, tensors: tensors.update(same_edge_index=tensors["edge_index"].clone()))
    assert_same(model, Tiny.from_pretrained(tmp_path))
    resave(tmp_path, change)
    with pytest.raises(ValueError, match=sentence):
        Tiny.from_pretrained(tmp_path)


def test_missing_folder_and_files(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected a checkpoint folder"):
        load_pretrained(Tiny, tmp_path / "nowhere")
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"Expected config\.json in"):
        load_pretrained(Tiny, tmp_path)


def test_saving_where_nothing_can_be_written(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="Expected a folder that can be written"):
        save_pretrained(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("topology", ["complete", ((0, 2), (2, 1), (4, 0))])
def test_the_language_model_round_trip(tmp_path, tie, topology):
    outputs = goh.SiteConfig(topology=topology, rounds=2, cross_layer=1, norm=True)
    graphs = goh.HeadGraphConfig(outputs=outputs, scores=goh.SiteConfig.ring(2))
    config = goh.TransformerConfig(
        29, d_model=20, num_heads=5, num_layers=3, d_ff=7, tie_embeddings=tie, head_graph=graphs
    )
    model = goh.LanguageModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    loaded = goh.LanguageModel.from_pretrained(tmp_path).eval()
    assert_same(model, loaded)
    graphs, same = (
        {name: module.edge_index for name, module in which.named_modules() if hasattr(module, "edge_index")}
        for which in (model, loaded)
    )
    assert len(graphs) == 6 and graphs.keys() == same.keys()
    assert all(torch.equal(graphs[name], same[name]) for name in graphs)
    tokens = torch.randint(29, (2, 13))
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    with pytest.raises(ValueError, match=r"Expected a checkpoint of Transformer .*\(got one of LanguageModel\)"):
        goh.Transformer.from_pretrained(tmp_path)
