"""Whether the generated code beside `protos/v1/*.proto` is what the compiler makes of them today.

Run as a script (`make check` does) it says what differs and exits 1. `make protos` repairs it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generated_in(tree: Path) -> dict[str, bytes]:
    """The generated files under `tree`, by their path relative to it."""
    found = (path for pattern in GENERATED for path in (tree / "protos").rglob(pattern))
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in found}


def regenerate(into: Path) -> None:
    """Compile every .proto file of the repository, with the output below `into`."""
    sources = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "protos/v1").glob("*.proto"))
    if not sources:
        raise FileNotFoundError(f"no .proto files in {ROOT / 'protos/v1'}")
    outputs = [f"--{kind}_out={into}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    # protoc finds the plug-in protoc-gen-mypy on PATH; it lies beside this interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *outputs, *sources],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        check=True,
    )


def differences() -> list[str]:
    """One sentence for each generated file that is missing, stale or orphaned."""
    with tempfile.TemporaryDirectory() as folder:
        regenerate(Path(folder))
        wanted = generated_in(Path(folder))
    present = generated_in(ROOT)
    missing = [f"{name} is missing" for name in wanted.keys() - present.keys()]
    orphaned = [f"{name} has no .proto file" for name in present.keys() - wanted.keys()]
    stale = [
        f"{name} is not what its .proto file says"
        for name in wanted.keys() & present.keys()
        if wanted[name] != present[name]
    ]
    return sorted(missing + orphaned + stale)


def main() -> int:
    found = differences()
    for sentence in found:
        print(sentence)
    print("Run `make protos` and commit the result." if found else "Generated protos are current.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
