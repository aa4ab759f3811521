"""Gives a pretrained language model head graphs and trains on, beside training on without, beside LoRA.

    python examples/continue_tune.py --run runs/tune
    python examples/continue_tune.py --run runs/tune-hub --model HuggingFaceTB/SmolLM2-135M --data my.txt --steps 200

The model is a name or path of the Hugging Face hub, or a folder of `examples/train_language_model.py`, which makes one
first when there is none. That one has read Python's documentation; unless `--data` names another text, it trains on on
C++ headers. All variants start from the same model and read the same tokens in the same order; each has the learning
rate of a grid that was best on the first seed. The routers of `moh` keep the heads that matter most to the loss, start
as plain attention and come to their budget in the first half of the steps. An interrupted run goes on where it stopped
when it is called again.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gohgraph as goh
from gohgraph.analysis import head_importance
from gohgraph.common.command_line import ArgumentParser, fill_in, run
from gohgraph.common.tables import markdown_table, mean_and_deviation
from gohgraph.convert.conversion import find_blocks
from gohgraph.convert.head_order import share_important_heads
from gohgraph.drawing import draw_curves
from gohgraph.learning.contests.contest import Contest, Run
from gohgraph.learning.contests.grid import Grid, Point
from gohgraph.learning.contests.in_processes import InProcesses
from gohgraph.learning.contests.matching import count_parameters
from gohgraph.learning.contests.results import too_short
from gohgraph.learning.data.corpus import Corpus, load_corpus, sample_batch
from gohgraph.learning.data.domains import DOMAINS, load_domain
from gohgraph.learning.loop import TrainConfig, train
from gohgraph.learning.readers.tokens import encoder_of
from gohgraph.learning.regimes.language import window_losses
from gohgraph.learning.run_folder import write_text
from gohgraph.models.boundary import next_token_loss
from gohgraph.models.model_output import ModelOutput, model_output
from gohgraph.models.stacks import StackOutput

VARIANTS = {
    "continued": "trained on, without head graphs",
    "outputs": "trained on, with output graphs",
    "moh": "trained on, three quarters of the heads for each token",
    "graph-only": "output graphs alone, the model frozen",
    "lora": "LoRA on attention of as many parameters, the model frozen",
}
BASE_SCRIPT = Path(__file__).with_name("train_language_model.py")
EVALUATIONS, WINDOWS, IMPORTANCE_BATCHES = 4, 256, 16
# Of flags that the command line does not give: in full, and to see that it runs.
FULL = {"steps": 250, "length": 128, "batch_size": 8, "base_steps": 1500, "seeds": [0, 1, 2]}
FULL |= {"learning_rates": [3e-4, 1e-3, 3e-3, 1e-2]}
SMOKE = {"steps": 6, "length": 16, "batch_size": 2, "base_steps": 6, "seeds": [0], "learning_rates": [1e-3]}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run(_parser(), tune, argv)


def tune(flags: argparse.Namespace) -> None:
    """Trains what is missing, then writes and prints the table."""
    fill_in(flags, SMOKE if flags.smoke else FULL)
    if flags.steps < 2:
        raise ValueError(f"Expected --steps of at least 2 (got {flags.steps}). Do raise them.")
    # What cannot be read is told before anything is trained.
    _text(flags.data)
    folder = Path(flags.run)
    model = flags.model or _base(folder / "base", flags)
    common = {"model": str(model), "data": flags.data, "length": flags.length, "batch_size": flags.batch_size}

    def arguments(run: Run) -> dict[str, Any]:
        return {"name": run.name, **common, "steps": flags.steps, "learning_rate": run.rate, "seed": run.seed}

    train_one = partial(_train, str(folder / "runs"))
    runner = InProcesses(train_one, arguments, folder / "results", loss=_last_loss, jobs=flags.jobs)
    grid = Grid.of_rates(flags.learning_rates)
    results = Contest(dict.fromkeys(flags.variants), flags.seeds, grid, folder).hold(runner)
    rates = {run.name: run.rate for run in results}
    by_variant = {name: [result for run, result in results.items() if run.name == name] for name in flags.variants}
    table = _table(by_variant, rates)
    write_text(folder / "table.md", table)
    draw_curves({name: seeds[0]["rows"] for name, seeds in by_variant.items()}, folder / "curves.png")
    if short := too_short(flags.steps):
        table += f"\n{short}\n"
    print(f"{table}\ncurves of seed {flags.seeds[0]}: {folder / 'curves.png'}")


def _text(data: str) -> Corpus:
    return load_domain(data) if data in DOMAINS else load_corpus(data)


def _base(folder: Path, flags: argparse.Namespace) -> Path:
    """Trains the model to start from, unless an earlier call has."""
    if not (folder / "model").is_dir():
        resume = ["--resume"] if (folder / "config.json").exists() else []
        size = ["--smoke"] if flags.smoke else []
        command = [sys.executable, str(BASE_SCRIPT), "--sites", "none", "--run", str(folder), *size, *resume]
        print(f"the model to start from: {folder}", flush=True)
        if subprocess.run([*command, "--steps", str(flags.base_steps)]).returncode:
            raise ValueError(f"Expected a model to start from in {folder} (got none). Do see what its training said.")
    return folder / "model"


def _train(
    folder: str, name: str, model: str, data: str, length: int,
    batch_size: int, steps: int, learning_rate: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """One run of the sweep: trains a variant and returns its log, its size, and the loss before."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    start, encode = load_base(model)
    corpus = _text(data)
    validation = encode(corpus.validation)
    batch = partial(sample_batch, encode(corpus.train), batch_size=batch_size, length=length, seed=seed)

    def evaluate(model: nn.Module) -> dict[str, float]:
        losses = window_losses(model, validation, batch_size=16, length=length, limit=WINDOWS)
        return {"validation_loss": losses.mean().item()}

    before = evaluate(start.eval())["validation_loss"]
    config = prepare(start, name, [batch(-1 - index) for index in range(IMPORTANCE_BATCHES)])
    run = Run(name, Point.of(learning_rate=learning_rate), seed)
    path, every = Path(folder) / run.file_name, max(1, steps // EVALUATIONS)
    rows = train(
        start,
        batch,
        partial(output_of, config),
        TrainConfig(
            steps=steps,
            # As pretrained models, adapters and routers are tuned; its rate is what the grid holds.
            optimizer="adamw",
            learning_rate=learning_rate,
            warmup=steps // 20,
            # A short run stays near the model it started from: nothing is drawn to zero.
            weight_decay=0.0,
            graph_lr_factor=1.0,
            anneal_top_k=steps // 2 if name == "moh" else 0,
            eval_every=every,
            checkpoint_every=every,
            keep_checkpoints=1,
            log_every=every,
            seed=seed,
            device="cpu",
        ),
        path,
        evaluate=evaluate,
        resume=(path / "config.json").exists(),
        description=path.name,
    )
    return {"before": before, "rows": rows, "parameters": count_parameters(start)}


def load_base(source: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Returns a language model and what makes token ids of bytes: gohgraph's from a folder, others from the hub."""
    if (Path(source) / "model" / "config.json").is_file():
        source = str(Path(source) / "model")
    file = Path(source) / "config.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model") == "LanguageModel":
        return goh.LanguageModel.from_pretrained(source), lambda data: data
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("Expected transformers (got none). Do pip install 'gohgraph[tune]'.") from error
    encode = encoder_of(AutoTokenizer.from_pretrained(source))
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), encode


