"""Commands besides the recipe's steps: reports, the host, published figures, pinned embeddings."""

from __future__ import annotations

import argparse

from clipval import datasets
from clipval.backends import REFERENCE
from clipval.commands import Command, Parser, chain_of, model_options
from clipval.errors import InputError, UsageError
from clipval.options import Settings, add_options, at_least, to_path


def _declare_report(parser: Parser) -> None:
    parser.add_argument("runs", type=to_path, nargs="+", metavar="report.json", help="one to show, two to compare")


def _report(args: argparse.Namespace) -> int:
    """Show a run, or compare two, e.g. last night's and tonight's."""
    from clipval import report

    runs = [report.load(file) for file in args.runs]
    if len(runs) > 2:
        raise UsageError(f"report: {len(runs)} files, expected one or two")
    print(report.summary(runs[0]) if len(runs) == 1 else report.compare(runs[0], runs[1]))
    return 0


def _declare_doctor(parser: Parser) -> None:
    add_options(parser.add_argument, ["--device-id", "--backends", "--om-runtime"])


def _doctor(args: argparse.Namespace) -> int:
    """List what this machine has and lacks; exit 1 if something required is missing."""
    from clipval import doctor
    from clipval.results import columns

    findings = doctor.check(args.backends, Settings.of(args))
    rows = []
    for finding in findings:
        mark = "ok" if finding.ok else "MISSING" if finding.required else "warning"
        rows.append([mark, finding.name, finding.detail + (f"; {finding.advice}" if not finding.ok else "")])
    print("\n".join(columns(rows)))
    return int(any(finding.required and not finding.ok for finding in findings))


def _declare_pin(parser: Parser) -> None:
    model_options(parser)
    add_options(parser.add_argument, ["--data-dir", "--data-format", "--captions-format"])
    parser.add_argument("--samples", type=at_least(int, 1), default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--save", type=to_path, required=True, metavar="FILE", help="the .npz file to write")


def _pin(args: argparse.Namespace) -> int:
    """Write a few of PyTorch's embeddings to a file; prints the spec lines that compare later runs with them."""
    from clipval import arrays, embeddings, probe

    chain = chain_of(args)
    chain.check_inputs()
    found = {}
    for name, tower in chain.towers.items():
        count = len(chain.prepared.rows[name])
        picked = arrays.spread(count, args.samples)
        inputs = probe.inputs(chain.model, tower, 0)
        of_data, of_probe = chain.embed_some(REFERENCE, tower, picked, 1), chain.embed_probe(REFERENCE, tower, seed=0)
        found[name] = embeddings.Golden(of_data, of_probe.values, inputs.sha256)
    embeddings.write_golden(args.save, found)
    print(f'[data]\ncaptions_sha256 = "{chain.dataset.captions_sha256()}"')
    if datasets.kind(chain.spec.data.kind).draw is None:  # drawn images depend on this machine's JPEG encoder
        print(f'fingerprint = "{chain.dataset.fingerprint()}"')
    print(f'\n[golden]\nfile = "{args.save.name}"\ncosine_min = 0.99999')
    print("vision_min = 0.9999999999\ntext_min = 0.9999999999")
    counts = {name: len(one.of_data.ids) for name, one in found.items()}
    print(f'because = "PyTorch on {counts["vision"]} images, {counts["text"]} captions and the probe inputs of seed 0"')
    return 0


def _declare_reference(parser: Parser) -> None:
    parser.add_argument("--model-name", default="", metavar="NAME", help="open_clip architecture, e.g. ViT-B-32")
    parser.add_argument("--pretrained", default="", metavar="TAG", help="weight tag, e.g. laion2b_s34b_b79k")
    parser.add_argument("--dataset", default="", metavar="NAME", help="flickr30k, flickr8k or mscoco_captions")


def _reference(args: argparse.Namespace) -> int:
    """Published recall of open_clip models on Flickr30k, Flickr8k and COCO."""
    from clipval import spec
    from clipval.results import columns

    rows = spec.published(args.model_name, args.pretrained, args.dataset)
    if not rows:
        raise InputError("reference: no published figures for that model, weights and data set")
    lines = [["model", "weights", "data", "image R@1 / 5 / 10", "text R@1 / 5 / 10", "source"]]
    for row in rows:
        cells = ["-" if value is None else f"{value:.4f}" for value in row.recalls.values()]
        lines.append([row.model, row.pretrained, row.dataset, " ".join(cells[:3]), " ".join(cells[3:]), row.source])
    print("\n".join(columns(lines)))
    return 0


COMMANDS = {
    "report": Command(_declare_report, _report, "show a run, or compare two"),
    "doctor": Command(_declare_doctor, _doctor, "what this machine lacks"),
    "pin": Command(_declare_pin, _pin, "pin embeddings for later runs"),
    "reference": Command(_declare_reference, _reference, "published recall figures"),
}
