"""Converted models where they are served: continuous batching, and ONNX."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch.torch_version import TorchVersion
from transformers_models import BOTH, DENSE, far

import gohgraph as goh

MOH = goh.HeadGraphConfig.moh(num_shared=1, top_k=1)
ROUTED = goh.HeadGraphConfig(goh.SiteConfig(), goh.SiteConfig.ring(2), routing=MOH.routing)


@pytest.mark.parametrize("config", [BOTH, DENSE, MOH], ids=["both", "scores", "routed"])
@pytest.mark.parametrize("implementation", ["sdpa", "paged|eager"])
def test_continuous_batching_writes_what_generate_writes(implementation, config):
    if config is not MOH and TorchVersion(hf.__version__) < "5.24":
        pytest.skip("before 5.24 attention itself fills the paged cache, with the keys of joined heads")
    model = far("llama", config)
    prompts = [[5, 6, 7, 8, 9], [11, 12], [21, 22, 23, 24, 25, 26, 27, 28]]
    # No token of the vocabulary ends a text: requests of unequal lengths run side by side to the end.
    settings = hf.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [
        model.generate(input_ids=torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    model.set_attn_implementation(implementation)
    batching = hf.ContinuousBatchingConfig(
        page_size=16, num_blocks=32, max_batch_tokens=32, use_async_batching=False
    )
    results = model.generate_batch(prompts, settings, continuous_batching_config=batching, progress_bar=False)
    found = [results[name].generated_tokens for name in sorted(results, key=lambda name: int(name.split("_")[-1]))]
    assert found == expected and not any(result.error for result in results.values())
    assert model.config._attn_implementation == implementation


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("config", [BOTH, ROUTED], ids=["both", "routed"])
def test_a_traced_model_chooses_heads_anew(config):
    model, ids = Logits(far("llama", config)), torch.randint(3, 90, (2, 7))
    traced = torch.jit.trace(model, (ids,), check_trace=False)
    for other in (ids, torch.randint(3, 90, (2, 7)), torch.randint(3, 90, (2, 11))):
        torch.testing.assert_close(traced(other), model(other), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("config", [BOTH, ROUTED], ids=["both", "routed"])
def test_onnx_computes_the_same_at_other_sizes(config, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, file = Logits(far("llama", config)), tmp_path / "model.onnx"
    with torch.no_grad():
        ids = torch.randint(3, 90, (2, 7))
        shapes = ({0: "batch", 1: "tokens"},)
        torch.onnx.export(model, (ids,), file, dynamo=True, input_names=["ids"], dynamic_shapes=shapes, verbose=False)
        session = runtime.InferenceSession(str(file))
        for other in (ids, torch.randint(3, 90, (3, 11))):
            (found,) = session.run(None, {"ids": other.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), model(other), rtol=0, atol=1e-4)
