"""Meta-learning: models that adapt to a new task in a few gradient steps, by MAML, ANIL-style inner loops or Reptile.

An inner loop runs on `torch.func`, over any part of the parameters: all (MAML), the head graphs alone, the read-out
(ANIL). The outer loop is the training loop of the library.
"""

import math
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from gohgraph.common.checks import check_int, check_number
from gohgraph.learning.data.episodes import Episodes
from gohgraph.models.boundary import widened


class MetaLearner(nn.Module):
    r"""A classifier and the inner loop it adapts by.

    .. math::
        \phi_0 = \theta_A, \qquad \phi_{s+1} = \phi_s - \eta \nabla_{\phi} L_{support}(\phi_s, \theta_B), \qquad
        L_{meta}(\theta) = L_{query}(\phi_S, \theta_B)

    theta_A are the parameters that adapt, theta_B all others. `forward` is the objective of MAML (Finn et al. 2017,
    arXiv 1703.03400, equation 1) where theta_A is everything; of ANIL (Raghu et al. 2020, arXiv 1909.09157) where it is
    the read-out; with head graphs alone a task changes only which head talks to which. The rate eta of every tensor is
    learned with theta, as in MAML++ (Antoniou et al. 2019, arXiv 1810.09502, section 4), here the same for all steps.

    Gradients of gradients pass through attention only under the math backend of SDPA, which is set here: the fused
    kernels have no second derivative.

    Args:
        model: called as a `Classifier`; without dropout.
        adapted: names of the parameters that adapt, see `parameters_of`.
        steps: S >= 1, of the inner loop.
        learning_rate: eta > 0 to begin with.
        second_order: differentiates through the inner loop; without, it is first-order MAML.

    Shape:
        `Episodes` of N tasks -> losses `[N]`.

    Example:
        >>> import gohgraph as goh
        >>> encoder = goh.TransformerConfig(11, d_model=8, num_heads=2, num_layers=1, d_ff=8)
        >>> model = goh.Classifier(goh.ClassifierConfig(encoder, num_classes=3))
        >>> learner = MetaLearner(model, parameters_of(model, names=["head"]), steps=2)
        >>> x, y = torch.randint(11, (5, 6, 7)), torch.randint(3, (5, 6))
        >>> learner(Episodes(x, y, x, y)).shape, learner.bytes_adapted()
        (torch.Size([5]), 108)
    """

    def __init__(
        self,
        model: nn.Module,
        adapted: Collection[str],
        *,
        steps: int = 3,
        learning_rate: float = 0.1,
        second_order: bool = True,
    ) -> None:
        super().__init__()
        known = dict(model.named_parameters())
        unknown = sorted(set(adapted) - set(known))
        if unknown or not adapted:
            raise ValueError(f"Expected names of parameters (got {unknown or 'none'}). Do choose with parameters_of.")
        check_int("steps", steps, low=1)
        check_number("learning_rate", learning_rate, above=0)
        self.model, self.adapted, self.steps, self.second_order = model, tuple(adapted), steps, second_order
        self.log_rate = nn.Parameter(torch.full((len(self.adapted),), math.log(learning_rate)))

    def forward(self, episodes: Episodes) -> Tensor:
        """Returns the loss of every task on its query after adapting to its support, in nats `[N]`."""
        logits, _ = self.predict(episodes)
        each = F.cross_entropy(widened(logits).transpose(1, 2), episodes.query_targets, reduction="none")  # [N, Q]
        return each.mean(dim=1)

    def predict(self, episodes: Episodes) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the logits of all queries `[N, Q, C]`, and what each task adapted, `[N, ...]` each."""
        tasks = zip(episodes.support, episodes.support_targets, episodes.query, strict=True)
        fast, logits = [], []
        with sdpa_kernel(SDPBackend.MATH):
            # One by one: under vmap the second derivative of a layer norm is wrong in torch 2.13, without an error.
            for support, targets, query in tasks:
                fast.append(self.adapt(support, targets))
                logits.append(functional_call(self.model, fast[-1], (query,)).logits)
        return torch.stack(logits), {name: torch.stack([task[name] for task in fast]) for name in self.adapted}

    def adapt(self, support: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns the parameters phi_S of one task, by name, after S steps on its support `[B, ...]`, `[B]`."""

        def loss(fast: Mapping[str, Tensor]) -> Tensor:
            return functional_call(self.model, dict(fast), (support,), {"targets": targets}).loss

        parameters = dict(self.model.named_parameters())
        fast: dict[str, Tensor] = {name: parameters[name] for name in self.adapted}
        rates = dict(zip(self.adapted, self.log_rate.exp(), strict=True))
        with sdpa_kernel(SDPBackend.MATH):
            for _ in range(self.steps):
                gradients = grad(loss)(fast)
                if not self.second_order:
                    gradients = {name: gradient.detach() for name, gradient in gradients.items()}
                fast = {name: value - rates[name] * gradients[name] for name, value in fast.items()}
        return fast

    def bytes_adapted(self) -> int:
        """Returns the bytes a task owns after adapting."""
        parameters = dict(self.model.named_parameters())
        return sum(parameters[name].numel() * parameters[name].element_size() for name in self.adapted)


