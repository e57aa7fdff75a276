"""The tree of errors and its table: nothing in it is missing, nothing of it is ambiguous."""

import inspect
import re

import grpc
import pytest

from orchestrator.compute import errors as compute_errors
from protos import errors
from protos.errors import ERRORS, ComputeFailed, FarflungError, Row, by_name, reference_id, row
from protos.rpc import to_status


def tree() -> list[type[FarflungError]]:
    """Every class that `protos/errors.py` defines, in the order of the file."""
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type)
        and issubclass(value, FarflungError)
        and value.__module__ == errors.__name__
    ]


@pytest.mark.parametrize("cls", tree(), ids=lambda cls: cls.__name__)
def test_table_has_every_class(cls: type[FarflungError]) -> None:
    entry = ERRORS[cls]
    assert entry.status in grpc.StatusCode.__members__
    assert entry.status not in ("OK", "UNKNOWN")
    # 1 and 2 are Python's and the command line's own, above 113 shells have meanings of theirs.
    assert 2 < entry.exit_code <= 113
    assert entry.public.endswith(".")
    assert entry.public[0].isupper()
    assert row(cls("message")) is entry
    assert by_name(cls.__name__) is cls


def test_table_has_nothing_else() -> None:
    assert set(ERRORS) == set(tree())


def test_public_sentences_tell_classes_apart() -> None:
    assert len({entry.public for entry in ERRORS.values()}) == len(ERRORS)


def test_docstring_draws_the_tree_as_it_is() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in inspect.getdoc(errors).splitlines():  # type: ignore[union-attr]
        found = re.match(r"(?:    )?([│ ├└─]*)([A-Z]\w+)(?:\s|$)", line)
        if found is None or not (found[1].strip() or found[2] == "FarflungError"):
            continue
        depth = len(found[1]) // 4
        path[depth:] = [found[2]]
        drawn[found[2]] = path[depth - 1] if depth else ""
    is_so = {cls.__name__: cls.__base__.__name__ for cls in tree() if cls.__base__}
    assert drawn == {**is_so, "FarflungError": ""}


def test_error_of_a_class_outside_is_its_nearest_base() -> None:
    class Mine(ComputeFailed):
        """One of another module."""

    assert row(Mine("x")) is ERRORS[ComputeFailed]
    assert to_status(Mine("x")).trailing[0][1] == "ComputeFailed"
    assert row(ValueError("x")) is ERRORS[FarflungError]
    assert by_name("Mine") is FarflungError


def test_compute_errors_cross_the_wire_as_what_they_are() -> None:
    """The command line must not end with "internal error" where a plug-in failed."""
    classes = [
        value
        for value in vars(compute_errors).values()
        if isinstance(value, type) and issubclass(value, FarflungError)
    ]
    assert len(classes) > 5
    for cls in classes:
        name = to_status(cls("x")).trailing[0][1]
        assert isinstance(name, str)
        assert ERRORS[by_name(name)] == row(cls("x"))


def test_facts_are_data() -> None:
    error = errors.ContributionRefused("site north: no", site="north", tensor="w", n=3)
    assert str(error) == error.message == "site north: no"
    assert error.facts == {"site": "north", "tensor": "w", "n": 3}


def test_rows_of_one_kind_have_one_exit_code() -> None:
    """A script tells apart what it can act on: what was given, not allowed, not there, not now."""
    by_code: dict[int, set[str]] = {}
    for entry in ERRORS.values():
        by_code.setdefault(entry.exit_code, set()).add(entry.status)
    assert by_code[77] == {"PERMISSION_DENIED", "UNAUTHENTICATED"}
    assert by_code[69] == {"UNAVAILABLE"}
    assert by_code[66] == {"NOT_FOUND"}
    assert isinstance(ERRORS[FarflungError], Row)


def test_reference_ids_differ() -> None:
    assert len({reference_id() for _ in range(100)}) == 100
