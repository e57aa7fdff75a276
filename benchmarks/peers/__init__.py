"""Farflung, Flower and NVIDIA FLARE side by side: the same weights to the same sites and back.

    python -m benchmarks.peers --sizes 10,100,400 --rounds 4 --json peers.json --readme

The work is that of ``farflung bench exchange``: 20 equal float32 tensors go to every site, each
site adds a constant of its own, the server averages. Nothing is trained. The systems run one after
the other, each as its documents deploy it on one machine, in an environment of its own, as real
processes over loopback, under the same sampler (`orchestrator.bench.sampler`).
"""
