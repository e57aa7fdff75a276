"""Gateways: processes that carry models and contributions, so that the daemon's need not.

All of them listen on one port. A gateway holds nothing that matters after its end: what arrives lies
in the spool under its digests, what counts stands in the ledger, and only the daemon writes that.
"""
