"""The process that measures. `supervise` starts it again where a point has ended it; run by hand it does the same without that.

Exit codes are those of `kvsim.calibrate.measure`: 0 done, 2 bad input, 4 the device stopped answering, 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from kvsim.calibrate.device.grids import Scope, all_points
from kvsim.calibrate.device.rows_file import RowFile
from kvsim.calibrate.device.session import TRYING, measure, open_rows
from kvsim.calibrate.device.timer import TorchTimer
from kvsim.calibrate.measure import BAD_INPUT, DEVICE_LOST, DONE, INTERRUPTED, DeviceLostError
from kvsim.errors import InputError, KvsimError
from kvsim.model import load_model


def run(args: argparse.Namespace) -> None:
    started_s = time.monotonic()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", "cuda", "needs a CUDA GPU that torch can see", "use --device cpu")
    timer = TorchTimer(device, args.plan)
    models = tuple(load_model(name) for name in args.model)
    scope = Scope(device.type, args.plan, torch.cuda.device_count() if device.type == "cuda" else 1, models)
    with torch.no_grad():
        file: RowFile = open_rows(args.out, timer)
        timer.deadly = dict(file.header.get("deadly", {}))
        if args.retry_failed:
            file.drop_failed()
        (args.out / TRYING).unlink(missing_ok=True)  # who saw it end has read it
        session = measure(
            all_points(scope), file, timer, args.budget_s, lambda line: print(line, file=sys.stderr, flush=True),
            gpu_name=args.gpu, started_s=started_s,
        )  # fmt: skip
    print(f"{session.num_rows} points measured in {session.took_s:.0f} s, {session.left} left of the plan", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvsim.calibrate.device.worker", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--plan", choices=("full", "small"), default="full")
    parser.add_argument("--budget-s", type=float, required=True)
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--gpu")
    parser.add_argument("--retry-failed", action="store_true")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run(args)
    except KvsimError as error:
        print(error)  # for the supervisor to tell
        return BAD_INPUT
    except DeviceLostError as error:
        print(f"the device stopped answering: {error}", file=sys.stderr)
        return DEVICE_LOST
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
