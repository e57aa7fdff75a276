"""Writes the job folder: the FedAvg recipe for PyTorch as it comes."""

import argparse

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe

parser = argparse.ArgumentParser()
parser.add_argument("--elements", type=int)
parser.add_argument("--rounds", type=int)
parser.add_argument("--sites", type=int)
parser.add_argument("--constant", type=float)
parser.add_argument("--notes")
parser.add_argument("--out")
asked = parser.parse_args()

recipe = FedAvgRecipe(
    name="round_trip",
    model={"class_path": "model.Weights", "args": {"elements": asked.elements}},
    min_clients=asked.sites,
    num_rounds=asked.rounds,
    train_script="site.py",
    train_args=f"--constant {asked.constant!r} --notes {asked.notes}",
)
recipe.add_server_file("model.py")
recipe.export(asked.out)
