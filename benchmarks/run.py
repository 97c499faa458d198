"""`python benchmarks/run.py NAME`: one part of clipval and its peer, side by side in one run; no part of the tests.

Each other file here is a benchmark, but `side_by_side.py`. What was measured, and on which machine, is kept in
`docs/performance.md`; ratios hold elsewhere, seconds do not.
"""

import argparse
import importlib
import json
from pathlib import Path

from clipval import environment

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("run", "side_by_side"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="name", required=True)
    modules = {name: importlib.import_module(name) for name in NAMES}
    for name, module in modules.items():
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        command.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
        module.declare(command)
    args = parser.parse_args()
    machine = environment.describe()
    print(f"{machine['cpu']}, {machine['usable_cores']} cores, Python {machine['python']}, {machine['packages']}")
    figures = modules[args.name].run(args)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, **figures}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
