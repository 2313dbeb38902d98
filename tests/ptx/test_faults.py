"""Would the tests notice? Faults planted in the PTX of a kernel, most of them in what the asm strings of csrc/cuda/ptx
became, have to be caught: the executor stops, or the result is wrong, under one of the schedules."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from kernels import test_attend_sm90
from longlive_rag import ops
from ops import test_attend, test_insert, test_pack, test_retrieve
from ptx import execute
from support import emulated

CPU = torch.device("cpu")
# The group of a pattern's first register, and so on.
REGISTERS4 = r"\{(%\w+), ?(%\w+), ?(%\w+), ?(%\w+)\}"
REGISTERS2 = r"\{(%\w+), ?(%\w+)\}"
MMA = rf"(mma\.sync\S+\s+\{{[^}}]*\}}, ){REGISTERS4}, {REGISTERS2}"
LDMATRIX = rf"(ldmatrix\S+\s+){REGISTERS4}"
SHUFFLE = r"(shfl\.sync\.%s\.b32\s+%%\w+\|%%\w+, %%\w+, )(\S+), (\S+), (\S+);"
TRY_WAIT = r"(mbarrier\.try_wait\S+\s+\w+, \[%\w+\], )(%\w+);"
ARRIVE = r"mbarrier\.arrive\.shared::cta\.b64 _, \[%\w+\];"
COORDINATES = r"\{(%\w+), (%\w+), (%\w+), (%\w+), (%\w+)\}"
COPY = rf"(cp\.async\.bulk\.tensor\.5d\S+\s+\[)(%\w+)(\], \[)(%\w+), {COORDINATES}\], \[(%\w+)\];"
PRODUCT = r"(wgmma\.mma_async\S+\s+\{[^}]*\}, )"
IN_REGISTERS = rf"{PRODUCT}{REGISTERS4}(, %rd\d+, \w+, 1, 1, )"


class Kernel(NamedTuple):
    source: str
    name: str
    check: Callable[[ModuleType], None]
    """Raises AssertionError if the result is wrong."""


def check_insert(module: ModuleType) -> None:
    with emulated.backend(module):
        test_insert.check(CPU, torch.float16, (1, 2, 5, 12, 64), 20)


def check_retrieve(module: ModuleType) -> None:
    torch.manual_seed(0)
    # The best come last, four to a warp: each is put in front of the one before.
    query = torch.randn(1, 40)
    keys, _ = test_retrieve.stored(CPU, torch.float32, 1, 203, 40)
    keys = keys[:, test_retrieve.cosine(query, keys)[0].argsort()]
    with emulated.backend(module):
        test_retrieve.check(query, keys, 1 / keys.norm(dim=-1), 1, 203, 9)


def check_attend(module: ModuleType) -> None:
    with emulated.backend(module):
        test_attend.check(test_attend.make_case(CPU, torch.float16, frames=2, tokens=75, entries=3))


def check_attend_cut(module: ModuleType) -> None:
    with emulated.backend(module):
        test_attend.check(test_attend.make_case(CPU, torch.float16, tokens=75, entries=7))


def check_pack(module: ModuleType) -> None:
    """Of pack alone; bit for bit what the reference gives."""
    torch.manual_seed(0)
    k, v = test_pack.pools(CPU, torch.float32, 1, 1, 2, 50, 64)
    with emulated.backend(module):
        packed = ops.pack(k, v, 0, 8)
    expected = torch.full_like(packed, 0xFF)
    test_pack.reference._pack_reference(expected, k, v, 0, 8)
    assert torch.equal(packed, expected)


def check_attend_sm90(module: ModuleType) -> None:
    # Ten query tiles on four multiprocessors: three pieces a block, so that every ring of barriers comes round; eight
    # key tiles for each, so that the last two are cut and merged.
    case = test_attend_sm90.make_case(torch.float16, tokens=120, heads=10, head_dim=64, entries=4)
    test_attend_sm90.check(module, case, key_tile=112)


INSERT = Kernel("cuda/insert.cu", "insert_kernelI6__halfLi1E", check_insert)
RETRIEVE = Kernel("cuda/retrieve.cu", "retrieve_kernelIfLi1E", check_retrieve)
ATTEND = Kernel("cuda/attend.cu", "attend_kernelI6__halfLi64ELi64E", check_attend)
ATTEND_CUT = ATTEND._replace(check=check_attend_cut)
PACK = Kernel("cuda/pack.cu", "11pack_kernelIfLi8E", check_pack)
HOPPER = Kernel("cuda/attend_sm90.cu", "attend_sm90_kernelI6__halfLi64ELi112E", check_attend_sm90)

# Name: kernel, pattern, replacement, and which of several occurrences.
FAULTS: dict[str, tuple[Kernel, str, str] | tuple[Kernel, str, str, int]] = {
    "insert: shfl clamps at its own lane": (INSERT, SHUFFLE % "bfly", r"\g<1>\2, 0, \4;"),
    "insert: shfl of the wrong lanes": (INSERT, SHUFFLE % "bfly", r"\g<1>2, \3, \4;", 0),
    "insert: shfl with half of the warp": (INSERT, SHUFFLE % "bfly", r"\g<1>\2, \3, 0xffff;", 0),
    "insert: no bar.sync in the sum": (INSERT, r"bar\.sync\s+0;", ""),
    "insert: bar.sync of too few threads": (INSERT, r"bar\.sync\s+0;", "bar.sync 0, 32;"),
    "retrieve: shfl.up clamps at the last lane": (RETRIEVE, SHUFFLE % "up", r"\g<1>\2, 31, \4;"),
    "retrieve: vote without the upper half": (RETRIEVE, r"(vote\S+\s+%\w+, %\w+), %\w+;", r"\1, 0xffff;"),
    "retrieve: blocks counted twice": (RETRIEVE, r"(atom\.global\.add\.u32\s+%\w+, \[%\w+\]), 1;", r"\1, 2;"),
    "retrieve: no bar.sync before lists are read": (RETRIEVE, r"bar\.sync\s+0;", "", 2),
    "attend: A's rows 8 apart swapped in mma": (ATTEND, MMA, r"\1{\3, \2, \4, \5}, {\6, \7}"),
    "attend: A's columns 8 apart swapped in mma": (ATTEND, MMA, r"\1{\4, \3, \2, \5}, {\6, \7}", 0),
    "attend: B's rows 8 apart swapped in mma": (ATTEND, MMA, r"\1{\2, \3, \4, \5}, {\7, \6}", 0),
    "attend: mma of the other type": (ATTEND, r"f32\.f16\.f16\.f32", "f32.bf16.bf16.f32", 0),
    "attend: ldmatrix of V without .trans": (ATTEND, r"x4\.trans\.shared", "x4.shared", 0),
    "attend: ldmatrix of K with .trans": (ATTEND, r"x4\.shared", "x4.trans.shared", 2),
    "attend: results of ldmatrix swapped": (ATTEND, LDMATRIX, r"\1{\2, \4, \3, \5}", 2),
    "attend: no cp.async.wait_group for the query": (ATTEND, r"cp\.async\.wait_group\s+1;", ""),
    "attend: no cp.async.wait_group for K": (ATTEND, r"cp\.async\.wait_group\s+0;", "", 0),
    "attend: no cp.async.wait_group for V": (ATTEND, r"cp\.async\.wait_group\s+0;", "", 1),
    "attend: a wait_group too lenient": (ATTEND, r"cp\.async\.wait_group\s+0;", "cp.async.wait_group 1;", 1),
    "attend: V not committed": (ATTEND, r"cp\.async\.commit_group;", "", 2),
    "attend: no zero fill past the frame": (ATTEND, r"(cp\.async\.cg\S+\s+\S+ \S+ 16), %\w+;", r"\1, 16;"),
    "attend: zero fill of all": (ATTEND, r"(cp\.async\.cg\S+\s+\S+ \S+ 16), %\w+;", r"\1, 0;", 9),
    "attend: half of the row copied": (ATTEND, r"(cp\.async\.cg\S+\s+\S+ \S+ 16), %\w+;", r"\1, 8;", 9),
    "attend: no bar.sync before V is read": (ATTEND, r"bar\.sync\s+0;", "", 2),
    "attend: no bar.warp.sync for the query": (ATTEND, r"bar\.warp\.sync\s+-1;", "", 0),
    "attend: no bar.warp.sync for the output": (ATTEND, r"bar\.warp\.sync\s+-1;", "", 1),
    "attend: halves packed in the wrong order": (
        ATTEND, r"(cvt\.rn\.f16x2\.f32\s+%\w+), (%\w+), (%\w+);", r"\1, \3, \2;"
    ),
    "attend: parts not counted": (ATTEND_CUT, r"(atom\.global\.add\.u32\s+%\w+, \[%\w+\]), 1;", r"\1, 0;"),
    "attend: no bar.sync before the count of parts is read": (ATTEND_CUT, r"bar\.sync\s+0;", "", -1),
    "pack: bytes of a code swapped with another's": (PACK, r"(mov\.u32\s+%\w+), 1040;", r"\1, 1056;", 0),
    "pack: shfl of the wrong lanes": (PACK, SHUFFLE % "bfly", r"\g<1>16, \3, \4;", 0),
    "pack: codes rounded towards zero": (PACK, r"cvt\.rni\.s32\.f32", "cvt.rzi.s32.f32", 0),
    "hopper: K as if MN-major": (HOPPER, rf"{IN_REGISTERS}0;", r"\1{\2, \3, \4, \5}\g<6>1;"),
    "hopper: V as if K-major": (HOPPER, rf"{IN_REGISTERS}1;", r"\1{\2, \3, \4, \5}\g<6>0;"),
    "hopper: Q as if M-major": (HOPPER, rf"({PRODUCT}%rd\d+, %rd\d+, \w+, 1, 1), 0, 0;", r"\1, 1, 0;"),
    "hopper: K as if MN-major, Q in shared memory": (
        HOPPER, rf"({PRODUCT}%rd\d+, %rd\d+, \w+, 1, 1), 0, 0;", r"\1, 0, 1;"
    ),
    "hopper: Q and K's descriptors swapped": (HOPPER, rf"{PRODUCT}(%rd\d+), (%rd\d+)", r"\1\3, \2", 0),
    "hopper: A's rows 8 apart swapped": (HOPPER, IN_REGISTERS, r"\1{\3, \2, \4, \5}\6"),
    "hopper: A's columns 8 apart swapped": (HOPPER, IN_REGISTERS, r"\1{\4, \3, \2, \5}\6", 0),
    "hopper: scale-d inverted": (HOPPER, r"setp\.ne\.b32 p,", "setp.eq.b32 p,"),
    # 1024 bytes to the next eight rows are 64 in bits 32 to 45; swizzle 128B is 1 in bits 62 to 63; V's leading
    # offset is in bits 16 to 29.
    "hopper: wrong stride in a descriptor": (HOPPER, "4611686293305294848", f"{1 << 62 | 32 << 32}"),
    "hopper: no swizzle in a descriptor": (HOPPER, "4611686293305294848", f"{64 << 32}", 0),
    "hopper: swizzle 64B in a descriptor": (HOPPER, "4611686293305294848", f"{2 << 62 | 64 << 32}", 0),
    "hopper: wrong stride of V": (HOPPER, "4611686293364015104", f"{4611686293364015104 + (8 << 32)}"),
    "hopper: no wgmma.fence before the scores": (HOPPER, r"wgmma\.fence\.sync\.aligned;", "", 0),
    "hopper: no wgmma.fence before the output": (HOPPER, r"wgmma\.fence\.sync\.aligned;", "", -1),
    "hopper: scores not committed": (HOPPER, r"wgmma\.commit_group\.sync\.aligned;", "", 0),
    "hopper: no wait for the scores": (HOPPER, r"wgmma\.wait_group\.sync\.aligned 1;", ""),
    "hopper: a wait_group too lenient": (
        HOPPER, r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;"
    ),
    "hopper: no wait for the output": (HOPPER, r"wgmma\.wait_group\.sync\.aligned 0;", "", -1),
    "hopper: more registers than there are": (HOPPER, r"(setmaxnreg\.inc\S+) 240;", r"\1 256;"),
    "hopper: no registers given up": (HOPPER, r"setmaxnreg\.dec\S+ 24;", ""),
    "hopper: registers no multiple of 8": (HOPPER, r"(setmaxnreg\.dec\S+) 24;", r"\1 28;"),
    "hopper: setmaxnreg.inc for dec": (HOPPER, r"setmaxnreg\.dec", "setmaxnreg.inc"),
    "hopper: waits not repeated": (HOPPER, r"@!done bra again;", ""),
    "hopper: parity of the wait for the plan": (HOPPER, TRY_WAIT, r"\g<1>1;", 0),
    "hopper: parity of the wait for the query": (HOPPER, TRY_WAIT, r"\g<1>1;", 11),
    "hopper: parity of the wait for free keys": (HOPPER, TRY_WAIT, r"\g<1>0;", 1),
    "hopper: a barrier of one arrival too many": (
        HOPPER, r"(mbarrier\.init\S+ \[%\w+\]), (%\w+);", r"\1, 9;", 2
    ),
    "hopper: no fence after mbarrier.init": (HOPPER, r"fence\.mbarrier_init\.release\.cluster;", ""),
    "hopper: plan not released": (HOPPER, ARRIVE, "", -1),
    "hopper: keys not released": (HOPPER, ARRIVE, "", -5),
    "hopper: rotations not released": (HOPPER, ARRIVE, "", -6),
    "hopper: half of the bytes expected": (
        HOPPER, r"(mbarrier\.arrive\.expect_tx\S+ _, \[%\w+\]), %\w+;", r"\1, 7168;", 0
    ),
    "hopper: arrival without expect_tx": (
        HOPPER, r"mbarrier\.arrive\.expect_tx(\S+ _, \[%\w+\]), %\w+;", r"mbarrier.arrive\1;", 0
    ),
    "hopper: coordinates of head and row swapped": (HOPPER, COPY, r"\1\2\3\4, {\5, \8, \7, \6, \9}], [\g<10>];", 1),
    "hopper: coordinates of head and page swapped": (HOPPER, COPY, r"\1\2\3\4, {\5, \6, \7, \9, \8}], [\g<10>];", 0),
    "hopper: coordinates in reverse": (HOPPER, COPY, r"\1\2\3\4, {\9, \8, \7, \6, \5}], [\g<10>];", 2),
    "hopper: keys reported to another barrier": (
        HOPPER, COPY, r"\1\2\3\4, {\5, \6, \7, \8, \9}], [\2];", 0
    ),
    "hopper: an address beside the map": (HOPPER, COPY, r"\1\2\3\4+64, {\5, \6, \7, \8, \9}], [\g<10>];", 0),
    "hopper: turns of half the threads": (
        HOPPER, r"(barrier\.cta\.sync\.aligned %\w+), %\w+;", r"\1, 128;", 0
    ),
    "hopper: turns of an odd number of threads": (
        HOPPER, r"(barrier\.cta\.arrive\.aligned %\w+), %\w+;", r"\1, 200;", 0
    ),
    "hopper: turn not passed on": (HOPPER, r"barrier\.cta\.arrive\.aligned %\w+, %\w+;", "", 1),
    "hopper: no barrier before the count of parts is read": (
        HOPPER, r"barrier\.cta\.sync\.aligned %\w+, %\w+;", "", -1
    ),
}  # fmt: skip
NOT_CAUGHT: dict[str, tuple[Kernel, str, str] | tuple[Kernel, str, str, int]] = {
    # Threads run one at a time and see each other's stores at once; blocks run one after the other.
    "retrieve: no membar": (RETRIEVE, r"membar\.gl;", ""),
    "attend: no membar": (ATTEND_CUT, r"membar\.gl;", ""),
    "attend: no bar.sync before parts are counted": (ATTEND_CUT, r"bar\.sync\s+0;", "", -2),
    "hopper: no membar": (HOPPER, r"membar\.gl;", ""),
    # What only costs time.
    "hopper: no prefetch.tensormap": (HOPPER, r"prefetch\.tensormap \[%\w+\];", ""),
}


LONG = bool(os.environ.get("LONGLIVE_RAG_LONG"))
USUAL = list(FAULTS)[::3]
"""What is tested without LONGLIVE_RAG_LONG: a third, from every kernel and of every kind, in the order above."""


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    """The extension with each of the faults that are tested; all compiled at once."""
    faults = (FAULTS if LONG else {name: FAULTS[name] for name in USUAL}) | NOT_CAUGHT
    edits = [execute.Edit(kernel.source, kernel.name, *edit) for kernel, *edit in faults.values()]
    return dict(zip(faults, execute.build_edited(edits), strict=True))


RIGHT, WRONG, BROKEN = 0, 1, 2


def is_caught(kernel: Kernel, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a check under one of the schedules fails. Each runs in a child process: a faulty kernel writes where it
    likes, and may not come to an end."""
    for order in ("forward", "reverse", "late0", "late1"):
        monkeypatch.setenv("SIMT_ORDER", order)
        child = os.fork()
        if child == 0:
            verdict = BROKEN
            try:
                torch.set_num_threads(1)  # a pool of threads does not survive the fork
                signal.alarm(120)
                kernel.check(module)
                verdict = RIGHT
            except (AssertionError, RuntimeError) as error:
                verdict = BROKEN if "not translated" in str(error) else WRONG
            finally:
                os._exit(verdict)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status != BROKEN, "the check itself does not run"
        if status != RIGHT:  # negative: ended by a signal
            return True
    return False


@pytest.mark.parametrize("kernel", [INSERT, RETRIEVE, ATTEND, ATTEND_CUT, PACK, HOPPER])
def test_right_without_a_fault(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    module = execute.build(kernel.source)
    assert not is_caught(kernel, module, monkeypatch)
    with execute.executed(module) as names:
        kernel.check(module)
    assert len(names) == 1 and kernel.name in names.pop(), "the check runs the kernel that the faults are planted in"


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault: str, modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    if not LONG and fault not in USUAL:
        pytest.skip("a third of the faults is tested; LONGLIVE_RAG_LONG=1 tests all")
    assert is_caught(FAULTS[fault][0], modules[fault], monkeypatch)


@pytest.mark.parametrize("fault", NOT_CAUGHT)
def test_what_cannot_be_seen(fault: str, modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/kernels_executed.md says about the executor's limits holds."""
    assert not is_caught(NOT_CAUGHT[fault][0], modules[fault], monkeypatch)
