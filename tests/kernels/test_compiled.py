"""What nvcc makes of the kernels for every architecture that is shipped: no spills, no warnings, the instructions that
the design counts on. Needs no GPU; skipped where there is no nvcc."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from support import emulated

CMAKE = (emulated.CSRC / "cuda" / "CMakeLists.txt").read_text()
CACHE = emulated.CSRC.parent / "build" / "compiled"
# Instructions in every instance of a kernel, by file; the 16-byte accesses and the tensor core products.
INSTRUCTIONS = {
    "insert": ["LDG.E.128", "STG.E.128"],
    "pack": [],
    "retrieve": ["LDG.E.128", "SHFL", "ATOM"],
    "attend": ["HMMA.16816.F32", "LDGSTS.E.BYPASS.LTC128B.128", "LDSM.16.M88.4", "LDSM.16.MT88.4", "MUFU.EX2"],
}
INSTRUCTIONS_SM90 = ["HGMMA", "UTMALDG.5D", "SYNCS", "MUFU.EX2", "USETMAXREG"]


def architectures() -> list[str]:
    """Those that csrc/cuda/CMakeLists.txt compiles machine code for, with the newest toolkit."""
    lists = re.findall(r"set\(CMAKE_CUDA_ARCHITECTURES ([\w -]+)\)", CMAKE)
    return [name for name in max(lists, key=len).replace("-real", "").split() if not name.endswith("-virtual")]


def toolkit(name: str) -> str:
    """A program of the CUDA toolkit, or of its packages on PyPI."""
    installed = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    found = shutil.which(name) or next(map(str, installed.glob(f"*/bin/{name}")), None)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def compile_kernels(file: str, architecture: str) -> tuple[Path, str]:
    """The machine code of a source file and what the compiler said; kept by the content of the sources."""
    sources = sorted(path for path in emulated.CSRC.rglob("*") if path.suffix in (".h", ".cuh"))
    source = emulated.CSRC / "cuda" / f"{file}.cu"
    target = CACHE / f"{file}_{architecture}_{emulated.digest(source, *sources)}.cubin"
    log = target.with_suffix(".log")
    if not log.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        command = f"nvcc -std=c++20 -arch=sm_{architecture} -Xptxas -v -cubin -DLONGLIVE_RAG_SM90".split()
        result = subprocess.run(
            [toolkit("nvcc"), *command[1:], f"-I{emulated.CSRC}", "-o", target, source], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        log.write_text(result.stderr)
    return target, log.read_text()


def functions(cubin: Path) -> dict[str, str]:
    """The disassembly of each kernel in the file."""
    environment = os.environ | {"PATH": f"{Path(toolkit('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}"}
    listing = subprocess.run(
        [toolkit("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True, env=environment
    ).stdout
    found = {part.split()[0]: part for part in listing.split("Function : ")[1:]}
    assert found, f"no function in {cubin}"
    return found


def kernels(architecture: str) -> list[str]:
    return [*INSTRUCTIONS, *(["attend_sm90"] if architecture == "90a" else [])]


@pytest.mark.parametrize(
    ("file", "architecture"),
    [(file, architecture) for architecture in architectures() for file in kernels(architecture)],
)
def test_machine_code(file: str, architecture: str) -> None:
    command = [toolkit("nvcc"), "--list-gpu-code"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if f"sm_{architecture.rstrip('af')}" not in known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    cubin, log = compile_kernels(file, architecture)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert spills and not any(map(int, spills)), log
    assert "warning" not in log.lower() and not re.search(r"C75\d\d", log), log
    for name, code in functions(cubin).items():
        missing = [i for i in INSTRUCTIONS.get(file, INSTRUCTIONS_SM90) if i not in code]
        assert not missing, f"{name} has no {', '.join(missing)}"


@pytest.mark.parametrize("architecture", architectures())
def test_pages_are_packed_in_16_byte_words(architecture: str) -> None:
    """Read by one kernel and written by the other; codes and scales are narrower in some instances."""
    cubin, _ = compile_kernels("pack", architecture)
    for name, code in functions(cubin).items():
        tile = 24 if "Li8E" in name else 16
        access, at_least = ("STG.E.128", 8) if "unpack" in name else ("LDG.E.128", tile)
        assert code.count(access) >= at_least, f"{name} has {code.count(access)} {access}"


@pytest.mark.parametrize("architecture", architectures())
def test_parts_of_a_tile_are_written_before_they_are_counted(architecture: str) -> None:
    """The emulator cannot see the order of memory between blocks. For Hopper no tile is cut (`kForHopper`)."""
    cubin, _ = compile_kernels("attend", architecture)
    for name, code in functions(cubin).items():
        fence, count = code.find("MEMBAR.SC.GPU"), code.find("ATOMG.E.ADD")
        if architecture == "90a":
            assert fence == count == -1, f"{name} merges parts"
        else:
            assert 0 < fence < count < code.rfind("MEMBAR.SC.GPU"), f"{name} has no fence on both sides of the count"


def test_softmax_overlaps_the_second_product() -> None:
    """In each kernel for Hopper the exponentials come after the wait for the scores and before that for the output, the
    product of which is then under way. ptxas would move the second wait up (`ptx::finish_first`)."""
    cubin, _ = compile_kernels("attend_sm90", "90a")
    for name, code in functions(cubin).items():
        found = re.search(r"Li\d+ELi(\d+)E", name)
        assert found is not None, name
        lines = code.splitlines()
        waits = [i for i, line in enumerate(lines) if "WARPGROUP.DEPBAR" in line]
        scores = next(i for i in waits if "0x1" in lines[i].partition("DEPBAR")[2])
        output = next(i for i in waits if i > scores)
        exponentials = sum("MUFU.EX2" in line for line in lines[scores:output])
        a_thread = int(found[1]) * 64 // 128
        assert exponentials >= a_thread, f"{name}: {exponentials} of {a_thread} exponentials between the waits"
