"""The averaging server: service, runs, rounds, gathering, reduction, ledger, store, page, commands."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("farflung")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0"
