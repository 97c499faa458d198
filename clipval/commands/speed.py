"""Throughput without pytest: rows of one process, and a baseline from several."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, List, Sequence, Tuple

from clipval import backends
from clipval.commands import Command, Parser, batch_of_name, chain_of, model_options, say_notes, tower_of_onnx
from clipval.errors import InputError, UsageError
from clipval.options import ONNX_OPTIONS, add_options, at_least, to_path

if TYPE_CHECKING:
    from clipval.backends import Backend
    from clipval.chain import Chain
    from clipval.throughput.baseline import Baseline
    from clipval.throughput.machine import Pace
    from clipval.throughput.row import Judged, Row

HEADS = ("row", "samples/s", "95 % interval", "1000*bs/mean ms", "undisturbed", "rounds", "verdict")
WIDTHS = (30, 9, 22)  # rows are printed as they are measured


def _declare_bench(parser: Parser) -> None:
    model_options(parser)
    names = ["--data-dir", "--backends", "--batch-sizes", *ONNX_OPTIONS, "--device-id", "--precision-mode"]
    names += [
        "--soc-version",
        "--om-dir",
        "--om-runtime",
        "--device-timeout",
        "--allow-health",
        "--allow-simulated",
        "--perf-min-time",
        "--perf-max-time",
        "--perf-noise",
    ]
    add_options(parser.add_argument, names)
    parser.add_argument("--model", type=to_path, metavar="FILE", help="one ONNX or OM file, as for ais_bench")
    parser.add_argument(
        "--batchsize", "--batch-size", type=at_least(int, 1), metavar="N", help="of --model; default: the OM file's"
    )
    parser.add_argument("--loop", type=int, metavar="N", help="timed calls, instead of a time")
    parser.add_argument("--save", type=to_path, metavar="FILE", help="write the rows as a baseline of one session")


def _bench(args: argparse.Namespace) -> int:
    """Throughput of one model file, or of every backend, tower and batch size of the spec.

    Exit code 1: with --save, if a row's outputs are wrong, it was disturbed, or it has too few calls.
    """
    from clipval.throughput import baseline, rows
    from clipval.throughput.machine import Pace

    if args.loop is not None and args.loop < 1:
        raise UsageError(f"bench --loop {args.loop}: at least 1")
    if args.save and args.model:
        raise UsageError("bench --save: a baseline is for the spec's model; leave out --model")
    chain = chain_of(args)
    pace = Pace(threads=args.threads)
    _print(HEADS)
    found = [_bench_row(chain, backend, size, args, pace) for backend, size in _benched(chain, args)]
    chain.close()
    made_by = {row.made_by.name: str(row.made_by) for row in found}
    for identity in made_by.values():
        print(f"by {identity}")
    useless = [said for row in found for said in _useless(row)]
    if args.save and useless:
        print(f"bench --save: no baseline is saved from this session: {useless[0]}", file=sys.stderr)
        return 1
    if args.save:
        timings = {name: one.timing for row in found for name, one in _named(row)}
        session = baseline.Baseline(
            rows.baseline_key(chain, made_by),
            {name: [timing.undisturbed] for name, timing in timings.items()},
            pace.best,
            medians={name: [timing.samples_per_second] for name, timing in timings.items()},
            means={name: [timing.samples_per_second_mean] for name, timing in timings.items()},
        )
        baseline.save(session, args.save)
    return 0


def _named(row: Row) -> List[Tuple[str, Judged]]:
    """The clocks of a row by their names in a baseline."""
    from clipval.throughput import baseline

    return [
        (baseline.row_name(row.made_by.name, row.tower, row.batch_size, scope), one)
        for scope, one in row.clocks.items()
    ]


def _useless(row: Row) -> List[str]:
    """Why a row cannot be part of a baseline."""
    from clipval.throughput.verdict import BUSY, FAULTS, INSUFFICIENT

    bad = (*FAULTS, BUSY, INSUFFICIENT)
    return [f"{name} is {one.verdict}: {one.reason}" for name, one in _named(row) if one.verdict in bad]


def _benched(chain: Chain, args: argparse.Namespace) -> Iterator[Tuple[Backend, int]]:
    """Open backends one after another, each with the batch size to measure."""
    if args.model is None:
        for name in chain.settings.validated:
            for tower in chain.towers.values():
                for size in chain.batch_sizes:
                    yield chain.backend(name, tower, size), size
        return
    opener = backends.of_file(args.model)
    size = args.batchsize or batch_of_name(args.model) or 1
    if opener is None or not args.model.is_file():
        known = " or ".join(filter(None, (backends.kind(name).suffix for name in backends.names())))
        raise UsageError(f"bench --model {args.model}: no such {known} file")
    name = "text" if "text" in args.model.stem else "vision"
    tower = tower_of_onnx(args.model) if backends.kind(opener).takes_onnx else chain.towers[name]
    backend = chain.pool.open_file(opener, tower, args.model, size)
    say_notes(backend)
    yield backend, size
    backend.close()


def _bench_row(chain: Chain, backend: Backend, size: int, args: argparse.Namespace, pace: Pace) -> Row:
    """Measure and print one row; for a baseline for all of `--perf-max-time`, with the machine at full speed."""
    from clipval.export import example_rows
    from clipval.throughput import rows
    from clipval.throughput.feed import Feed
    from clipval.throughput.protocol import Plan, measure

    own = args.model is None  # the spec's model, so that outputs can be compared with PyTorch's
    data = chain.prepared.rows[backend.tower.name] if own else example_rows(backend.tower, 2 * size)
    subject = rows.subject(chain, backend, Feed(data, size), pace=pace if args.save else None, checked=own)
    settled = args.save is not None
    plan = Plan(args.perf_min_time, args.perf_max_time, rounds=args.loop, noise=args.perf_noise, settled=settled)
    row, _ = measure(subject, plan)
    for name, one in _named(row):
        timing, (low, high) = one.timing, one.timing.interval
        figures = [timing.samples_per_second_mean, timing.undisturbed]
        shown = f"{timing.samples_per_second:.1f}", f"{low:.1f} .. {high:.1f}", *(f"{value:.1f}" for value in figures)
        _print([name, *shown, str(timing.rounds), f"{one.verdict} {one.reason}"])
    if row.copies is not None:
        print(
            "copies: " + ", ".join(f"{name} {seconds * 1000:.3f} ms per call" for name, seconds in row.copies.items())
        )
    return row


def _print(cells: Sequence[str]) -> None:
    """One row of the table, aligned with the others."""
    from clipval.results import columns

    least = [max(width, len(head)) for width, head in zip((*WIDTHS, 0, 0, 0, 0), HEADS)]
    print(columns([cells], right=range(1, 6), least=least)[0], flush=True)


def _declare_baseline(parser: Parser) -> None:
    _declare_bench(parser)
    parser.add_argument("--sessions", type=int, default=5, metavar="N", help="new processes (default: %(default)s)")


def _make_baseline(args: argparse.Namespace) -> int:
    """Measure throughput in several new processes and write one file, for pytest --baseline FILE.

    A disturbed session is repeated once, so that the others are not lost.
    """
    import tempfile

    from clipval.throughput import baseline, noise

    if args.save is None or args.save.is_dir() or args.sessions < baseline.MIN_SESSIONS:
        raise UsageError(f"baseline: give --save FILE and at least --sessions {baseline.MIN_SESSIONS}")
    args.save.absolute().parent.mkdir(parents=True, exist_ok=True)
    # the last --save on the command line counts
    fixed = [sys.executable, "-m", "clipval", "bench", *_without(args.given[1:], "--sessions")]
    # next to the file, so that a read-only folder is noticed before anything is measured
    with tempfile.TemporaryDirectory(dir=args.save.absolute().parent) as folder:
        commands = [[*fixed, "--save", str(Path(folder) / f"{n}.json")] for n in range(args.sessions)]
        sessions = [_session(command, f"{n} of {args.sessions}") for n, command in enumerate(commands, 1)]
        for n in baseline.slow_sessions(sessions):
            sessions[n] = _session(commands[n], f"{n + 1} of {args.sessions}, once more")
    made = baseline.merge(sessions)
    baseline.save(made, args.save)
    print(f"{args.save}: {len(made.rows)} rows, {args.sessions} sessions, noise {noise.pooled(made.rows):.2%}")
    return 0


def _session(command: Sequence[str], name: str) -> Baseline:
    """Run one session of a baseline, and repeat it once if it was disturbed."""
    import subprocess

    from clipval.throughput import baseline

    for said in (name, f"{name}, once more"):
        print(f"session {said}", file=sys.stderr)
        rows = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # shown as they come on a terminal
        code = subprocess.run(command, stdout=rows, check=False).returncode
        if code != 1:
            break
    if code:
        raise InputError(f"baseline: session {name} ended with exit code {code}, see above")
    return baseline.load(Path(command[-1]))


def _without(arguments: Sequence[str], flag: str) -> List[str]:
    """Arguments without one flag and its value."""
    kept = [one for one in arguments if not one.startswith(f"{flag}=")]
    if flag in kept:
        place = kept.index(flag)
        del kept[place : place + 2]
    return kept


COMMANDS = {
    "bench": Command(_declare_bench, _bench, "throughput"),
    "baseline": Command(_declare_baseline, _make_baseline, "throughput of several processes, for later comparison"),
}
