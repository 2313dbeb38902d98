"""`longlive-rag info`: versions, and whether the CUDA kernels can be used here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch

import longlive_rag
from longlive_rag.native import cuda_status


@dataclass(frozen=True)
class Info:
    """Show the versions, what was compiled in, and whether a GPU can be used."""

    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        status = cuda_status()
        if self.json:
            facts = {"version": longlive_rag.__version__, "torch": torch.__version__, "cuda": asdict(status)}
            print(json.dumps(facts, indent=2))
            return 0
        print(f"longlive_rag   {longlive_rag.__version__}")
        print(f"torch          {torch.__version__}")
        print(f"CUDA kernels   {'built for ' + ', '.join(status.architectures) if status.built else 'not built'}")
        if status.available:
            print(f"GPU            {torch.cuda.get_device_name()}")
        else:
            print(f"GPU            not used: {status.reason}")
            print("               The PyTorch implementation is used instead; it gives the same results.")
        return 0
