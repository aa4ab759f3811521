"""What the parts of a layer are called in the architectures known here, and how their norms stand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Layout:
    """Names inside one layer; a layer has this layout if it has all of them and no further norm.

    Args:
        attention: the attention module. `before`: norm that it reads through; `after`: norm of what it writes;
            `on_stream`: norm of the sum (post-norm).
        cross, cross_before, cross_on_stream: the same of cross attention.
        entry, exit: modules whose input is what the feed-forward reads and whose output is what it writes.
        ff_before, ff_after, ff_on_stream: its norms.
        parallel: attention and feed-forward read the same and are added together; the name of an attribute of the layer
            that says so, or a bool.
        pre_norm: an attribute path in the stack that exists exactly where norms stand before and not on the stream: for
            names that are used both ways.
    """

    attention: str
    entry: str
    exit: str
    before: str = ""
    after: str = ""
    on_stream: str = ""
    cross: str = ""
    cross_before: str = ""
    cross_on_stream: str = ""
    ff_before: str = ""
    ff_after: str = ""
    ff_on_stream: str = ""
    parallel: str | bool = False
    pre_norm: str | None = None

    @property
    def norms(self) -> set[str]:
        """Names of all norms."""
        cross = (self.cross_before, self.cross_on_stream)
        own = (self.before, self.after, self.on_stream, self.ff_before, self.ff_after, self.ff_on_stream)
        return {name for name in (*own, *cross) if name}

    def fits(self, layer: nn.Module, stack: nn.Module) -> bool:
        """Whether a layer of a stack has these parts and no norm beside them."""
        needed = [self.attention, self.entry, self.exit, *filter(None, [self.cross]), *self.norms]
        if not all(has(layer, name) for name in needed):
            return False
        if self.pre_norm is not None and has(stack, self.pre_norm) == bool(self.on_stream):
            return False
        inside = (f"{self.attention}.", f"{self.cross}." if self.cross else "\0", f"{self.entry}.")
        others = {
            name
            for name, module in layer.named_modules()
            if is_norm(module) and (name in self.norms or not name.startswith(inside))
        }
        return others == self.norms


_BART = {"attention": "self_attn", "entry": "fc1", "exit": "fc2"}
_BART_NORMS = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
_T5 = {"attention": "layer.0.SelfAttention", "before": "layer.0.layer_norm"}


def _bart(*, cross: bool, pre_norm: bool) -> Layout:
    names = ("before", "cross_before", "ff_before") if pre_norm else ("on_stream", "cross_on_stream", "ff_on_stream")
    norms = dict(zip(names, _BART_NORMS, strict=True))
    if not cross:
        del norms[names[1]]
    return Layout(**_BART, cross="encoder_attn" if cross else "", **norms, pre_norm="layer_norm")


def _t5(*, cross: bool) -> Layout:
    ff = f"layer.{1 + cross}"
    paths = {"entry": f"{ff}.DenseReluDense", "exit": f"{ff}.DenseReluDense", "ff_before": f"{ff}.layer_norm"}
    return Layout(
        **_T5, **paths, **({"cross": "layer.1.EncDecAttention", "cross_before": "layer.1.layer_norm"} if cross else {})
    )


def _own(*, cross: bool, pre_norm: bool) -> Layout:
    place = "before" if pre_norm else "on_stream"
    norms = {place: "attention.norm", f"ff_{place}": "feed_forward.norm"}
    if cross:
        norms |= {"cross": "cross_attention.object", f"cross_{place}": "cross_attention.norm"}
    ff = "feed_forward.object"
    return Layout(attention="attention.object", entry=ff, exit=ff, **norms)


LAYOUTS: dict[str, Layout] = {
    # Llama, Qwen 2 and 3, Mistral, SmolLM, and Mixtral's kin.
    "llama": Layout("self_attn", "mlp", "mlp", before="input_layernorm", ff_before="post_attention_layernorm"),
    "gemma": Layout(
        "self_attn", "mlp", "mlp", before="input_layernorm", after="post_attention_layernorm",
        ff_before="pre_feedforward_layernorm", ff_after="post_feedforward_layernorm",
    ),
    "olmo2": Layout(
        "self_attn", "mlp", "mlp", after="post_attention_layernorm", ff_after="post_feedforward_layernorm"
    ),
    # One norm for both.
    "phi": Layout("self_attn", "mlp", "mlp", before="input_layernorm", ff_before="input_layernorm", parallel=True),
    "gpt2": Layout("attn", "mlp", "mlp", before="ln_1", ff_before="ln_2"),
    "gpt_neox": Layout(
        "attention", "mlp", "mlp", before="input_layernorm", ff_before="post_attention_layernorm",
        parallel="use_parallel_residual",
    ),
    "bert": Layout(
        "attention", "intermediate", "output.dense", on_stream="attention.output.LayerNorm",
        ff_on_stream="output.LayerNorm",
    ),
    "vit": Layout("attention", "mlp", "mlp", before="layernorm_before", ff_before="layernorm_after"),
    # A scale of every feature, learned, stands behind what a block writes.
    "dinov2": Layout(
        "attention", "mlp", "mlp", before="norm1", after="layer_scale1", ff_before="norm2", ff_after="layer_scale2"
    ),
    "t5": _t5(cross=False),
    "t5 decoder": _t5(cross=True),
    **{
        f"{'whisper' if pre_norm else 'bart'}{' decoder' if cross else ''}": _bart(cross=cross, pre_norm=pre_norm)
        for cross in (False, True)
        for pre_norm in (False, True)
    },
    **{
        f"gohgraph{' pre-norm' if pre_norm else ''}{' decoder' if cross else ''}": _own(cross=cross, pre_norm=pre_norm)
        for cross in (False, True)
        for pre_norm in (False, True)
    },
}  # fmt: skip


def layout_of(layer: nn.Module, stack: nn.Module) -> tuple[str, Layout] | None:
    """Returns the name and layout of a layer, or `None`."""
    fitting = [(name, layout) for name, layout in LAYOUTS.items() if layout.fits(layer, stack)]
    norm_first = getattr(getattr(layer, "attention", None), "norm_first", None)
    if len(fitting) > 1 and norm_first is not None:
        # Our own layers have the same names for both.
        fitting = [(name, layout) for name, layout in fitting if bool(layout.before) == norm_first]
    return fitting[0] if fitting else None


def has(module: nn.Module, path: str) -> bool:
    """Whether a module has a submodule of that name that is no `nn.Identity`."""
    try:
        submodule = module.get_submodule(path)
    except AttributeError:
        return False
    return isinstance(submodule, nn.Module) and not isinstance(submodule, nn.Identity)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm or scales features as one does, by the name of its class."""
    kind = type(module).__name__.lower()
    return ("norm" in kind or "layerscale" in kind) and not list(module.children())
