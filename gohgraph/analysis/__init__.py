"""What a trained head graph is like, which of its heads and edges matter, and what is left when the others go."""

from gohgraph.analysis.ablation import edge_ablation
from gohgraph.analysis.attribution import edge_attribution
from gohgraph.analysis.heads import head_importance
from gohgraph.analysis.measures import Measures, measures
from gohgraph.analysis.pruning import prune, pruning_curve, random_scores
from gohgraph.analysis.strength import edge_strength, rank_agreement

__all__ = [
    "Measures",
    "edge_ablation",
    "edge_attribution",
    "edge_strength",
    "rank_agreement",
    "head_importance",
    "measures",
    "prune",
    "pruning_curve",
    "random_scores",
]
