"""Federated learning with Flower (`pip install 'gohgraph[federated]'`): text stays with its owner, weights travel.

`sharing` says which weights travel, `split` makes clients that differ, `client` trains one of them, `apps` makes it a
Flower app, `strategy` refuses updates that would stop or poison a round, `server` runs the rounds into a run folder,
and `simulation` runs everything on one machine.
"""
