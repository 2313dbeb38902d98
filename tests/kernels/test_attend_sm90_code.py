"""What the compiler makes of attend on Hopper: no spills, no serialised wgmma, registers handed over, softmax where it
overlaps. Needs nvcc; the disassembly also cuobjdump, from the toolkit or PyPI's nvidia-cuda-cuobjdump."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCE = """
#include "cuda/attend_sm90.cuh"
namespace longlive {{
template __global__ void attend_sm90_kernel<{}>(const __grid_constant__ AttendSm90Parameters);
}}
"""
VARIANTS = ["__nv_bfloat16, 128, 112, 2", "__nv_bfloat16, 128, 176, 2", "__nv_bfloat16, 128, 112, 3"]


Compiled = Callable[[str], tuple[str, Path]]
"""From template arguments to what ptxas says, and the object file."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc to compile for sm_90a with")
    folder = tmp_path_factory.mktemp("attend_sm90")

    @functools.cache
    def compile_variant(variant: str) -> tuple[str, Path]:
        source = folder / f"{variant.replace(', ', '_')}.cu"
        target = source.with_suffix(".o")
        source.write_text(SOURCE.format(variant))
        flags = ["-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-c"]
        command = [nvcc, *flags, f"-I{CSRC}", source, "-o", target]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr, target

    return compile_variant


def cuobjdump() -> str:
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    found = [shutil.which("cuobjdump"), *map(str, packages.glob("**/bin/cuobjdump"))]
    for program in found:
        if program is not None:
            return program
    pytest.skip("no cuobjdump (PyPI: nvidia-cuda-cuobjdump)")


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiler_report(compiled, variant):
    report, _ = compiled(variant)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    # C75xx: wgmma serialised, setmaxnreg ignored.
    assert not re.findall(r"\(C75\d\d\).*|.*warning.*", report)


def test_instructions(compiled):
    """Copies by TMA, products by wgmma with nothing in local memory, and the exponentials between the two waits: after
    the scores have come and while the product with the values is under way."""
    program = cuobjdump()
    _, target = compiled(VARIANTS[0])
    listing = subprocess.run([program, "-sass", target], capture_output=True, text=True, check=True).stdout
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", listing, re.MULTILINE)
    assert sum("UTMALDG.5D" in line for line in code) == 3, "query, keys and values"
    assert sum("USETMAXREG" in line for line in code) == 2
    assert not [line for line in code if re.search(r"\b(LDL|STL)\b", line)]
    scores = next(i for i, line in enumerate(code) if "WARPGROUP.DEPBAR" in line and "0x1" in line)
    output = next(i for i, line in enumerate(code) if i > scores and "WARPGROUP.DEPBAR" in line)
    assert sum("MUFU.EX2" in line for line in code[scores:output]) >= 112 * 64 // 128
    loop = code[scores - 150 : scores]
    assert sum("HGMMA.64x112x16" in line for line in loop) == 8 and sum("HGMMA.64x128x16" in line for line in loop) == 7
    assert not [line for line in code if re.match(r"(@!?U?P\d )?HMMA", line)], "a product on the slower path"
