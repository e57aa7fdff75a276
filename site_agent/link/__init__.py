"""The half of the agent that talks to the orchestrator: keys, stream, outbox, policy. No torch."""

import os

# gRPC logs every failed handshake to stderr for seconds; the agent's own log has the diagnosis.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
