"""What the compiler made of the CUDA kernels in a shared object, read with cuobjdump; and their occupancy."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Kernel:
    """One kernel's machine code for one compute capability."""

    name: str  # mangled
    registers: int = 0
    stack: int = 0  # bytes of a thread's frame: spilled registers and local arrays
    shared: int = 0  # static
    local: int = 0
    opcodes: Counter = field(default_factory=Counter)  # HMMA.16816.F32 -> how often it stands in the code

    def count(self, prefix: str) -> int:
        """Instructions whose first part is `prefix`; HFMA2.MMA is no HMMA."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.split(".")[0] == prefix)

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory."""
        return self.count("LDL") + self.count("STL")


def find_cuobjdump() -> Path:
    """The toolkit's; else that of the PyPI package nvidia-cuda-cuobjdump; else the one that comes with triton."""
    candidates = [shutil.which("cuobjdump")]
    if nvcc := shutil.which(os.environ.get("NVCC", "nvcc")):
        candidates.append(str(Path(nvcc).resolve().parent / "cuobjdump"))
    for package, pattern in (("nvidia", "*/bin/cuobjdump"), ("triton", "backends/nvidia/bin/cuobjdump")):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or [] if spec else []:
            candidates += [str(path) for path in Path(folder).glob(pattern)]
    for path in candidates:
        if path and os.access(path, os.X_OK):
            return Path(path)
    raise SystemExit("check-cuda needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def read_machine_code(library: Path) -> dict[int, dict[str, Kernel]]:
    """Kernels by compute capability and mangled name."""
    cuobjdump = find_cuobjdump()
    # -sass runs nvdisasm, which lies beside cuobjdump in the PyPI packages.
    environment = dict(os.environ, PATH=f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}")

    def dump(option: str) -> str:
        command = [str(cuobjdump), option, str(library)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"check-cuda: {' '.join(command)} failed:\n{done.stdout[-500:]}{done.stderr[-2000:]}")
        return done.stdout

    kernels = parse_resources(dump("-res-usage"))
    parse_instructions(dump("-sass"), kernels)
    return kernels


def parse_resources(text: str) -> dict[int, dict[str, Kernel]]:
    """From `cuobjdump -res-usage`."""
    kernels: dict[int, dict[str, Kernel]] = {}
    capability, name = 0, ""
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            capability = int(match[1])
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif name and "REG:" in line:
            value = dict(re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line))
            kernel = Kernel(name, *(int(value[key]) for key in ("REG", "STACK", "SHARED", "LOCAL")))
            if capability >= 90 and kernel.shared:
                kernel.shared -= 1024  # what the driver reserves is counted from sm_90 on
            kernels.setdefault(capability, {})[name] = kernel
            name = ""
    return kernels


def parse_instructions(text: str, kernels: dict[int, dict[str, Kernel]]) -> None:
    """Adds the opcodes from `cuobjdump -sass`."""
    capability, kernel = 0, None
    for line in text.splitlines():
        if match := re.match(r"\s*\.?(?:arch = sm_|target\s+sm_)(\d+)", line):
            capability = int(match[1])
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels.get(capability, {}).get(match[1])
        elif kernel and (match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)):
            kernel.opcodes[match[1]] += 1


def demangle(names: list[str]) -> dict[str, str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def shorten(demangled: str, namespace: str = "pyseg") -> str:
    """`void pyseg::conv::f<__half, 4>(float*)` as `f<half, 4>`."""
    text, depth = demangled, 0
    if text.endswith(")"):  # parameters: back to the parenthesis that opens the last group
        for i in range(len(text) - 1, -1, -1):
            depth += (text[i] == ")") - (text[i] == "(")
            if depth == 0:
                text = text[:i]
                break
    text = re.sub(r"\((?:unsigned |signed )?(?:int|long|bool|char|short)\)", "", text)  # (int)4 as 4
    head, angle, arguments = text.partition("<")
    head = head.split(" ")[-1].split("::")[-1]
    arguments = re.sub(rf"\b{namespace}::(?:\w+::)*|\(anonymous namespace\)::|c10::", "", arguments)
    return (head + angle + arguments).replace("__nv_bfloat16", "bf16").replace("__half", "half")


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA programming guide, table of technical specifications)."""

    warps: int
    blocks: int
    shared: int  # bytes
    reserved_shared: int  # per block
    shared_unit: int
    registers: int = 65536
    register_unit: int = 256  # per warp


MULTIPROCESSORS = {
    75: Multiprocessor(warps=32, blocks=16, shared=64 << 10, reserved_shared=0, shared_unit=256),
    80: Multiprocessor(warps=64, blocks=32, shared=164 << 10, reserved_shared=1024, shared_unit=128),
    90: Multiprocessor(warps=64, blocks=32, shared=228 << 10, reserved_shared=1024, shared_unit=128),
}


def occupancy(capability: int, registers: int, shared: int, threads: int) -> float:
    """Share of a multiprocessor's warps that blocks of this size keep resident; `shared` is static plus dynamic."""
    limits = MULTIPROCESSORS[capability]
    warps = -(-threads // 32)
    registers_of_warp = _round_up(max(registers, 1) * 32, limits.register_unit)
    # Registers lie in four partitions, and a warp stays in one.
    warps_by_registers = limits.registers // 4 // registers_of_warp * 4
    shared_of_block = _round_up(shared + limits.reserved_shared, limits.shared_unit)
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        warps_by_registers // warps,
        limits.shared // shared_of_block if shared_of_block else limits.blocks,
    )
    return blocks * warps / limits.warps


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
