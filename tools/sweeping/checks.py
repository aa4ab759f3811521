"""What is checked of one class: a new head graph changes nothing, a moved one is causal, cached, saved and loaded."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gohgraph as goh
from gohgraph.common.checks import there
from sweeping.small_models import build

LENGTH, KEPT, LAYERS = 15, 10, (2, 4, 8)
RING = goh.HeadGraphConfig(goh.SiteConfig(), goh.SiteConfig.ring(2))
CONFIGS = {"outputs and scores": RING, "outputs": goh.HeadGraphConfig()}


def check(kind: str, name: str) -> dict[str, str]:
    """Returns the row of a class: what happened, and what every check found."""
    row = {"kind": kind, "class": name}
    # Of models whose layers differ, two may all be without attention.
    for layers in LAYERS:
        try:
            model = build(name, layers)
            inputs = inputs_of(model, kind)
            before = logits(model, inputs)
            break
        except Exception as error:
            row.setdefault("reason", _said(error))
    else:
        return row | {"status": "not built"}
    row.pop("reason", None)
    stock = copy.deepcopy(model)
    row["family"] = config_of(model).model_type
    for sites, config in CONFIGS.items():
        try:
            report = _converted(model, config, inputs)
        except ValueError as error:
            row["reason"] = _said(error)
            continue
        except Exception as error:
            return row | {"status": "error", "reason": _said(error)}
        left = [f"{reason}" for reason in report.skipped.values()]
        row |= {"sites": sites, "replaced": str(len(report.replaced)), "left": "; ".join(dict.fromkeys(left))}
        row.pop("reason", None)
        break
    else:
        same = torch.equal(logits(model, inputs), before)
        return row | {"status": "refused" if same else "refused, and changed"}
    after = logits(model, inputs)
    off = _off(after, before)
    row |= {"status": "equal" if off <= 1e-4 else "DIFFERENT", "off": f"{off:.1e}"}
    _open(model)
    row["moves"] = "yes" if _off(logits(model, inputs), before) > 1e-6 else "no"
    for title, one in (("causal", _causal), ("cached", _cached), ("loaded", _loaded)):
        row[title] = _compared(one, stock, model, inputs, kind)
    goh.unconvert(model)
    row["undone"] = "yes" if torch.equal(logits(model, inputs), before) else "NO"
    return row


def _converted(model: nn.Module, config: goh.HeadGraphConfig, inputs: dict[str, Tensor]) -> goh.Report:
    try:
        return goh.convert(model, config)
    except ValueError as error:
        # Of some models of audio it cannot make up the inputs of a pass.
        if "example={...}" not in str(error):
            raise
        return goh.convert(model, config, example=inputs)


def inputs_of(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """Token ids of two rows, the second one padded at its end; of speech, features beside the decoder's ids."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, LENGTH - 4 :] = 0
    if kind != "encoder-decoder":
        return {"input_ids": ids, "attention_mask": mask}
    config, name = config_of(model), str(model.main_input_name)
    if name == "input_ids":
        return _of_codes(config, ids) or {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1)}
    if name == "input_features":
        length, bins = 2 * getattr(config, "max_source_positions", 16), _bins(config)
        shape = (2, bins, length) if config.model_type == "whisper" else (2, length, bins)
        return {name: torch.randn(shape, generator=generator), "decoder_input_ids": ids}
    return {name: torch.randn(2, 4000, generator=generator), "decoder_input_ids": ids}


def config_of(model: nn.Module) -> Any:
    """The configuration of a model of transformers, of any class."""
    return model.config


def _of_codes(config: Any, ids: Tensor) -> dict[str, Tensor] | None:
    """The inputs of models that read, or write, several codes of audio at every place; `None` for others."""
    if config.model_type == "dia":
        channels = config.decoder_config.num_channels
        return {"input_ids": ids, "decoder_input_ids": ids[..., None].expand(-1, -1, channels).contiguous()}
    if config.model_type == "kyutai_speech_to_text":
        return {"input_ids": ids[..., None].expand(-1, -1, config.num_codebooks + 1).contiguous()}
    if config.model_type == "voxtral_realtime":
        frames = torch.randn(2, _bins(config), config.audio_length_per_tok * ids.shape[1])
        return {"input_ids": ids, "input_features": frames}
    return None


