"""A site: adds its constant to what it gets, and notes when it got it."""

import argparse
import json
import time

import nvflare.client as flare
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--constant", type=float)
parser.add_argument("--notes")
asked = parser.parse_args()

torch.set_num_threads(1)  # as Farflung's sites in the same measurement
flare.init()
number = int(flare.get_site_name().rpartition("-")[2])
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    at = time.time()
    weights = {name: torch.as_tensor(value) for name, value in model.params.items()}
    value = float(weights["layers.0"][0])
    with open(asked.notes, "a") as file:  # noqa: PTH123
        file.write(json.dumps({"round": model.current_round, "at": at, "value": value}) + "\n")
    for tensor in weights.values():
        tensor.add_(number * asked.constant)
    flare.send(flare.FLModel(params=weights, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
