"""The inside of a check: one variant, in a process that may hang or die. Says what it does, a JSON object a line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from longlive_rag.checking.cases import cases
from longlive_rag.checking.variants import VARIANTS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m longlive_rag.checking", description=__doc__)
    parser.add_argument("variant", choices=sorted(VARIANTS))
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--thorough", action="store_true")
    options = parser.parse_args(arguments)
    with torch.no_grad():
        for case in cases(VARIANTS[options.variant], options.device, options.thorough):
            print(json.dumps({"begun": case.name}), flush=True)
            error, limit = case.run()
            print(json.dumps({"case": case.name, "error": error, "limit": limit}), flush=True)
    print(json.dumps({"finished": True}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