def prepare(model: nn.Module, name: str, batches: list[Any]) -> goh.HeadGraphConfig | None:
    """Turns a plain model into a variant, in place; returns the configuration of its head graphs or routers."""
    if name == "lora":
        add_lora(model, goh.convert(copy.deepcopy(model)).head_graph_parameters)
    if name in ("continued", "lora"):
        return None
    if name == "moh":
        importance = head_importance(model.eval(), lambda model, batch: output_of(None, model, batch), batches)
        heads = {len(values) for values in importance.values()}
        if len(heads) > 1 or min(heads) % 4:
            raise ValueError(f"Expected layers of equally many heads that 4 divides (got {heads}). Do leave out moh.")
        quarter = min(heads) // 4
        config = goh.HeadGraphConfig.moh(quarter, 2 * quarter, straight_through=True)
        goh.convert(model, config)
        share_important_heads(model, importance)
        return config
    config = goh.HeadGraphConfig()
    goh.convert(model, config, freeze_backbone=name == "graph-only")
    return config


def add_lora(model: nn.Module, parameters: int) -> None:
    """Puts LoRA on all projections of attention, of as nearly so many parameters as ranks allow; freezes the rest."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("Expected peft (got none). Do pip install 'gohgraph[tune]'.") from error
    own = [name for name, part in model.named_modules() if isinstance(part, goh.MultiHeadAttention)]
    attentions = own or list(find_blocks(model).blocks)
    matrices = {
        f"{name}.{inner}": part.weight.shape
        for name in attentions
        for inner, part in model.get_submodule(name).named_modules()
        if type(part).__name__ in ("Linear", "Conv1D")
    }
    rank = max(1, round(parameters / sum(sum(shape) for shape in matrices.values())))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(matrices)), model)


def output_of(config: goh.HeadGraphConfig | None, model: nn.Module, batch: tuple[Tensor, Tensor]) -> ModelOutput:
    """Returns a model's output with the loss of the next token, and what its routers did, whoever made the model."""
    inputs, targets = batch
    if isinstance(model, goh.LanguageModel):
        return model(inputs, targets=targets)
    if config is None or config.routing is None:
        logits, routings = model(input_ids=inputs, use_cache=False).logits, []
    else:
        with goh.collect_routing(model) as routings:
            logits = model(input_ids=inputs, use_cache=False).logits
    return model_output(logits, next_token_loss(logits, targets), [StackOutput(logits, tuple(routings))], config)


