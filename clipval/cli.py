"""The command line: the recipe's four scripts and what stands around them, as `python -m clipval COMMAND`.

Exit codes: 0 done or passed, 1 a gate failed, 2 wrong usage or input (one line on stderr says what).
"""

from __future__ import annotations

import argparse
import sys
from typing import List, Optional

from clipval.commands import Parser, diagnose, lookup, models, recipe, speed
from clipval.errors import ClipvalError

COMMANDS = {**recipe.COMMANDS, **speed.COMMANDS, **lookup.COMMANDS, **models.COMMANDS, **diagnose.COMMANDS}


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command; the exit code."""
    parser = Parser(prog="clipval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.declare(commands.add_parser(name, help=command.help, description=command.run.__doc__))
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given, argparse.Namespace(given=given))
    try:
        return COMMANDS[args.command].run(args)
    except ClipvalError as error:
        print(f"clipval {args.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where, what = error.filename or "a file", error.strerror or error
        print(f"clipval {args.command}: {where}: {what}; check the path, its permissions and its disk", file=sys.stderr)
        return 2


def console() -> None:
    """Entry point of the `clipval` command."""
    sys.exit(main())
