"""The server: FedAvg as it comes, and a note of when each round begins."""

import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

TENSORS = 20
app = ServerApp()


class Noting(FedAvg):
    notes = Path()

    def note(self, server_round, arrays):
        value = float(next(iter(arrays.values())).numpy().flat[0])
        with self.notes.open("a") as file:
            file.write(
                json.dumps({"round": server_round, "at": time.time(), "value": value}) + "\n"
            )

    def configure_train(self, server_round, arrays, config, grid):
        self.note(server_round, arrays)
        return super().configure_train(server_round, arrays, config, grid)


@app.main()
def main(grid, context):
    asked = context.run_config
    end = time.monotonic() + 120
    while len(list(grid.get_node_ids())) < asked["sites"]:
        if time.monotonic() > end:
            raise TimeoutError("not all SuperNodes are there after two minutes")
        time.sleep(0.2)
    torch.manual_seed(0)
    weights = {f"layer_{i:02d}.weight": torch.randn(asked["elements"]) for i in range(TENSORS)}
    strategy = Noting(fraction_evaluate=0.0)
    strategy.notes = Path(asked["notes"])
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(weights),
        num_rounds=asked["rounds"],
        timeout=asked["timeout"],
    )
    strategy.note(asked["rounds"] + 1, result.arrays)