def _last_loss(result: dict[str, Any]) -> float:
    return result["rows"][-1]["validation_loss"]


def _table(by_variant: dict[str, list[dict[str, Any]]], rates: dict[str, float]) -> str:
    """Validation loss over seeds; differences are taken seed by seed to the first variant."""
    reference = next(iter(by_variant))
    losses = {name: list(map(_last_loss, seeds)) for name, seeds in by_variant.items()}
    rows = [["", "trained parameters", "learning rate", "validation loss", f"minus {reference}"]]
    rows.append(["before", "", "", f"{by_variant[reference][0]['before']:.4f}", ""])
    for name, seeds in by_variant.items():
        gaps = [loss - other for loss, other in zip(losses[name], losses[reference], strict=True)]
        difference = "" if name == reference else mean_and_deviation(gaps, 4, signed=True)
        about = [name, f"{seeds[0]['parameters']:,}", f"{rates[name]:g}"]
        rows.append([*about, mean_and_deviation(losses[name], 4), difference])
    return "\n".join([markdown_table(rows), "", *(f"{name}: {VARIANTS[name]}." for name in by_variant)]) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run", default="runs/tune", help="folder of results, continued if it is there (default: %(default)s)")
    add("--model", help="name or path of the hub, or a run of train_language_model.py (default: trains one)")
    add("--data", default="cpp", help=f"text of {' '.join(DOMAINS)}, a corpus, or a file (default: %(default)s)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="the first is the reference")
    add("--seeds", nargs="+", type=int, help="(default: 0 1 2)")
    add("--steps", type=int, help=f"of every run (default: {FULL['steps']})")
    add("--base-steps", type=int, help=f"of the model to start from (default: {FULL['base_steps']})")
    add("--learning-rates", nargs="+", type=float, help="the grid, the same for all (default: 3e-4 to 1e-2)")
    add("--length", type=int, help=f"tokens per sequence (default: {FULL['length']})")
    add("--batch-size", type=int, help=f"sequences per step (default: {FULL['batch_size']})")
    add("--jobs", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    add("--smoke", action="store_true", help="a tiny run, to see that it works, where no flag says otherwise")
    return parser


if __name__ == "__main__":
    sys.exit(main())
