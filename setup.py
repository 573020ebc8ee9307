"""Builds ddfast._C with ninja: each CPU kernel once per instruction-set level, torch not needed.

And ddfast._cuda, where nvcc is found. DDFAST_NO_EXT=1 leaves both out (reference and Triton kernels
only), DDFAST_CUDA=0 the latter. CXX, CXXFLAGS, LDFLAGS and CUDA_HOME are honoured.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# The order of preference; "portable" is what the compiler targets by default.
X86_LEVELS = {
    "x86_64_v3": ["-march=x86-64-v3"],
    "x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}


def compiler() -> list[str] | None:
    """The C++ compiler to use: $CXX, else the first of g++, clang++, c++ on the path."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    return None


def cuda_compiler() -> str | None:
    """nvcc of $CUDA_HOME or on the path, if it is wanted."""
    if os.environ.get("DDFAST_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    own = str(Path(home, "bin", "nvcc")) if home else ""
    return own if own and shutil.which(own) else shutil.which("nvcc")


def accepts(cxx: list[str], flags: list[str], source: str = "int main() { return 0; }\n") -> bool:
    """Whether the compiler builds `source` with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "probe.cpp")
        file.write_text(source)
        command = [*cxx, *flags, str(file), "-o", str(Path(folder, "probe"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def ninja_text(cxx: list[str], objects_folder: Path, target: Path) -> str:
    """The build plan: kernels x levels, the module, one link."""
    import pybind11

    openmp = accepts(
        cxx, ["-fopenmp"], "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    )
    if not openmp:
        warnings.warn(
            "the compiler has no OpenMP: ddfast's CPU kernels will use one thread", stacklevel=1
        )
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    levels = {"portable": []}
    if is_x86 and all(accepts(cxx, flags) for flags in X86_LEVELS.values()):
        levels |= X86_LEVELS
    common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DNDEBUG"]
    # errno and traps keep the compiler from vectorising sqrt and comparisons; no result changes.
    common += ["-fno-math-errno", "-fno-trapping-math"] + (["-fopenmp"] if openmp else [])
    common += shlex.split(os.environ.get("CXXFLAGS", ""))
    module_flags = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    module_flags += ["-DDDFAST_X86_LEVELS"] if len(levels) > 1 else []
    link = (
        ["-shared"] + (["-fopenmp"] if openmp else []) + shlex.split(os.environ.get("LDFLAGS", ""))
    )
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]

    def joined(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    def path(file: Path) -> str:
        return str(file).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        f"cxx = {joined(cxx)}",
        f"common = {joined(common)}",
        "rule compile",
        "  command = $cxx $common $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in {joined(link)} -o $out",
    ]
    objects = []
    for level, flags in levels.items():
        # Kernels throw nothing, and exception tables bring a symbol that all levels share.
        flags = [f"-DDDFAST_LEVEL={level}", "-fno-exceptions", *flags]
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            objects.append(objects_folder / f"{source.stem}.{level}.o")
            lines.append(f"build {path(objects[-1])}: compile {path(source)}")
            lines.append(f"  flags = {joined(flags)}")
    objects.append(objects_folder / "module.o")
    lines.append(f"build {path(objects[-1])}: compile {path(ROOT / 'csrc' / 'module.cpp')}")
    lines.append(f"  flags = {joined(module_flags)}")
    lines.append(f"build {path(target)}: link {' '.join(path(o) for o in objects)}")
    return "\n".join(lines) + "\n"


def cuda_commands(nvcc: str, cxx: list[str], folder: Path, target: Path) -> list[list[str]]:
    """What builds ddfast._cuda: code for sm_80 and sm_90, PTX for later ones, a static runtime."""
    import pybind11

    source = ROOT / "csrc" / "cuda"
    kernels, module = folder / "conv_kernel.cuda.o", folder / "module.cuda.o"
    architectures = [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]
    common = ["-std=c++17", "-O3", "-DNDEBUG"]
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    device = [nvcc, "-ccbin", cxx[0], *architectures, "--threads=2", "-Xcompiler=-fPIC"]
    module_flags = [*cxx, "-fPIC", "-fvisibility=hidden", *includes]
    return [
        [*device, *common, "-c", str(source / "conv_kernel.cu"), "-o", str(kernels)],
        [*module_flags, *common, "-c", str(source / "module.cpp"), "-o", str(module)],
        [*device, "-shared", "-cudart=static", str(kernels), str(module), "-o", str(target)],
    ]


class NinjaBuild(build_ext):
    """Runs ninja on the plan above in place of setuptools' own compile steps."""

    def build_cuda(self, ext: Extension) -> None:
        """Build ddfast._cuda; without it the reference answers, so a failure only warns."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        nvcc, cxx = cuda_compiler(), compiler()
        assert nvcc is not None and cxx is not None
        for command in cuda_commands(nvcc, cxx, folder, target):
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                warnings.warn(
                    f"building ddfast._cuda failed, ddfast goes on without it: {result.stderr}",
                    stacklevel=1,
                )
                return

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "ddfast._cuda":
            return self.build_cuda(ext)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        cxx = compiler()
        assert cxx is not None  # else setup() was called without the extension
        (folder / "build.ninja").write_text(ninja_text(cxx, folder, target))
        try:
            subprocess.run(["ninja", "-C", str(folder)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                "building ddfast._C failed, see its messages above. DDFAST_NO_EXT=1 installs"
                " ddfast without it"
            ) from error


# Of benchmarks/ what `ddfast bench` runs is installed, and not what only serves the checkout.
CHECKOUT_ONLY = {"accuracy", "adjoints", "peak_memory", "readme_table", "test_ratios"}


class InstalledModules(build_py):
    """All modules of all packages but those."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [m for m in found if package != "ddfast.benchmarks" or m[1] not in CHECKOUT_ONLY]


def extensions() -> list[Extension]:
    """ddfast._C and, with nvcc, ddfast._cuda; [] where they are not wanted or cannot be built."""
    if os.environ.get("DDFAST_NO_EXT") == "1":
        return []
    if compiler() is None:
        warnings.warn(
            "no C++ compiler found: ddfast is installed without its compiled CPU kernels and will "
            "answer from the slower PyTorch reference",
            stacklevel=1,
        )
        return []
    found = [Extension("ddfast._C", sources=[])]
    if cuda_compiler() is not None:
        found.append(Extension("ddfast._cuda", sources=[], optional=True))
    return found


# kernels/ and benchmarks/ lie at the top level of the checkout and install as ddfast.kernels and
# ddfast.benchmarks.
setup(
    packages=[
        *find_packages(include=["ddfast", "ddfast.*"]),
        "ddfast.kernels",
        *(f"ddfast.kernels.{name}" for name in find_packages("kernels")),
        "ddfast.benchmarks",
    ],
    package_dir={
        "ddfast": "ddfast",
        "ddfast.kernels": "kernels",
        "ddfast.benchmarks": "benchmarks",
    },
    package_data={"ddfast.methods": ["figures.csv"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild, "build_py": InstalledModules},
)
