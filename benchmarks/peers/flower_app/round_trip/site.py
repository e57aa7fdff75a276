"""A site: adds its constant to what it gets."""

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

torch.set_num_threads(1)  # as Farflung's sites in the same measurement
app = ClientApp()


@app.train()
def train(msg, context):
    weights = msg.content["arrays"].to_torch_state_dict()
    for tensor in weights.values():
        tensor.add_(context.node_config["constant"])
    told = {"arrays": ArrayRecord(weights), "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(told), reply_to=msg)
