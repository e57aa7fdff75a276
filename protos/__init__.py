"""The contract between the two ends: messages, manifests, chunks, identities, errors."""

from importlib.metadata import PackageNotFoundError, version

try:
    # Read once: the code of a process stays what it is when another version is installed.
    __version__ = version("farflung")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0"
