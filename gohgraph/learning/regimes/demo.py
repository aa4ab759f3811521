"""A small language model with head graphs, trained while you wait."""

import torch
from tqdm import tqdm

from gohgraph.common.checks import there
from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.learning.data.corpus import PYTHON_DOCS, load_corpus, sample_batch
from gohgraph.learning.regimes.language import VOCAB_SIZE
from gohgraph.models.config import TransformerConfig
from gohgraph.models.models import LanguageModel


def demo_model(steps: int = 200, seed: int = 0) -> LanguageModel:
    """Returns a byte-level language model trained for a few steps on the built-in corpus, in eval mode.

    Args:
        steps: of AdamW, 512 bytes each; 200 take half a minute on one thread.
        seed: of weights and data; the global random state is left as it was.

    Example:
        >>> demo_model(steps=1).config.num_heads
        8
    """
    config = TransformerConfig(
        VOCAB_SIZE, d_model=64, num_heads=8, num_layers=3, d_ff=128, head_graph=HeadGraphConfig()
    )
    data = load_corpus(PYTHON_DOCS).train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    bar = tqdm(range(steps), desc="demo", unit="step", leave=False)
    for step in bar:
        inputs, targets = sample_batch(data, step, batch_size=8, length=64, seed=seed)
        loss = there(model(inputs, targets=targets).loss)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    return model.eval()
