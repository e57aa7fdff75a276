"""The averaging server: service, runs, rounds, gathering, reduction, ledger, store, page, commands."""
