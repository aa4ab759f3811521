"""The training loop: resuming, run folders, checkpoints, schedules and parameter groups."""

from __future__ import annotations

import builtins
import csv
import json
import math
import signal
from functools import partial

import pytest
import torch
from torch import nn

from gohgraph import HeadGraphConfig, LanguageModel, SiteConfig, TransformerConfig
from gohgraph.learning.data.corpus import sample_batch
from gohgraph.learning.engine import make_engine
from gohgraph.learning.loop import TrainConfig, Training, TrainingInterrupted, train, train_together
from gohgraph.learning.optim import parameter_groups
from gohgraph.learning.regimes.language import next_token_output, window_losses
from gohgraph.learning.run_folder import last_folder, new_folder
from gohgraph.parallel.layout import ParallelConfig

# The module's one uninterrupted run, which is held against others, is drawn.
TEXT = torch.randint(97, 123, (5003,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
WINDOWS = {"batch_size": 3, "length": 17}
CONFIG = TrainConfig(
    steps=23, optimizer="adamw", warmup=3, log_every=5, eval_every=10,
    checkpoint_every=7, learning_rate=0.01, device="cpu"
)  # fmt: skip
batch = partial(sample_batch, TEXT, seed=5, **WINDOWS)


def model(dropout: float = 0.2) -> LanguageModel:
    torch.manual_seed(11)
    shape = {"d_model": 14, "num_heads": 7, "num_layers": 2, "d_ff": 13, "dropout": dropout}
    return LanguageModel(TransformerConfig(256, **shape, head_graph=HeadGraphConfig()))


def evaluate(model: nn.Module) -> dict[str, float]:
    assert not model.training and not torch.is_grad_enabled()
    return {"validation_loss": window_losses(model, TEXT, **WINDOWS, limit=5).mean().item()}


def changed(**values) -> TrainConfig:
    return TrainConfig(**{**CONFIG.to_dict(), **values})


def learned(rows):
    """Rows without what a clock decides."""
    return [[row[name] for name in ("step", "loss", "validation_loss", "lr")] for row in rows]


def interrupted_at(number: int):
    def stopping(index: int):
        if index == number:
            signal.raise_signal(signal.SIGINT)
        return batch(index)

    return stopping


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder, trained = tmp_path_factory.mktemp("runs") / "whole", model()
    return trained, train(trained, batch, next_token_output, CONFIG, folder, evaluate=evaluate), folder


def test_it_learns_and_leaves_a_run_folder(uninterrupted):
    _, rows, folder = uninterrupted
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 23]
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert [row["step"] for row in rows if row["validation_loss"] is not None] == [10, 20, 23]
    assert {file.name for file in folder.iterdir()} == {"config.json", "log.csv", "curves.png", "checkpoints"}
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-000021", "step-000023"]
    saved = json.loads((folder / "checkpoints" / "step-000023" / "trainer.json").read_text())
    assert saved["step"] == 23 and saved["settings"]["training"]["warmup"] == 3
    with open(folder / "log.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in written] == [row["loss"] for row in rows]
    assert all(float(row["tokens_per_second"]) > 0 for row in written)


@pytest.mark.parametrize("step", [0, 11, 22])
def test_resumed_equals_uninterrupted_with_dropout(uninterrupted, tmp_path, step):
    whole, rows, _ = uninterrupted
    with pytest.raises(TrainingInterrupted, match=f"step {step + 1}"):
        train(model(), interrupted_at(step), next_token_output, CONFIG, tmp_path, evaluate=evaluate)
    assert (tmp_path / "checkpoints" / f"step-{step + 1:06d}").is_dir()
    torch.manual_seed(1234)
    resumed = model()
    torch.rand(17)
    again = train(resumed, batch, next_token_output, CONFIG, tmp_path, evaluate=evaluate, resume=True)
    assert learned(again) == learned(rows)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_resuming_cuts_off_the_log_after_the_checkpoint(uninterrupted, tmp_path):
    _, rows, _ = uninterrupted

    def failing(index: int):
        if index == 18:
            raise RuntimeError("power cut")
        return batch(index)

    with pytest.raises(RuntimeError, match="power cut"):
        train(model(), failing, next_token_output, CONFIG, tmp_path, evaluate=evaluate)
    assert "\n15," in (tmp_path / "log.csv").read_text()
    again = train(model(), batch, next_token_output, CONFIG, tmp_path, evaluate=evaluate, resume=True)
    assert learned(again) == learned(rows)
    assert (tmp_path / "log.csv").read_text().count("\n15,") == 1


def test_a_finished_run_resumes_to_the_same_log(uninterrupted):
    _, rows, folder = uninterrupted
    assert train(model(), batch, next_token_output, CONFIG, folder, evaluate=evaluate, resume=True) == rows


def test_turns_do_not_disturb_each_other(uninterrupted, tmp_path):
    _, rows, _ = uninterrupted
    trainings = [
        Training(model(), batch, next_token_output, CONFIG, tmp_path / name, evaluate=evaluate) for name in ("a", "b")
    ]
    for history in train_together(trainings, block=4):
        assert learned(history) == learned(rows)


def test_interrupted_turns_all_resume(uninterrupted, tmp_path):
    _, rows, _ = uninterrupted

    def start(data, resume=False):
        common = {"evaluate": evaluate, "resume": resume}
        return [
            Training(model(), source, next_token_output, CONFIG, tmp_path / name, **common)
            for name, source in (("a", batch), ("b", data))
        ]

    with pytest.raises(TrainingInterrupted):
        train_together(start(interrupted_at(9)), block=4)
    for history in train_together(start(batch, resume=True), block=4):
        assert learned(history) == learned(rows)


@pytest.mark.parametrize("stops", [False, True])
def test_a_run_that_diverges_leaves_the_others_their_turns(uninterrupted, tmp_path, stops):
    _, rows, _ = uninterrupted

    def lost(model, tensors):
        return next_token_output(model, tensors).loss * math.nan

    def start(data, resume=False):
        common = {"evaluate": evaluate, "resume": resume}
        trainings = [
            Training(model(), batch, lost, CONFIG, tmp_path / "lost", **common),
            Training(model(), data, next_token_output, CONFIG, tmp_path / "kept", **common),
        ]
        return trainings, train_together(trainings, block=4, may_diverge=True)

    if stops:
        with pytest.raises(TrainingInterrupted):
            start(interrupted_at(9))
    trainings, histories = start(batch, resume=stops)
    assert [training.has_diverged for training in trainings] == [True, False]
    assert [learned(history) for history in histories] == [[], learned(rows)]
    assert not list((tmp_path / "lost").glob("checkpoints/step-*"))


def test_accumulated_batches_are_one_large_batch(tmp_path):
    data = torch.randn(46, 5, 3, generator=torch.Generator().manual_seed(1))

    def run(batch, steps, accumulate):
        torch.manual_seed(2)
        layer = nn.Linear(3, 7).double()
        config = TrainConfig(steps=steps, accumulate=accumulate, learning_rate=0.1, log_every=1, device="cpu")
        loss = lambda model, x: (model(x.double()) - 1).square().mean()  # noqa: E731
        return layer, train(layer, batch, loss, config, tmp_path / str(accumulate))

    small, small_rows = run(lambda index: data[index], 23, 2)
    large, large_rows = run(lambda index: data[2 * index : 2 * index + 2].flatten(0, 1), 23, 1)
    torch.testing.assert_close(small.weight, large.weight, rtol=0, atol=1e-10)
    assert [row["loss"] for row in small_rows] == pytest.approx([row["loss"] for row in large_rows], abs=1e-6)


def test_it_stops_early_and_a_resumed_run_at_the_same_step(tmp_path):
    losses = dict(zip(range(2, 24, 2), [3.0, 2.0, 2.5, 2.0, 1.0, 1.5, 1.0, 1.2, 0.1, 0.1, 0.1], strict=True))
    config = changed(eval_every=2, log_every=1, checkpoint_every=5, patience=3)

    def run(name, data=batch, resume=False):
        training = Training(model(), data, next_token_output, config, tmp_path / name, resume=resume,
                            evaluate=lambda model: {"validation_loss": losses[training.step]})  # fmt: skip
        return train_together([training])[0]

    rows = run("whole")
    # The lowest was at step 10, equals do not count.
    assert rows[-1]["step"] == 16 and (tmp_path / "whole" / "checkpoints" / "step-000016").is_dir()
    with pytest.raises(TrainingInterrupted):
        run("part", interrupted_at(12))
    assert learned(run("part", resume=True)) == learned(rows) == learned(run("whole", resume=True))


def test_further_measures_get_columns_of_their_own(tmp_path):
    measure = lambda model: {"validation_loss": 1.0, "accuracy": 0.5}  # noqa: E731
    seen = []
    train(model(), batch, next_token_output, changed(steps=5, eval_every=2, log_every=1), tmp_path, evaluate=measure,
          on_evaluate=seen.append)  # fmt: skip
    assert [row["step"] for row in seen] == [2, 4, 5]
    with open(tmp_path / "log.csv", newline="") as file:
        assert [row["accuracy"] for row in csv.DictReader(file)] == ["", "0.5", "", "0.5", "0.5"]


def test_bf16_trains_and_leaves_the_model_as_it_was(tmp_path):
    trained, fresh = model(0.0), model(0.0)
    rows = train(trained, batch, next_token_output, changed(precision="bf16"), tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"] and trained.embedding.tokens.weight.dtype == torch.float32
    # Without the run's autocast again: exactly what a float32 model of these weights computes.
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(trained(batch(0)[0]).logits, fresh(batch(0)[0]).logits)


def test_a_fresh_run_does_not_overwrite_one(uninterrupted):
    _, _, folder = uninterrupted
    before = (folder / "log.csv").read_bytes()
    with pytest.raises(ValueError, match="Expected a folder without a run"):
        train(model(), batch, next_token_output, CONFIG, folder)
    assert (folder / "log.csv").read_bytes() == before


def test_resuming_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="Expected a run to resume"):
        train(model(), batch, next_token_output, CONFIG, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_resuming_with_another_configuration_names_the_keys(tmp_path):
    settings = {"model": {"d_model": 14, "outputs": {"rank": None}}, "flags": {"run": "here"}}
    train(model(), batch, next_token_output, changed(steps=5), tmp_path, settings=settings)
    other = {"model": {"d_model": 14, "outputs": {"rank": 3}}, "flags": {"run": "there"}}
    with pytest.raises(ValueError, match=r"model.outputs.rank = 3 for None; training.learning_rate = 0.5 for 0.01"):
        faster = changed(steps=5, learning_rate=0.5)
        train(model(), batch, next_token_output, faster, tmp_path, settings=other, resume=True)
    file = tmp_path / "config.json"
    older = json.loads(file.read_text())
    # As a version before these settings wrote it.
    del older["training"]["schedule"], older["training"]["patience"]
    file.write_text(json.dumps(older))
    same = changed(steps=5, checkpoint_every=2, keep_checkpoints=1, log_every=1)
    train(model(), batch, next_token_output, same, tmp_path, settings={**settings, "flags": {}}, resume=True)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "scheduler.bin", "trainer.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    train(model(), batch, next_token_output, changed(steps=8), tmp_path)
    last = tmp_path / "checkpoints" / "step-000008"
    content = (last / name).read_bytes()
    (last / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="Expected a whole checkpoint .*step-000008") as error:
        train(model(), batch, next_token_output, changed(steps=8), tmp_path, resume=True)
    assert "\n" not in str(error.value)


def test_a_half_written_checkpoint_is_not_taken(uninterrupted, tmp_path, monkeypatch):
    _, rows, _ = uninterrupted
    from accelerate import Accelerator

    def failing(self, folder):
        save(self, folder)
        if "done" in seen:
            raise OSError("disk full")
        seen.append("done")

    seen: list[str] = []
    save = Accelerator.save_state
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", failing)
        with pytest.raises(OSError, match="disk full"):
            train(model(), batch, next_token_output, CONFIG, tmp_path, evaluate=evaluate)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-000007"]
    again = train(model(), batch, next_token_output, CONFIG, tmp_path, evaluate=evaluate, resume=True)
    assert learned(again) == learned(rows)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    def loss(model, tensors):
        return next_token_output(model, tensors).loss * (math.nan if torch.equal(tensors[0], batch(3)[0]) else 1)

    with pytest.raises(FloatingPointError, match="finite loss .got nan at step 4"):
        train(model(), batch, loss, changed(checkpoint_every=5), tmp_path)
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_accelerate_missing_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.split(".")[0] == "accelerate":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"gohgraph\[train\]"):
        train(model(), batch, next_token_output, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_impossible_devices_and_precisions_touch_nothing(tmp_path):
    wrong = [changed(precision="fp16")]
    if not torch.cuda.is_available():
        wrong.append(changed(device="cuda"))
    for config in wrong:
        with pytest.raises(ValueError, match="Expected"):
            train(model(), batch, next_token_output, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0}, {"steps": 2.5}, {"learning_rate": math.nan}, {"learning_rate": 0.0}, {"warmup": 23},
        {"min_lr_ratio": 1.5}, {"weight_decay": -1}, {"betas": (0.9, 1.0)}, {"betas": 0.9}, {"grad_clip": 0},
        {"graph_lr_factor": -1}, {"accumulate": 0}, {"precision": "fp8"}, {"compile": "yes"}, {"device": "tpu"},
        {"seed": True}, {"patience": 0}, {"schedule": "linear"}, {"schedule": "inverse-sqrt", "warmup": 0},
    ],
)  # fmt: skip
def test_wrong_settings_are_named(values):
    with pytest.raises((TypeError, ValueError), match=f"Expected.*{next(iter(values))}.*got.*Do "):
        changed(**values)


def test_groups_hold_every_parameter_once_and_spare_head_graphs():
    shape = {"d_model": 14, "num_heads": 7, "num_layers": 2, "d_ff": 13}
    graph = HeadGraphConfig(SiteConfig(rounds=2, norm=True), SiteConfig.ring(2, rank=3))
    network = LanguageModel(TransformerConfig(256, **shape, head_graph=graph))
    groups = {group["name"]: group for group in parameter_groups(network, changed(graph_lr_factor=3.0))}
    ids = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(parameter) for parameter in network.parameters()}
    inside = {id(p) for name, p in network.named_parameters() if "output_graph" in name or "score_graph" in name}
    assert inside and {id(parameter) for parameter in groups["head graphs"]["params"]} == inside
    assert all(parameter.dim() > 1 for parameter in groups["matrices"]["params"])
    assert [group["weight_decay"] for group in groups.values()] == [0.1, 0.0, 0.0]
    assert groups["head graphs"]["lr"] == pytest.approx(3 * groups["matrices"]["lr"])


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_refused(tmp_path):
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    assert [group["name"] for group in parameter_groups(layer, CONFIG)] == ["vectors"]
    layer.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameters"):
        train(layer, lambda step: torch.ones(2, 3), lambda model, x: model(x).sum(), CONFIG, tmp_path / "run")


def test_new_and_last_folders(tmp_path):
    path = tmp_path / "demo"
    assert last_folder(path) == new_folder(path) == path
    path.mkdir()
    assert last_folder(path) == path and new_folder(path) == tmp_path / "demo-2"
    new_folder(path).mkdir()
    assert last_folder(path) == tmp_path / "demo-2" and new_folder(path) == tmp_path / "demo-3"


@pytest.mark.parametrize("mode", ["fsdp", "tp"])
def test_sharded_training_is_refused_under_an_old_torch(mode, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    with pytest.raises(ValueError, match=r"Expected torch 2\.13 or newer for fsdp and tp \(got 2\.11\.0\)"):
        make_engine(CONFIG, model(), ParallelConfig((mode,)))
