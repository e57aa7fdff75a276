"""The committed protocol code is the compiler's output, no more and no less."""

import importlib
import re

import pytest

from tests.architecture import generated_protos

MODULES = sorted(
    name.removesuffix(".py").replace("/", ".")
    for name in generated_protos.generated_in(generated_protos.ROOT)
    if name.endswith(".py")
)


def test_regenerating_changes_nothing() -> None:
    assert generated_protos.differences() == []


def test_there_is_generated_code() -> None:
    assert MODULES


@pytest.mark.parametrize("module", MODULES)
def test_generated_code_imports_and_asks_for_no_newer_runtime(module: str) -> None:
    """Gencode of protobuf 6 and grpc 1.76 runs on protobuf 6 and 7 (docs/adr/0001)."""
    loaded = importlib.import_module(module)
    text = generated_protos.ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text()
    if module.endswith("_pb2_grpc"):
        assert "GRPC_GENERATED_VERSION = '1.76.0'" in text
    else:
        assert re.search(r"^# Protobuf Python Version: 6\.", text, re.MULTILINE)
        assert loaded.DESCRIPTOR.package == "farflung.v1"
