"""What the compiler makes of our Triton kernels, without a GPU: registers, spilled bytes, shared memory, and what one
round of each kernel's longest loop, a tile, takes: cycles to issue its instructions, four a cycle on a multiprocessor,
and cycles in which the path to shared memory and the first cache, 128 bytes a cycle, is busy if no two threads meet in
a bank. Where far tiles are possible the loop holds two ways, so there and for tensor memory nothing is said.

    python benchmarks/compiled_kernels.py [--arch 90 --dtype bf16 --size 64 --warps 4 8 --stages 1 2]

With --quick, each kernel is compiled as it is started there; that fails where it wants more shared memory than there
is.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model import head_kernels
from model.attention_operator import LAUNCHES

SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""That a block may use, by architecture."""
FP32 = {"log_total", "alignment", "grad_relative_key", "grad_relative_query", "logits", "masses", "tempered"}
FP32 |= {"target_logit", "within", "valid"}
INT64 = {"target", "drawn"}
INT32 = {"first", "last", "slots", "noise"}
NUMBERS = {"length", "queries", "heads", "chunks", "batch", "threshold", "columns", "first_block"}
FRACTIONS = {"scale", "keep_scale", "kept_share", "inverse_temperature"}
COUNTED = ("HGMMA", "HMMA", "SHFL", "LDS", "STS", "LDL", "STL", "LDGSTS")


def signature(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    """Triton's types of a kernel's arguments, by name."""
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in NUMBERS or name.endswith("_stride"):
            kinds[name] = "i32"
        elif name in FRACTIONS:
            kinds[name] = "fp32"
        else:
            kinds[name] = "*" + (
                "fp32" if name in FP32 else "i64" if name in INT64 else "i32" if name in INT32 else dtype
            )
    return kinds


def compiled(kernel: Any, arch: int, dtype: str, constants: dict[str, Any], warps: int, stages: int) -> Any:
    """A kernel for a target that need not be there."""
    names, kinds = kernel.arg_names, signature(kernel, dtype, constants)
    aligned = [name for name in names if kinds[name].startswith("*") or name.endswith("_stride")]
    source = ASTSource(
        kernel,
        kinds,
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def describe(binary: Any, warps: int, a_round: bool) -> str:
    """Its resources and, if wanted, what its longest loop takes."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    resources = f"{registers:>3} registers, {stack:>5} B of stack, {binary.metadata.shared / 1024:4.0f} KB shared"
    found = re.findall(r"[A-Z]+", code)
    counts = ", ".join(f"{found.count(name)} {name}" for name in COUNTED)
    if not a_round:
        return f"{resources}; {counts}"
    loop = longest_loop(code)
    busy = sum(map(bytes_moved, loop)) * warps // 128
    return f"{resources}; a round: {len(loop) * warps // 4:5} cycles of issue, {busy:5} of moving; {counts}"


def bytes_moved(instruction: str) -> int:
    """By a warp, to or from shared memory or the first cache; operands of matrix units are counted as they stream."""
    if matrix := re.search(r"HGMMA\.64x(\d+)x16\S* \S+ (gdesc)?", instruction):
        columns, left = int(matrix[1]), 64 if matrix[2] else 0
        return (left + columns) * 16 * 2 // 4  # four warps do it together
    if access := re.search(r"\b(?:LDS|STS|LDSM|STSM|LDL|STL|LDG|STG|LDGSTS|RED|REDG|ATOMG)\b(\S*)", instruction):
        words = re.search(r"\.(?:MT?88\.|F32x)?(2|4|64|128)\b", access[1])
        return 128 * {"2": 2, "4": 4, "64": 2, "128": 4}[words[1]] if words else 128
    return 0


def longest_loop(code: str) -> list[str]:
    """The instructions of the longest loop of a disassembly that has no loop within; of all of it where it has none."""
    placed = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    jumps = [(int(to[1], 16), at) for at, text in placed if (to := re.search(r"BRA.* 0x([0-9a-f]+)", text))]
    loops = [(begin, end) for begin, end in jumps if begin < end]
    inner = [
        (b, e) for b, e in loops if not any(b <= begin and end <= e and (begin, end) != (b, e) for begin, end in loops)
    ]
    begin, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, placed[-1][0]))
    return [text for at, text in placed if begin <= at <= end]


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=list(SHARED_KB), default=[90])
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--size", type=int, default=64, help="of a head")
    parser.add_argument("--warps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tile", type=int, choices=[16, 32, 64])
    parser.add_argument("--subset", action="store_true", help="queries at some places alone")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    too_large = False
    for arch in options.arch:
        tile = options.tile or (64 if SHARED_KB[arch] >= 200 else 32)
        for (kernel, launches), far in itertools.product(LAUNCHES.items(), (False, True)):
            constants = {"DROPOUT": True, "SUBSET": options.subset, "FAR": far, "T": tile, "D": options.size}
            starts = [(warps, stages) for warps in options.warps for stages in options.stages]
            for warps, stages in [launches[tile]] if options.quick else starts:
                binary = compiled(kernel, arch, options.dtype, constants, warps, stages)
                name = f"{kernel.__name__}{' (far)' * far}"
                found = describe(binary, warps, a_round=not far and arch < 100)
                print(f"sm_{arch} {name:24} T = {tile}, {warps} warps, {stages} stages: {found}", flush=True)
                fits = binary.metadata.shared <= SHARED_KB[arch] * 1024
                too_large = too_large or (options.quick and not fits)
        for kernel in (head_kernels._measure, head_kernels._look):
            binary = compiled(kernel, arch, options.dtype, {"S": 512, "DIFFERENTIATE": True, "TEMPERED": True}, 4, 1)
            print(f"sm_{arch} {kernel.__name__:24} {describe(binary, 4, a_round=True)}", flush=True)
    sys.exit(too_large)


if __name__ == "__main__":
    main()
