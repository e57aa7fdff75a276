"""Rounds of a real federation whose store is a bucket."""

from __future__ import annotations

import socket
from pathlib import Path

import obstore
import pytest
from safetensors.torch import load_file

from tests.support.field import SITES, Field
from tests.support.files import wait_for
from tests.support.object_store import SECRET, ObjectStore
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.xdist_group("ray")]


@pytest.mark.parametrize("gateways", [0, 2])
def test_two_rounds_on_a_bucket_that_is_away_for_a_while(
    tmp_path: Path, object_store: ObjectStore, gateways: int
) -> None:
    """Sites fetch and contribute, and send again once the bucket is back; the export is what it holds."""
    prefix = f"rounds-{gateways}"
    with Proxy(object_store.address) as line:
        section = object_store.section(prefix, line.address, cache_bytes=1000)
        carriers = {"processes": gateways, "bind": "127.0.0.1:0"}
        field = Field(tmp_path, daemon={"store": section, "gateways": carriers})
        federation = field.federation
        gates = [field.switches[site] / "gate" for site in SITES]
        for gate in gates:
            gate.touch()
        with federation:
            run = federation.launch(
                field.config(
                    "bucket",
                    # Too large to go out with the plans.
                    task={"name": "blobs", "params": {"hidden": 4000}},
                    cohort={"quorum": 3, "deadline_s": 200},
                    strategy=[{"name": "co_learning"}, {"name": "feddf", "steps": 3}],
                    init={"from": "site:north"},
                )
            )
            for site in SITES:
                wait_for(field.switches[site] / "reached", 120)
            # Every site has its base and trains: now what they send can't be stored.
            with socket.create_server(("127.0.0.1", 0)) as nobody:
                nobody.settimeout(60)
                target, line.target = line.target, f"127.0.0.1:{nobody.getsockname()[1]}"
                line.cut()
                for gate in gates:
                    gate.unlink()
                for _ in range(10):
                    nobody.accept()[0].close()
            line.target = target

            view = federation.wait(run, 240)
            assert view.state == "finished", view.reason
            rounds = federation.rounds(run)
            for round in rounds:
                assert round.attempt == 1
                assert {row.state for row in round.sites} == {"counted"}
                assert all(plugin.state == "done" for plugin in round.plugins), round.plugins
            federation.client.export(run, "", tmp_path / "out")

    raw, model = object_store.raw(prefix), rounds[-1].model
    keys = {meta["path"] for page in obstore.list(raw) for meta in page}
    assert f"artefacts/{model[:2]}/{model}.index" in keys
    assert list((federation.home.store).rglob("*.index")) == [], "nothing is decided here"
    weights = load_file(tmp_path / "out" / "model.safetensors")["first.weight"].numpy().tobytes()
    stored = bytes(obstore.get(raw, f"artefacts/{model[:2]}/{model}.data").bytes())
    assert weights in stored
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
