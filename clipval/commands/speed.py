"""Throughput without a test runner: rows of one process, and a baseline of several."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Sequence

from clipval import backends
from clipval.commands import Command, Parser, batch_of_name, chain_of, model_options, tower_of_onnx
from clipval.errors import InputError, UsageError
from clipval.options import add_options, at_least


def _declare_bench(parser: Parser) -> None:
    model_options(parser)
    names = ["--data-dir", "--backends", "--batch-sizes", "--onnx-providers", "--device-id", "--precision-mode"]
    names += ["--soc-version", "--om-dir", "--allow-simulated", "--perf-min-time", "--perf-max-time", "--perf-noise"]
    add_options(parser.add_argument, names)
    parser.add_argument("--model", type=Path, metavar="FILE", help="one ONNX or OM file, as ais_bench takes it")
    parser.add_argument(
        "--batchsize", "--batch-size", type=at_least(int, 1), metavar="N", help="of --model; default: the OM file's"
    )
    parser.add_argument("--loop", type=int, metavar="N", help="timed calls, instead of a time")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the rows as a baseline of one session")


def _bench(args: argparse.Namespace) -> int:
    """Throughput of one model file, or of every backend, tower and batch size of the spec.

    Exit code 1: --save was given, and a row computes something else, was disturbed, or has too few calls.
    """
    from clipval import baseline, bench, machine
    from clipval.throughput import BAD_OUTPUT, BUSY, INSUFFICIENT

    if args.loop is not None and args.loop < 1:
        raise UsageError(f"bench --loop {args.loop}: at least 1")
    if args.save and args.model:
        raise UsageError("bench --save: a baseline is of the spec's model; leave out --model")
    chain = chain_of(args)
    rows: Dict[str, List[float]] = {}
    made_by: Dict[str, str] = {}
    pace = machine.Pace(threads=args.threads)
    useless: List[str] = []
    print(
        "row                            samples/s  95 % interval          1000*bs/mean ms  undisturbed  rounds  verdict"
    )
    for backend, size in _benched(chain, args):
        for scope, (row, verdict, reason) in _bench_row(chain, backend, size, args, pace).items():
            name = baseline.row_name(backend.identity.name, backend.tower.name, size, scope)
            rows[name], made_by[backend.identity.name] = [row.undisturbed], str(backend.identity)
            useless += [f"{name} is {verdict}: {reason}"] if verdict in (BAD_OUTPUT, BUSY, INSUFFICIENT) else []
            low, high = row.interval
            print(
                f"{name:30} {row.samples_per_second:9.1f}  {low:9.1f} .. {high:9.1f}  "
                f"{row.samples_per_second_mean:15.1f}  {row.undisturbed:11.1f}  {row.rounds:6}  "
                f"{verdict} {reason}".rstrip()
            )
    chain.close()
    for identity in made_by.values():
        print(f"by {identity}")
    if args.save and useless:
        print(f"bench --save: no baseline is made of this session, {useless[0]}", file=sys.stderr)
        return 1
    if args.save:
        baseline.save(baseline.Baseline(bench.baseline_key(chain, made_by), rows, pace.best), args.save)
    return 0


def _benched(chain: Any, args: argparse.Namespace) -> Any:
    """Open backends one after the other, with the batch size to measure."""
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
    backend = chain.open_file(opener, tower, args.model, size)
    yield backend, size
    backend.close()


def _bench_row(chain: Any, backend: Any, size: int, args: argparse.Namespace, pace: Any) -> Dict[str, Any]:
    """One row; for a baseline timed for all of `--perf-max-time`, beside the machine's own speed."""
    from clipval import bench, machine, throughput
    from clipval.export import example_rows

    tower = backend.tower
    rows = chain.prepared.rows[tower.name] if args.model is None else example_rows(tower, 2 * size)
    limits: Dict[str, Any] = {"seconds": args.perf_min_time, "cap": args.perf_max_time}
    limits.update(rounds=args.loop, noise=args.perf_noise, whole=args.save is not None)
    feed = throughput.Feed(rows, size)
    if args.model is None and chain.spec.parity:  # PyTorch is at hand, and bounds to hold the outputs to it
        limits["check"] = lambda: bench.check_outputs(chain, backend, feed)
    limits["busy"] = lambda: chain.busy(backend.identity.name)
    again = partial(throughput.measure, backend, feed, size, **limits)
    if not args.save:
        return dict(again())
    here = pace if backend.identity.on_host else None
    rows, share = bench.watched(again, here, lambda _, share: share >= machine.SETTLED)
    if share < machine.SETTLED:
        slow = (throughput.BUSY, f"the machine ran at {share:.0%} of its speed at best")
        return {
            scope: found if found[1] == throughput.BAD_OUTPUT else (found[0], *slow) for scope, found in rows.items()
        }
    return rows


def _declare_baseline(parser: Parser) -> None:
    _declare_bench(parser)
    parser.add_argument("--sessions", type=int, default=5, metavar="N", help="fresh processes (default: %(default)s)")


def _make_baseline(args: argparse.Namespace) -> int:
    """Throughput of several fresh processes into one file, for pytest --baseline FILE.

    A session that was disturbed is made a second time, so that one moment does not cost the others.
    """
    import tempfile

    from clipval import baseline

    if args.save is None or args.save.is_dir() or args.sessions < baseline.MIN_SESSIONS:
        raise UsageError(f"baseline: give --save FILE and at least --sessions {baseline.MIN_SESSIONS}")
    args.save.absolute().parent.mkdir(parents=True, exist_ok=True)
    # of two --save the last one counts
    fixed = [sys.executable, "-m", "clipval", "bench", *_without(args.given[1:], "--sessions")]
    # beside the file, so that a folder that cannot be written is found before anything is measured
    with tempfile.TemporaryDirectory(dir=args.save.absolute().parent) as folder:
        commands = [[*fixed, "--save", str(Path(folder) / f"{n}.json")] for n in range(args.sessions)]
        sessions = [_session(command, f"{n} of {args.sessions}") for n, command in enumerate(commands, 1)]
        for n in baseline.slow_sessions(sessions):
            sessions[n] = _session(commands[n], f"{n + 1} of {args.sessions}, once more")
    made = baseline.merge(sessions)
    baseline.save(made, args.save)
    print(f"{args.save}: {len(made.rows)} rows, {args.sessions} sessions, noise {baseline.noise(made):.2%}")
    return 0


def _session(command: Sequence[str], name: str) -> Any:
    """Run one session of a baseline, and once more where it was disturbed."""
    import subprocess

    from clipval import baseline

    for said in (name, f"{name}, once more"):
        print(f"session {said}", file=sys.stderr)
        rows = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # shown as they come, to a person
        code = subprocess.run(command, stdout=rows, check=False).returncode
        if code != 1:
            break
    if code:
        raise InputError(f"baseline: session {name} ended with exit code {code}, see above")
    return baseline.load(Path(command[-1]))


def _without(arguments: Sequence[str], flag: str) -> List[str]:
    """Arguments less one flag and its value."""
    kept = [one for one in arguments if not one.startswith(f"{flag}=")]
    if flag in kept:
        place = kept.index(flag)
        del kept[place : place + 2]
    return kept


COMMANDS = {
    "bench": Command(_declare_bench, _bench, "throughput"),
    "baseline": Command(_declare_baseline, _make_baseline, "throughput of several processes, to compare with"),
}
