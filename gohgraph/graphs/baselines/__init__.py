"""What a head graph has to beat: published ways to let heads talk or to weigh them, behind the same slots.

Some need no module of their own. Talking heads (arXiv 2003.02436) are complete static graphs without tanh over scores
and over weights, MEA (arXiv 2601.19611) such graphs over keys and over values beside `HeadNorm`, Mixture-of-Head
attention is a `HeadRouter`: `gohgraph.graphs.baselines.presets` has them all.
"""

from gohgraph.graphs.baselines.composing import Composition
from gohgraph.graphs.baselines.gates import SigmoidGate
from gohgraph.graphs.baselines.knocking import KnockingHeads
from gohgraph.graphs.baselines.messages import OwnContext, SoftmaxMessages
from gohgraph.graphs.baselines.norms import HeadNorm

BASELINES = {
    "gate": SigmoidGate,
    "norm": HeadNorm,
    "knocking": KnockingHeads,
    "composition": Composition,
    "softmax": SoftmaxMessages,
    "own-context": OwnContext,
}
