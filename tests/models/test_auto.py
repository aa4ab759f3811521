"""gohgraph's own models by transformers' Auto classes: loading, generation, Trainer, adapters, a pipeline."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from helpers import GRAPHS, B, T, V, moved, small_config
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

import gohgraph as goh

QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True}


def language_model(graph="outputs", **settings):
    return moved(goh.LanguageModel(small_config(graph, **settings)).eval())


def tokens(batch=B, length=T):
    return torch.randint(V, (batch, length))


def saved(model, folder, auto=hf.AutoModelForCausalLM):
    model.save_pretrained(folder)
    return auto.from_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_folder_of_ours_and_one_of_transformers_give_the_same_model(graph, tmp_path):
    model, ids = language_model(graph), tokens()
    loaded = saved(model, tmp_path / "ours")
    again = saved(loaded, tmp_path / "theirs")
    for other in (loaded, again):
        assert not other.training and torch.equal(other(ids).logits, model(ids).logits)
    assert "edge_index" not in (tmp_path / "theirs" / "config.json").read_text()
    assert type(again.model) is goh.LanguageModel and again.model.config == model.config
    with pytest.raises(ValueError, match="its Auto classes load"):
        goh.LanguageModel.from_pretrained(tmp_path / "theirs")


@torch.no_grad()
def test_pruned_models_and_other_dtypes(tmp_path):
    model, ids = goh.prune(language_model(), keep=0.3), tokens()
    loaded = saved(model, tmp_path / "ours")
    assert torch.equal(saved(loaded, tmp_path / "theirs")(ids).logits, model(ids).logits)
    double = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    assert torch.equal(double(ids).logits, model.double()(ids).logits)


@pytest.mark.parametrize("graph", ["outputs", "scores-ring", "moh-outputs"])
def test_cached_generation_is_that_of_the_whole_sequence(graph, tmp_path):
    model, ids = language_model(graph), tokens()
    loaded = saved(model, tmp_path)
    greedy = loaded.generate(input_ids=ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(greedy, model.generate(ids, 9, temperature=0))
    ways = ({}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}, {"eos_token_id": 3, "pad_token_id": 0})
    for way in ways:
        runs = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            runs.append(loaded.generate(input_ids=ids, max_new_tokens=9, use_cache=use_cache, **way))
        assert torch.equal(*runs), way
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = loaded.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    alone = loaded.generate(input_ids=ids[:1, 3:], max_new_tokens=5, do_sample=False)
    assert torch.equal(padded[0, T:], alone[0, T - 3 :])


def test_drafts_of_an_assistant_change_nothing(tmp_path):
    loaded, ids = saved(language_model(), tmp_path), tokens(1)
    helper = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in helper.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    settings = {"input_ids": ids, "max_new_tokens": 11, "do_sample": False}
    expected = loaded.generate(**settings)
    assert torch.equal(loaded.generate(**settings, assistant_model=helper), expected)
    assert torch.equal(loaded.generate(**settings, prompt_lookup_num_tokens=3), expected)


def test_a_cache_goes_on_from_where_it_is(tmp_path):
    loaded, ids = saved(language_model(), tmp_path), tokens()
    with torch.no_grad():
        first = loaded(ids[:, :4], use_cache=True)
        cache = first[1] if len(first) > 1 else None
        second = loaded(ids[:, 4:], cache=cache)
        torch.testing.assert_close(second.logits, loaded(ids).logits[:, 4:], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [None, 2])
def test_classifiers(patch_size, tmp_path):
    config = goh.ClassifierConfig(small_config("outputs"), num_classes=3, patch_size=patch_size, channels=1)
    model = moved(goh.Classifier(config).eval())
    images = patch_size is not None
    auto = hf.AutoModelForImageClassification if images else hf.AutoModelForSequenceClassification
    inputs = torch.rand(B, 1, 4, 6) if images else tokens()
    loaded = saved(saved(model, tmp_path / "ours", auto), tmp_path / "theirs", auto)
    named = {"pixel_values" if images else "input_ids": inputs, "labels": torch.tensor([0, 2])}
    output, expected = loaded(**named), model(inputs, named["labels"])
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    assert loaded.config.num_labels == 3


def test_translation(tmp_path):
    model = moved(goh.Transformer(small_config("outputs")).eval())
    loaded = saved(model, tmp_path, hf.AutoModelForSeq2SeqLM)
    source, target = tokens(), tokens(length=5)
    with torch.no_grad():
        assert torch.equal(loaded(source, decoder_input_ids=target).logits, model(source, target).logits)
    ids = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "max_new_tokens": 6}
    greedy = loaded.generate(input_ids=source, do_sample=False, **ids)
    expected = model.generate(source, bos=1, eos=2, max_new_tokens=6)
    assert torch.equal(greedy, expected)
    beams = [loaded.generate(input_ids=source, num_beams=3, use_cache=cached, **ids) for cached in (True, False)]
    assert torch.equal(*beams)
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        loaded(input_ids=source, labels=target)
    loaded.config.decoder_start_token_id = 1
    shifted = torch.cat((torch.ones(B, 1, dtype=torch.long), target[:, :-1]), dim=1)
    torch.testing.assert_close(loaded(input_ids=source, labels=target).loss, model(source, shifted, target).loss)


def rows_of(kind):
    ids = tokens(1)[0]
    if kind == "translation":
        return [{"input_ids": ids, "decoder_input_ids": ids[:5], "labels": ids[:5]}] * 4
    return [{"input_ids": ids, "labels": ids if kind == "language" else torch.tensor(1)}] * 4


def own(kind):
    if kind == "classes":
        return goh.Classifier(goh.ClassifierConfig(small_config("moh-outputs"), num_classes=3))
    return (goh.LanguageModel if kind == "language" else goh.Transformer)(small_config("moh-outputs"))


@pytest.mark.parametrize("kind", ["language", "translation", "classes"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_trainer_trains_saves_evaluates_and_resumes(wrapped, kind, tmp_path):
    model = own(kind)
    if wrapped:
        from gohgraph.models.auto_models import as_transformers

        model = as_transformers(model)
    settings = {"per_device_train_batch_size": 2, "save_steps": 2, "learning_rate": 1e-2, **QUIET}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    rows = rows_of(kind)
    run = hf.Trainer(
        model, hf.TrainingArguments(str(tmp_path), max_steps=4, **settings), train_dataset=rows, eval_dataset=rows
    )
    run.train()
    first, last = (row["eval_loss"] for row in run.state.log_history if "eval_loss" in row)
    assert last < first and run.evaluate()["eval_loss"] == pytest.approx(last, rel=1e-4)
    again = hf.Trainer(
        model, hf.TrainingArguments(str(tmp_path), max_steps=5, **settings), train_dataset=rows, eval_dataset=rows
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 5


def test_the_loss_is_that_of_the_next_token():
    model, ids = language_model("moh-outputs"), tokens()
    labels = ids.clone()
    labels[0, :3] = -100
    expected = model(ids[:, :-1], labels[:, 1:])
    output = model(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids))
    assert set(output) == {"loss", "logits"} and set(model(input_ids=ids)) == {"logits"}
    torch.testing.assert_close(output["logits"][:, :-1], expected.logits, rtol=0, atol=1e-5)
    cross_entropy = nn.functional.cross_entropy(output["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output["loss"] - model(ids, ids).auxiliary_loss, cross_entropy)


def test_adapters(tmp_path):
    ids = tokens()
    loaded = saved(language_model(), tmp_path / "base")
    adapted = get_peft_model(loaded, LoraConfig(target_modules=["query"], task_type="CAUSAL_LM", r=2)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.3)
    assert adapted.generate(input_ids=ids, max_new_tokens=3).shape == (B, T + 3)
    expected = adapted(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits, expected)
    merged = saved(adapted.merge_and_unload(), tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-4)


def grown(model):
    model.embedding.tokens = nn.Embedding(V + 2, 30)


def adapted(model):
    inject_adapter_in_model(LoraConfig(target_modules=["query"], r=2), model)


def another_graph(model):
    model.decoder.layers[0].attention.object.output_graph = goh.HeadGraphConv(goh.head_graph(5), 6, 30, rank=2)


@pytest.mark.parametrize("change", [grown, adapted, another_graph])
def test_what_could_not_be_loaded_again_is_not_saved(change, tmp_path):
    model = language_model()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    change(model)
    with pytest.raises(ValueError, match="the tensors that the configuration"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_what_our_models_do_not_have_is_refused(tmp_path):
    loaded = saved(language_model(), tmp_path)
    with pytest.raises(ValueError, match="inputs_embeds"):
        loaded(tokens(), inputs_embeds=torch.zeros(B, T, 30))
    with pytest.raises(ValueError, match="Unrecognized configuration"):
        hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gohgraph"


def test_a_pipeline_writes_text(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    config = goh.TransformerConfig(256, d_model=20, num_heads=5, num_layers=1, d_ff=7)
    moved(goh.LanguageModel(config)).save_pretrained(tmp_path)
    hf.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path)
    write = hf.pipeline("text-generation", model=str(tmp_path))
    text = write("heads talk", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("heads talk") and len(text) > len("heads talk")