def _bins(config: Any) -> int:
    """The features of a moment of speech, by the names they have in configurations and in those of encoders."""
    for part in (config, *(getattr(config, name, None) for name in ("encoder_config", "audio_config"))):
        for name in ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim"):
            if getattr(part, name, None):
                return getattr(part, name)
    return 8


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The logits of a pass, the first floating tensor of its output; padding left out."""
    torch.manual_seed(0)
    output = model(**inputs)
    values = output.logits if hasattr(output, "logits") else output[0]
    values = values[0] if isinstance(values, (tuple, list)) else values
    mask = inputs.get("attention_mask")
    if mask is not None and values.shape[:2] == mask.shape and "decoder_input_ids" not in inputs:
        return values[mask.bool()]
    return values


def _compared(
    one: Callable[..., float | None], stock: nn.Module, model: nn.Module, inputs: dict[str, Tensor], kind: str
) -> str:
    """A check of the converted model, where the stock model passes it itself."""
    try:
        expected = one(stock, inputs, kind)
    except Exception:
        return "-"
    if expected is None or expected > 1e-4:
        return "-"
    try:
        found = one(model, inputs, kind)
    except Exception as error:
        return f"ERROR {_said(error)}"
    return "yes" if there(found) <= 1e-4 else f"NO {found:.1e}"


def _causal(model: nn.Module, inputs: dict[str, Tensor], kind: str) -> float | None:
    if kind == "masked":
        return None
    name = "decoder_input_ids" if kind == "encoder-decoder" else "input_ids"
    whole = {**inputs, name: inputs[name][:1]} if kind == "causal" else inputs
    whole = {key: value[:1] for key, value in whole.items()}
    changed = dict(whole)
    changed[name] = whole[name].clone()
    changed[name][:, KEPT:] = 3
    a, b = (model_logits(model, one) for one in (whole, changed))
    return _off(a[:, :KEPT], b[:, :KEPT])


def _cached(model: nn.Module, inputs: dict[str, Tensor], kind: str) -> float | None:
    if kind == "masked":
        return None
    row = {key: value[:1] for key, value in inputs.items()}
    name = "decoder_input_ids" if kind == "encoder-decoder" else "input_ids"
    whole = model_logits(model, row)
    with torch.no_grad():
        first = {**row, name: row[name][:, :KEPT]}
        if kind == "causal":
            first.pop("attention_mask", None)
        torch.manual_seed(0)
        past = model(**first, use_cache=True).past_key_values
        found = []
        for place in range(KEPT, LENGTH):
            step = {**first, name: row[name][:, place : place + 1], "past_key_values": past}
            output = model(**step, use_cache=True)
            past = output.past_key_values
            found.append(output.logits)
    return _off(torch.cat(found, dim=1), whole[:, KEPT:])


def _loaded(model: nn.Module, inputs: dict[str, Tensor], kind: str) -> float | None:
    with tempfile.TemporaryDirectory() as folder:
        if any(isinstance(module, goh.HeadGraphConv) for module in model.modules()):
            goh.save_converted(model, folder)
            loaded = goh.load_converted(folder)
        else:
            plain: Any = model
            plain.save_pretrained(folder)
            loaded = type(plain).from_pretrained(folder)
        return _off(model_logits(loaded.eval(), inputs), model_logits(model, inputs))


@torch.no_grad()
def model_logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The logits `[B, T, vocabulary]` of a pass."""
    torch.manual_seed(0)
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output[0]


@torch.no_grad()
def _open(model: nn.Module) -> None:
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, goh.HeadGraphConv):
            module.edges.bias.normal_(std=0.3)
            if module.edges.weight is not None:
                module.edges.weight.normal_(std=module.edges.context_dim**-0.5)


def _off(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    size = max(b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0, 1e-6)
    return (torch.nan_to_num(a.double()) - torch.nan_to_num(b.double())).abs().max().item() / size


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:220]}"
