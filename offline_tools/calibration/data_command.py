"""`groot-int8 calibration-data`: what a set covers, and its exchange with the first public port.

Owns: the subcommand. Must not import torch: a robot reports on what it recorded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from groot_int8_ros.capture.community import ARCHIVE_FILE, export_community, import_community
from groot_int8_ros.capture.coverage import measure_coverage
from groot_int8_ros.capture.store import CaptureStore
from groot_int8_ros.policy.bundle import open_bundle
from groot_int8_ros.policy.families import LARGE_GRAPHS, REFERENCE


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    report = actions.add_parser("report", help="print what a set covers, and write it beside it")
    report.add_argument("store", type=Path, help="folder with capture.json")
    report.add_argument("--bundle", type=Path, required=True, help="bundle it was captured for")

    export = actions.add_parser("export", help=f"write {ARCHIVE_FILE} and metadata.json")
    export.add_argument("store", type=Path, help="folder with capture.json")
    export.add_argument(
        "--target",
        choices=LARGE_GRAPHS[REFERENCE],
        required=True,
        help="whose inputs; the format knows the reference graphs alone",
    )
    export.add_argument("--output", type=Path, required=True, help="new folder for both files")

    read = actions.add_parser("import", help=f"make a store from {ARCHIVE_FILE}")
    read.add_argument("archive", type=Path, help=f"{ARCHIVE_FILE}, metadata.json beside it")
    read.add_argument(
        "--bundle",
        type=Path,
        required=True,
        help="bundle of the checkpoint it was captured with; the file itself does not say which",
    )
    read.add_argument("--output", type=Path, required=True, help="new folder of the store")


def run(args: argparse.Namespace) -> int:
    """Do the action."""
    if args.action == "export":
        store = CaptureStore.open(args.store)
        export_community(store, args.target, args.output)
        print(f"{args.output}: {len(store.feeds(args.target))} rows for {args.target}")
        return 0
    bundle = open_bundle(args.bundle, verify_hashes=False)
    if args.action == "import":
        done = import_community(args.archive, bundle.manifest, args.output)
        print(f"{args.output}: {len(done.store)} samples for {done.graph}")
        if done.left_over:
            print(f"{done.left_over} rows at the end are no whole observation and were left out")
        return 0
    store = CaptureStore.open(args.store)
    store.check_bundle(bundle.manifest)
    coverage = measure_coverage(store, bundle.processor, bundle.manifest)
    coverage.write(args.store)
    print(coverage.to_text(), end="")
    return 0
