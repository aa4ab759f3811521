"""Trains a GPT of Megatron-Core with head graphs, tensor and data parallel, on a CPU for trial or on GPUs.

    python examples/megatron/pretrain_gpt.py --run runs/megatron
    torchrun --nproc-per-node 2 -- examples/megatron/pretrain_gpt.py --run runs/megatron-2 --tensor-parallel 2
    torchrun --nproc-per-node 8 -- examples/megatron/pretrain_gpt.py --run runs/large --tensor-parallel 4 \
        --data my_text_document --vocab-size 50304 --d-model 2048 --num-heads 32 --num-layers 24 --d-ff 8192 \
        --length 2048 --batch-size 256 --micro-batches 16 --steps 20000 --topology ring --in-degree 4

The first one takes half a minute on a CPU: the loss falls from 5.07 in the first five steps to 2.54 in the last five,
2.56 on held-out text (docs/regimes.md, where the second is seen to give the same). The third has not been run.
--data is the path of a text, read as bytes, or the prefix of Megatron's indexed dataset (PREFIX.bin and PREFIX.idx,
made by its tools/preprocess_data.py). Processes beyond --tensor-parallel share each batch. The run folder, on a disk
that all processes see, holds config.json, log.csv, curves.png, result.json and checkpoints in Megatron's torch_dist
format. Ctrl-C stops it after a checkpoint; the same command with --resume goes on, also with another number of
processes and another --tensor-parallel.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from gohgraph import HeadGraphConfig
from gohgraph.common.checks import there
from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.common.files import read_json
from gohgraph.drawing import draw_curves
from gohgraph.learning.cli.flags import add_size_flags
from gohgraph.learning.cli.graph_flags import add_graph_flags, graph_from_flags
from gohgraph.learning.data.corpus import PYTHON_DOCS, evaluation_batches, load_corpus, sample_batch
from gohgraph.learning.interrupts import TrainingInterrupted, interrupts
from gohgraph.learning.optim import make_optimizer
from gohgraph.learning.run_folder import STATE, RunFolder, write_text
from gohgraph.learning.train_config import TrainConfig
from gohgraph.parallel.ranks import on_first_rank, under_torchrun, world_size

with warnings.catch_warnings():
    # Megatron-Core names every optional package it does without.
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from gohgraph.parallel.gradients import average_gradients, clip_gradients
    from gohgraph.parallel.megatron import head_graph_layer_spec, set_router_loss_scale
    from gohgraph.parallel.megatron.checkpoint import load_checkpoint, save_checkpoint
    from gohgraph.parallel.megatron.cpu import cpu_trial

FULL = dict(d_model=128, num_heads=8, num_layers=4, d_ff=512, length=128, batch_size=8, steps=100)
SMOKE = dict(d_model=32, num_heads=4, num_layers=2, d_ff=64, length=32, batch_size=4, steps=4)
WINDOWS, WEIGHTS = 64, "weights"

Batch = tuple[Tensor, Tensor]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run(_parser(), _main, argv)


def _main(flags: argparse.Namespace) -> None:
    for name, value in (SMOKE if flags.smoke else FULL).items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    torch.set_num_threads(flags.threads)
    head_graph = graph_from_flags(flags, flags.num_heads) or HeadGraphConfig(outputs=None)
    if flags.anneal_top_k:
        raise ValueError("Expected no --anneal-top-k under Megatron-Core (got one). Do drop it.")
    spec = head_graph_layer_spec(head_graph)
    try:
        start_processes(flags.tensor_parallel)
        with cpu_trial(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="megatron")
            Pretraining(flags, build_model(flags, spec), head_graph).run()
    finally:
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()


def start_processes(tensor_parallel: int) -> None:
    """Joins the processes that torchrun started, or begins with this one alone."""
    backend, processes = "nccl" if torch.cuda.is_available() else "gloo", world_size()
    if processes % tensor_parallel:
        raise ValueError(
            f"Expected --tensor-parallel that divides {processes} processes (got {tensor_parallel}). Do start others "
            "with torchrun --nproc-per-node."
        )
    if under_torchrun():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tensor_parallel)


def build_model(flags: argparse.Namespace, spec: Any) -> GPTModel:
    """Returns Megatron-Core's `GPTModel` of these layers, with equal weights at every number of processes."""
    torch.manual_seed(flags.seed)
    if torch.cuda.is_available():
        tensor_parallel.model_parallel_cuda_manual_seed(flags.seed)
    config = TransformerConfig(
        num_layers=flags.num_layers,
        hidden_size=flags.d_model,
        num_attention_heads=flags.num_heads,
        ffn_hidden_size=flags.d_ff,
        tensor_model_parallel_size=flags.tensor_parallel,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(config, spec, flags.vocab_size, flags.length, position_embedding_type="rope")
    return model.cuda() if torch.cuda.is_available() else model


class Pretraining:
    """A run: its model, data and folder, and one step after another."""

    def __init__(self, flags: argparse.Namespace, model: GPTModel, head_graph: HeadGraphConfig) -> None:
        self.flags, self.model, self.step, self.seconds = flags, model, 0, 0.0
        self.device, self.is_main = next(model.parameters()).device, dist.get_rank() == 0
        self.ranks, self.rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        self.data_ranks = parallel_state.get_data_parallel_group()
        every = max(1, flags.steps // 5)
        self.config = TrainConfig(
            steps=flags.steps,
            # What Megatron's checkpoints know the state of.
            optimizer="adamw",
            learning_rate=flags.learning_rate,
            graph_lr_factor=1.0,
            warmup=flags.steps // 10,
            eval_every=every,
            checkpoint_every=max(2, every),
            log_every=max(1, flags.steps // 20),
            seed=flags.seed,
        )
        self.optimizer = make_optimizer(model, self.config, self.device)
        share = self.ranks * flags.micro_batches
        if flags.batch_size % share:
            raise ValueError(
                f"Expected --batch-size that {share} data-parallel micro-batches divide (got {flags.batch_size}). Do "
                "change either."
            )
        settings = {
            "training": self.config.to_dict(),
            "head_graph": head_graph.to_dict(),
            "sizes": {name: getattr(flags, name) for name in (*FULL, "vocab_size", "data") if name != "steps"},
            "flags": {"processes": dist.get_world_size(), "tensor_parallel": flags.tensor_parallel},
        }
        self.folder = RunFolder(flags.run, settings)
        on_first_rank(lambda: self.folder.open(resume=flags.resume))
        self.batch, self.validation = load_data(flags, self.folder.path)
        if flags.resume:
            self._load()

    def run(self) -> None:
        """Trains to the last step, or to a checkpoint after Ctrl-C."""
        set_router_loss_scale(self.model.config, self.flags.micro_batches)
        config, losses, seconds = self.config, [], self.seconds
        bar = tqdm(total=config.steps, initial=self.step, unit="step", disable=None if self.is_main else True)
        with interrupts() as interrupted, bar:
            while self.step < config.steps:
                began = time.perf_counter()
                losses.append(self._train_step())
                is_logged = self._is_due(config.log_every)
                if is_logged:
                    loss = self._mean(torch.stack(losses))
                self.seconds += time.perf_counter() - began
                bar.update()
                if is_logged:
                    rate = len(losses) * self.flags.batch_size * self.flags.length / (self.seconds - seconds)
                    bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s", refresh=False)
                    self._log(loss, rate)
                    losses, seconds = [], self.seconds
                stops = self._any(interrupted.is_set())
                if stops or self._is_due(config.checkpoint_every):
                    self._save()
                if stops and self.step < config.steps:
                    raise TrainingInterrupted(f"stopped at step {self.step}; the same command with --resume goes on")
        on_first_rank(self._report)

    def _train_step(self) -> Tensor:
        rate = self.config.learning_rate_factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate
        inputs, targets = (part.to(self.device) for part in self.batch(self.step))  # [B, T] each
        own = slice(self.rank, None, self.ranks)
        parts = self.flags.micro_batches
        total = torch.zeros((), device=self.device)
        for share in zip(inputs[own].chunk(parts), targets[own].chunk(parts), strict=True):
            loss = self._loss(share).mean() / parts
            loss.backward()
            total += loss.detach()
        average_gradients(self.model.parameters(), self.data_ranks)
        tensor_ranks = parallel_state.get_tensor_model_parallel_group()
        clip_gradients(self.model.parameters(), there(self.config.grad_clip), tensor_ranks)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return total

    def _loss(self, batch: Batch) -> Tensor:
        inputs, targets = batch
        positions = torch.arange(inputs.shape[1], device=self.device).expand_as(inputs)  # [B, T]
        return self.model(inputs, positions, None, labels=targets)  # [B, T]

    @torch.no_grad()
    def _validate(self) -> float:
        self.model.eval()
        # With more ranks than batches some have none.
        losses = [torch.zeros(0, device=self.device)]
        for batch in self.validation[self.rank :: self.ranks]:
            inputs, targets = (part.to(self.device) for part in batch)
            losses.append(self._loss((inputs, targets)).mean(dim=1))
        self.model.train()
        return self._mean(torch.cat(losses))

    def _log(self, loss: float, rate: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f"Expected a finite loss (got {loss} by step {self.step}). Do lower its rate.")
        validation = self._validate() if self._is_due(self.config.eval_every) else None
        row = {"step": self.step, "loss": loss, "validation_loss": validation}
        row |= {"lr": self.optimizer.param_groups[0]["lr"], "seconds": round(self.seconds, 3)}
        row |= {"tokens_per_second": round(rate, 1)}
        if self.is_main:
            self.folder.log(row)

    def _save(self) -> None:
        pending = self.folder.path / "checkpoints" / ".new" / WEIGHTS
        on_first_rank(lambda: (self.folder.pending_checkpoint() / WEIGHTS).mkdir())
        save_checkpoint(pending, self.model, self.optimizer)
        state, keep = {"seconds": self.seconds}, self.config.keep_checkpoints
        on_first_rank(lambda: self.folder.commit_checkpoint(self.step, state, keep=keep))

    def _load(self) -> None:
        checkpoints = self.folder.checkpoints()
        if checkpoints:
            state = read_json(checkpoints[-1] / STATE, "delete that folder, to resume from the checkpoint before it")
            load_checkpoint(checkpoints[-1] / WEIGHTS, self.model, self.optimizer)
            self.step, self.seconds = state["step"], state["seconds"]
        on_first_rank(lambda: self.folder.read_log(until=self.step))

    def _report(self) -> None:
        path, rows = self.folder.path, self.folder.rows
        draw_curves({path.name: rows}, path / "curves.png")
        # The last step is always logged and evaluated.
        first, last = rows[0]["loss"], rows[-1]["validation_loss"]
        result = {"validation_loss": last, "first_loss": first, "steps": self.step, "seconds": round(self.seconds, 1)}
        write_text(path / "result.json", json.dumps({**result, "processes": dist.get_world_size()}, indent=2))
        print(
            f"training loss {first:.3f} at first, validation loss {last:.3f} after {self.step} steps in "
            f"{self.seconds:.0f} s: {path}"
        )

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _mean(self, losses: Tensor) -> float:
        """The mean over all data-parallel ranks, of losses `[n]` whose number may differ."""
        sums = torch.stack((losses.sum(), losses.new_tensor(len(losses))))
        dist.all_reduce(sums, group=self.data_ranks)
        return (sums[0] / sums[1]).item()

    def _any(self, holds: bool) -> bool:
        """All processes stop at the same step, or they would wait for each other for ever."""
        flag = torch.tensor(float(holds), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def load_data(flags: argparse.Namespace, folder: Path) -> tuple[Callable[[int], Batch], list[Batch]]:
    """Returns the batch `[B, T]` of a step, of all processes together, and batches to validate on."""
    if not Path(f"{flags.data}.idx").is_file():
        corpus = load_corpus(flags.data)
        cut = {"batch_size": flags.batch_size, "length": flags.length}
        windows = evaluation_batches(corpus.validation, **cut, limit=flags.batch_size if flags.smoke else WINDOWS)
        return partial(sample_batch, corpus.train, seed=flags.seed, **cut), list(windows)
    config = GPTDatasetConfig(
        random_seed=flags.seed, sequence_length=flags.length, blend=([flags.data], None), split="95,5,0",
        path_to_cache=str(folder / "indices"), tokenizer=Vocabulary(flags.vocab_size), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    sizes = [flags.steps * flags.batch_size, WINDOWS, 0]
    train, validation, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()

    def batch(dataset: GPTDataset, number: int) -> Batch:
        samples = [dataset[number * flags.batch_size + place] for place in range(flags.batch_size)]
        tokens, labels = (torch.stack([sample[part] for sample in samples]) for part in ("tokens", "labels"))
        return tokens, labels

    return partial(batch, train), [batch(validation, number) for number in range(WINDOWS // flags.batch_size)]


@dataclass
class Vocabulary:
    """What Megatron's datasets ask a tokenizer for, of tokens that are ids already."""

    vocab_size: int

    @property
    def eod(self) -> int:
        """The last id."""
        return self.vocab_size - 1

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What the cache of indices depends on."""
        return {"class": type(self).__name__, "vocab_size": self.vocab_size}


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run", metavar="FOLDER", default="runs/megatron", help="run folder (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in --run")
    add("--smoke", action="store_true", help="a tiny model and a few steps, to see that it works")
    add("--data", default=PYTHON_DOCS, help="text, or prefix of an indexed dataset (default: %(default)s)")
    add("--vocab-size", type=int, default=256, help="ids in an indexed dataset (default: %(default)s, bytes)")
    add("--tensor-parallel", type=int, default=1, help="processes that share the heads (default: %(default)s)")
    add("--micro-batches", type=int, default=1, help="parts of a process's batch, one after another (default: 1)")
    add("--learning-rate", type=float, default=3e-3, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads of a process (default: %(default)s)")
    add_size_flags(parser, FULL)
    add_graph_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
