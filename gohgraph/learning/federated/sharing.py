"""What a client trains, and which part of it travels."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gohgraph.attention.routing import HeadRouter
from gohgraph.graphs.protocol import SiteGraph
from gohgraph.learning.regimes.low_rank import LowRankUpdate

KINDS = ("base", "graph", "lora")
_OWNERS = {"graph": (SiteGraph, HeadRouter), "lora": (LowRankUpdate,)}


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Splits a model's weights into those that are federated, those that stay on the client, and frozen ones.

    Kinds of weights are `"graph"` (head graphs and routers), `"lora"` (low-rank updates) and `"base"` (all others). A
    kind that is named nowhere is frozen: every client must hold the same from the start, for it never travels.

    Args:
        shared: trained by all clients and averaged.
        personal: trained by each client for itself.

    Example:
        >>> import gohgraph as goh
        >>> config = goh.TransformerConfig(7, d_model=6, num_heads=3, d_ff=5, head_graph=goh.HeadGraphConfig())
        >>> model = goh.LanguageModel(config)
        >>> sharing = Sharing(shared=("base",), personal=("graph",))
        >>> sharing.prepare(model)
        >>> len(sharing.personal_state(model)), any("output_graph" in name for name in sharing.shared_state(model))
        (12, False)
    """

    shared: tuple[str, ...]
    personal: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        named = [*self.shared, *self.personal]
        if not named or not set(named) <= set(KINDS) or len(set(named)) < len(named):
            raise ValueError(
                f"Expected kinds of {list(KINDS)}, each shared or personal (got {self.shared} and {self.personal}). "
                "Do name each once."
            )

    def prepare(self, model: nn.Module) -> None:
        """Freezes what is neither shared nor personal, and only that; each kind that is named must be there."""
        kinds = _kinds(model)
        missing = {*self.shared, *self.personal} - set(kinds.values())
        # All kinds are the whole model, whatever it has.
        if missing and set(KINDS) not in (set(self.shared), set(self.personal)):
            raise ValueError(f"Expected weights of kind {sorted(missing)} (got a model without). Do add them to it.")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kinds[name] in (*self.shared, *self.personal))

    def shared_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns what travels, by name: the model's own tensors, not copies."""
        return self._state(model, self.shared)

    def personal_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns what stays on the client, by name: the model's own tensors, not copies."""
        return self._state(model, self.personal)

    def _state(self, model: nn.Module, kinds: tuple[str, ...]) -> dict[str, Tensor]:
        kind_of, state = _kinds(model), _state(model)
        return {name: tensor.detach() for name, tensor in state.items() if kind_of[name] in kinds}


SHARINGS: dict[str, Sharing] = {
    "full": Sharing(shared=KINDS),
    "personal-graph": Sharing(shared=("base",), personal=("graph",)),
    "graph": Sharing(shared=("graph",)),
    "lora": Sharing(shared=("lora",)),
    "lora-personal-graph": Sharing(shared=("lora",), personal=("graph",)),
    "local-graph": Sharing(shared=(), personal=("graph",)),
    "local": Sharing(shared=(), personal=KINDS),
}


@torch.no_grad()
def load_state(state: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Copies given tensors into a model's own, those of `shared_state` or `personal_state`, of the same names."""
    shapes, given_shapes = (
        {name: list(tensor.shape) for name, tensor in tensors.items()} for tensors in (state, given)
    )
    odd = sorted(name for name in state.keys() | given.keys() if shapes.get(name) != given_shapes.get(name))
    if odd:
        differences = [f"{name} {given_shapes.get(name)} for {shapes.get(name)}" for name in odd[:3]]
        raise ValueError(
            f"Expected the weights of this model (got {'; '.join(differences)}). "
            "Do give server and clients the same model and sharing."
        )
    for name, tensor in given.items():
        state[name].copy_(tensor)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers that can be averaged; tied ones once."""
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if tensor.is_floating_point():
            names.setdefault(id(tensor), name)
    return {name: state[name] for name in names.values()}


def _kinds(model: nn.Module) -> dict[str, str]:
    inside = {
        kind: tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, owners))
        for kind, owners in _OWNERS.items()
    }
    names = {*_state(model), *(name for name, _ in model.named_parameters())}
    return {
        name: next((kind for kind, prefixes in inside.items() if name.startswith(prefixes)), "base") for name in names
    }
