"""The table of planted faults: what is wrong, the gate that is meant for it, and the words that it must say."""

from __future__ import annotations

import re
from typing import Any, Callable, Dict, NamedTuple, Tuple

ACCURACY = ("-m", "accuracy")
REBUILD = (*ACCURACY, "--rebuild")  # the reference too, which is kept between runs
SEEDED = (*ACCURACY, "--pretrained=random")
# Artifacts that faults of a module damage while they are made; others take those of the clean run.
DAMAGED = {"tests.faults.in_data": ("prepared", "onnx"), "tests.faults.in_exports": ("onnx",)}
OF_RUNS = "tests.faults.in_suite"  # faults of which gates a run collects and of how it ends


class Fault(NamedTuple):
    """One fault.

    Attributes:
        says: what is wrong, for the documentation.
        gate: prefix of the gate that is meant for it, or of the error before the first gate.
        words: must stand in the output of the failed run.
        plant: replaces what must be replaced; arguments: of the run; code: what it must end with.
        baseline: the run is given one, of the same rows without the fault.
        damaged: kinds of artifacts that the run must make itself.
        alone: more arguments, with which the run judges the gates that it names and no others.
    """

    says: str
    gate: str
    words: Tuple[str, ...]
    plant: Callable[[], None]
    arguments: Tuple[str, ...] = ACCURACY
    code: int = 1
    baseline: bool = False
    damaged: Tuple[str, ...] = ()
    alone: Tuple[str, ...] = ()


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
        named = [one for one in (gate, *words) if re.fullmatch(r"\w+/\S+", one)]
        alone = (f"--gate={','.join(named)}",) if named and plant.__module__ != OF_RUNS else ()
        FAULTS[plant.__name__] = Fault(says, gate, words, plant, arguments, code, baseline, damaged, alone)
        return plant

    return add
