"""The command line, `python -m clipval COMMAND`: the recipe's scripts and further commands.

Exit codes: 0 done or passed, 1 a gate failed, 2 wrong usage or input (one line on stderr says what).
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Dict, List, Optional

from clipval.ascend import process
from clipval.commands import Command, Parser, compare, diagnose, embed, lookup, models, recipe, speed
from clipval.errors import ClipvalError, os_cause

CLOSED_PIPE = 141  # 128 + SIGPIPE, like any other command
PARTS = (recipe, embed, speed, lookup, models, diagnose, compare)
COMMANDS: Dict[str, Command] = {name: one for part in PARTS for name, one in part.COMMANDS.items()}


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command; returns the exit code."""
    process.keep_torch_npu_out()
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
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"clipval {args.command}: {os_cause(error)}", file=sys.stderr)
        return 2


def console() -> None:
    """Entry point of the `clipval` command; exits silently if the reader closes the pipe, e.g. `head`."""
    code: object = 0
    try:
        try:
            code = main()
        except SystemExit as ended:  # of --help and of wrong usage
            code = ended.code
        if sys.stdout is not None:  # None: closed by the caller, `clipval ... >&-`
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again on exit
        code = CLOSED_PIPE
    except OSError as error:  # a short output is written only now
        print(f"clipval: {os_cause(error)}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 2
    sys.exit(code)
