"""What a head graph has to beat: published ways to let heads talk or to weigh them, behind the same slots.

Some need no module of their own. Talking heads (arXiv 2003.02436) are complete static graphs without tanh over scores
and over weights, interleaved heads (2602.21371), fused, such graphs over queries, keys and values, MEA (2601.19611)
over keys and values beside `HeadNorm`, Mixture-of-Head attention is a `HeadRouter`:
`gohgraph.graphs.baselines.presets` has them all.
"""

from gohgraph.graphs.baselines.composing import Composition
from gohgraph.graphs.baselines.differential import DifferentialPairs
from gohgraph.graphs.baselines.exclusive import ExclusiveHeads
from gohgraph.graphs.baselines.gates import SigmoidGate
from gohgraph.graphs.baselines.knocking import KnockingHeads
from gohgraph.graphs.baselines.messages import OwnContext, SoftmaxMessages
from gohgraph.graphs.baselines.norms import HeadNorm
from gohgraph.graphs.baselines.paired import PairedHeads

BASELINES = {
    "gate": SigmoidGate,
    "norm": HeadNorm,
    "knocking": KnockingHeads,
    "composition": Composition,
    "softmax": SoftmaxMessages,
    "own-context": OwnContext,
    "exclusive": ExclusiveHeads,
    "differential": DifferentialPairs,
    "paired": PairedHeads,
}
