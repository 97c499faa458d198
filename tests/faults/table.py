"""The table of planted faults: what is wrong, the gate that is meant for it, and the words that it must say."""

from __future__ import annotations

from typing import Any, Callable, Dict, NamedTuple, Tuple

ACCURACY = ("-m", "accuracy")
REBUILD = (*ACCURACY, "--rebuild")  # the reference too, which is kept between runs
SEEDED = (*ACCURACY, "--pretrained=random")
# Artifacts that faults of a module damage while they are made; others take those of the clean run.
DAMAGED = {"tests.faults.in_data": ("prepared", "onnx"), "tests.faults.in_exports": ("onnx",)}


class Fault(NamedTuple):
    """One fault.

    Attributes:
        says: what is wrong, for the documentation.
        gate: prefix of the gate that is meant for it, or of the error before the first gate.
        words: must stand in the output of the failed run.
        plant: replaces what must be replaced; arguments: of the run; code: what it must end with.
        baseline: the run is given one, of the same rows without the fault.
        damaged: kinds of artifacts that the run must make itself.
    """

    says: str
    gate: str
    words: Tuple[str, ...]
    plant: Callable[[], None]
    arguments: Tuple[str, ...] = ACCURACY
    code: int = 1
    baseline: bool = False
    damaged: Tuple[str, ...] = ()


FAULTS: Dict[str, Fault] = {}


def fault(
    says: str,
    gate: str,
    *words: str,
    arguments: Tuple[str, ...] = ACCURACY,
    code: int = 1,
    baseline: bool = False,
) -> Callable[[Any], Any]:
    """Enter a function that plants a fault under its own name."""

    def add(plant: Callable[[], None]) -> Callable[[], None]:
        damaged = DAMAGED.get(plant.__module__, ())
        FAULTS[plant.__name__] = Fault(says, gate, words, plant, arguments, code, baseline, damaged)
        return plant

    return add
