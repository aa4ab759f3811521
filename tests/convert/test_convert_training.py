"""Converted models of transformers in Trainer, with adapters, compiled, saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from helpers import moved, traced
from peft import LoraConfig, PeftModel, get_peft_model
from transformers_models import BOTH, OUTPUTS, build, far, inputs_of, tokens

from gohgraph import (
    HeadGraphConfig,
    RoutingConfig,
    SiteConfig,
    convert,
    fold,
    load_converted,
    save_converted,
)


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


class Rows(torch.utils.data.Dataset):
    """Token ids to predict, the same for every run."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(3, 97, (7,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def trainer(model, folder, **settings):
    arguments = hf.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=6, save_steps=3, logging_steps=1,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, learning_rate=1e-2, disable_tqdm=True, seed=0,
        **settings,
    )  # fmt: skip
    return hf.Trainer(model=model, args=arguments, train_dataset=Rows())


def test_trainer_trains_head_graphs_and_resumes(tmp_path):
    stock = build("llama")

    def converted():
        model = copy.deepcopy(stock)
        return convert(model, BOTH, freeze_backbone=True).model

    whole = trainer(converted(), tmp_path / "whole")
    whole.train()
    after = {name: p for name, p in whole.model.named_parameters()}
    before = dict(converted().named_parameters())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all("head_graphs" in name for name in changed)
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    resumed = trainer(converted(), tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    again = [row["loss"] for row in resumed.state.log_history if "loss" in row]
    assert again[-3:] == pytest.approx(losses[-3:], abs=1e-6)
    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, after[name], rtol=0, atol=1e-6)


def test_mixed_precision_and_gradient_checkpointing_in_trainer(tmp_path):
    model = convert(build("llama"), BOTH).model
    run = trainer(model, tmp_path, bf16=True, gradient_checkpointing=True)
    run.train()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("order", ["graphs first", "adapters first"])
def test_low_rank_adapters_beside_head_graphs(order, tmp_path):
    stock, ids = build("llama"), tokens()
    model, before = copy.deepcopy(stock), logits(stock, input_ids=ids)
    adapters = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], modules_to_save=["head_graphs"])
    if order == "graphs first":
        convert(model, BOTH)
        model = get_peft_model(model, adapters)
    else:
        adapters.modules_to_save = None
        model = get_peft_model(model, adapters)
        report = convert(model, BOTH)
        assert len(report.replaced) == 2
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name or "head_graphs" in name)
    torch.testing.assert_close(logits(model.eval(), input_ids=ids), before, rtol=1e-6, atol=1e-6)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.train()(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "head_graphs" in n)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = logits(model.eval(), input_ids=ids)
    assert (changed - before).abs().max() > 1e-3
    if order == "graphs first":
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(convert(stock, BOTH).model, tmp_path).eval()
        torch.testing.assert_close(logits(loaded, input_ids=ids), changed, rtol=0, atol=1e-6)


def test_adapters_on_a_projection_that_has_messages_before_it_are_no_silent_bypass():
    model, ids = far("bloom", OUTPUTS), tokens()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["dense"]))
    with pytest.raises(RuntimeError, match="after its layers were wrapped"):
        logits(adapted, input_ids=ids)


@pytest.mark.parametrize("name", ["llama", "vit", "t5", "bart", "bloom"])
@pytest.mark.parametrize("backbone", [True, False])
def test_saving_and_loading_with_one_call(name, backbone, tmp_path):
    stock = build(name)
    stock.save_pretrained(tmp_path / "stock")
    model = type(stock).from_pretrained(tmp_path / "stock").eval()
    convert(model, OUTPUTS if name == "bloom" else BOTH)
    moved(model)
    inputs = inputs_of(model)
    save_converted(model, tmp_path / "saved", backbone=backbone)
    written = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"config.json", "model.safetensors"} <= written and ("generation_config.json" in written) <= backbone
    # Without the backbone the model comes from where it was loaded: the path in `base`.
    loaded = load_converted(tmp_path / "saved")
    assert not loaded.training and torch.equal(logits(loaded, **inputs), logits(model, **inputs))
    other = load_converted(tmp_path / "saved", type(stock).from_pretrained(tmp_path / "stock").eval())
    assert torch.equal(logits(other, **inputs), logits(model, **inputs))


def test_saving_keeps_order_dtype_routers_and_options(tmp_path):
    stock, ids = build("llama").bfloat16(), tokens()
    model = copy.deepcopy(stock)
    convert(model, HeadGraphConfig(SiteConfig(rank=3), routing=RoutingConfig(2, (2,))), where="*.1.*")
    sites = moved(model).model.layers[1].self_attn.head_graphs
    sites.order_heads([5, 1, 0, 2, 3, 4])
    save_converted(model, tmp_path / "saved")
    loaded = load_converted(tmp_path / "saved", attn_implementation="eager", dtype=torch.bfloat16)
    assert loaded.config._attn_implementation == "eager"
    again = loaded.model.layers[1].self_attn.head_graphs
    assert again.head_order == sites.head_order and again.router.top_k == 2
    assert all(parameter.dtype == torch.bfloat16 for parameter in loaded.parameters())
    torch.testing.assert_close(logits(loaded, input_ids=ids), logits(model, input_ids=ids), rtol=0, atol=0.05)


def test_head_graphs_alone_do_not_go_beside_an_older_backbone(tmp_path):
    save_converted(far("gpt2"), tmp_path)
    with pytest.raises(ValueError, match="without a backbone"):
        save_converted(far("gpt2"), tmp_path, backbone=False)


def test_a_folder_of_transformers_is_told_apart(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got a model of type 'llama'"):
        load_converted(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_converted(tmp_path / "nowhere")


def test_a_folded_model_is_saved_as_any_other(tmp_path):
    model, ids = far("gpt2", HeadGraphConfig(SiteConfig(edges="static"))), tokens()
    before = logits(model, input_ids=ids)
    fold(model).save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, input_ids=ids), before, rtol=1e-4, atol=1e-5)


@pytest.mark.compiles
@pytest.mark.slow
def test_compiling_in_one_graph():
    model, ids = far("llama"), tokens()
    compiled = traced(model)
    torch.testing.assert_close(logits(compiled, input_ids=ids), logits(model, input_ids=ids), rtol=1e-4, atol=1e-5)
    ids = tokens(3)
    torch.testing.assert_close(logits(compiled, input_ids=ids), logits(model, input_ids=ids), rtol=1e-4, atol=1e-5)