def maml_loss(learner: MetaLearner, episodes: Episodes) -> Tensor:
    """Returns the mean loss of all tasks after adapting: a loss for `train`."""
    return learner(episodes).mean()


def reptile_loss(learner: MetaLearner, episodes: Episodes) -> Tensor:
    r"""Returns a loss whose gradient is Reptile's step (Nichol et al. 2018, arXiv 1803.02999, section 2).

    .. math:: \nabla_\theta L = \theta - \frac{1}{N} \sum_n \phi_S^{(n)}

    so that an optimizer moves the parameters towards those adapted to each task; its value is the mean loss on the
    queries after adapting, for the log. Query examples are not learned from.

    Args:
        learner: all of whose parameters adapt, usually, with `second_order=False`.
        episodes: of N tasks.
    """
    logits, fast = learner.predict(episodes)
    value = F.cross_entropy(widened(logits).flatten(0, 1), episodes.query_targets.flatten())
    now = dict(learner.model.named_parameters())
    steps = [(now[name] * (now[name] - adapted.mean(dim=0)).detach()).sum() for name, adapted in fast.items()]
    towards = torch.stack(steps).sum()
    return value.detach() + towards - towards.detach()


@torch.no_grad()
def few_shot_accuracy(learner: MetaLearner, episodes: Episodes) -> tuple[Tensor, Tensor]:
    """Measures adaptation to new tasks.

    Returns:
        The loss in nats and the accuracy of every task on its query, after adapting, float64 `[N]` on the CPU.
    """
    logits, _ = learner.predict(episodes)
    targets = episodes.query_targets
    losses = F.cross_entropy(widened(logits).transpose(1, 2), targets, reduction="none").mean(dim=1)  # [N]
    return losses.cpu().double(), (logits.argmax(dim=-1) == targets).cpu().double().mean(dim=1)


def parameters_of(
    model: nn.Module, *, types: tuple[type[nn.Module], ...] = (), names: Collection[str] = ()
) -> list[str]:
    """Returns the names of the parameters, at least one, inside modules of these types or names; of all without either.

    Example:
        >>> parameters_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), types=(nn.Linear,))
        ['0.weight', '0.bias']
    """
    everything = [name for name, _ in model.named_parameters()]
    if not types and not names:
        return everything
    inside = [name for name, module in model.named_modules() if isinstance(module, types) or name in names]
    chosen = [name for name in everything if any(name.startswith(f"{module}.") for module in inside)]
    if not chosen:
        wanted = [*(kind.__name__ for kind in types), *names]
        raise ValueError(f"Expected parameters in modules of {wanted} (got those of {inside}). Do choose others.")
    return chosen
