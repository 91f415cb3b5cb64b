"""The compiled program of native_vanilla_transformer.cpp: for which processor, by which compiler, where it is kept.

It is compiled at its first use on a machine, which takes about ten seconds, and kept in the user's cache folder. Where
that folder cannot be used, each process compiles it for itself. `load` waits for the compiler; `load_soon` never does.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


SOURCE = Path(__file__).with_name("native_vanilla_transformer.cpp")
HEADER = Path(__file__).with_name("instructions_vanilla_transformer.h")
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp-simd", "-pthread"]
COMPILERS = ("g++", "clang++", "c++")

_INDEX, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class ProgramError(ValueError):
    """There is no compiled program on this machine; the message says why and what would help."""


def _structure(*fields: tuple[Any, str]) -> type[ctypes.Structure]:
    """Of fields as types and names, several names at a time."""
    return type(
        "Structure", (ctypes.Structure,), {"_fields_": [(n, kind) for kind, names in fields for n in names.split()]}
    )


# The same structures stand in the program's source.
Sizes = _structure(
    (_INDEX, "d_model source_vocabulary vocabulary"),
    (_INDEX, "encoder_layers encoder_heads encoder_ffn decoder_layers decoder_heads decoder_ffn"),
    (_INDEX, "encoder_d_k encoder_d_v decoder_d_k decoder_d_v"),
    (_INDEX, "normalize_before int8 activation"),
    (_FLOAT, "eps encoder_scale decoder_scale"),
)
Weight = _structure((_POINTER, "numbers"), (_INDEX, "count"))
Job = _structure(
    (_INDEX, "sentences threads"),
    (_POINTER, "source source_starts encoder_positions decoder_positions"),
    (_INDEX, "encoder_position_count decoder_position_count"),
    (_POINTER, "prefix"),
    (_INDEX, "prefix_length max_length min_length"),
    (_POINTER, "eos"),
    (_INDEX, "eos_count beams early_stopping"),
    (_POINTER, "length_penalties"),
    (_INDEX, "returned"),
    (_POINTER, "sequences scores lengths lineage"),
    (_POINTER, "release_interpreter take_interpreter check_signals"),
)


def compiler_flags() -> list[str]:
    """
    The flags for this processor's instruction set, or for less where torch was told to use less
    (`ATEN_CPU_CAPABILITY=avx2`, or `default`).
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return _arm_flags()
    found = torch.backends.cpu.get_cpu_capability()
    if found == "AVX512":
        vnni = ["-mavx512vnni"] if torch.cpu._is_vnni_supported() else []
        return ["-march=x86-64-v4", "-mprefer-vector-width=512", *vnni]
    if found == "AVX2":
        vnni = ["-mavxvnni"] if torch.cpu.get_capabilities().get("avx_vnni") else []
        return ["-march=x86-64-v3", *vnni]
    return []


def _arm_flags() -> list[str]:
    """Apple's compiler knows its processors by itself. Linux names their instructions (asimddp: sums of products)."""
    cpuinfo = Path("/proc/cpuinfo")
    features = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return ["-march=armv8.2-a+dotprod"] if "asimddp" in features else []


def _compiler() -> list[str]:
    """
    Raises:
        ProgramError: there is none.
    """
    if os.name != "posix":
        raise ProgramError("the compiled program needs Linux or macOS")
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise ProgramError(f"there is no C++ compiler ({', '.join(COMPILERS)}, or what CXX names): install g++")


class _Program:
    """The file of the program, and what compiles it."""

    def __init__(self) -> None:
        """
        Raises:
            ProgramError: there is no compiler, or no source (code that came from the Hub has none).
        """
        self.compiler = _compiler()
        self.command = [*self.compiler, *FLAGS, *compiler_flags(), "-shared", str(SOURCE)]
        try:
            text = SOURCE.read_bytes() + HEADER.read_bytes()
        except OSError as error:
            raise ProgramError(f"the source is missing ({error}): install vanilla_transformer with pip") from error
        self.name = hashlib.sha256(text + repr(self.command).encode()).hexdigest()[:16] + ".so"

    def cached(self) -> Path | None:
        """
        The file in the cache folder, if it is there.

        Raises:
            ProgramError: another user could have written it.
        """
        folder = _cache_folder()
        file = folder and folder / self.name
        if file is None or not file.exists():
            return None
        _refuse_foreign(file)
        return file

    def compiled(self) -> ctypes.PyDLL:
        """Compiles and loads it. Beside, then renamed: other processes may be doing the same."""
        folder = _cache_folder()
        with tempfile.TemporaryDirectory(dir=folder, prefix="compiling-") as beside:
            file = Path(beside) / self.name
            self._run([*self.command, "-o", str(file)])
            if folder is not None:
                file = file.replace(folder / self.name)
            return _loaded(file)  # a loaded file may be deleted

    def _run(self, command: list[str]) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise ProgramError(f"the C++ compiler {self.compiler[0]} cannot be run: {error}") from error
        if done.returncode:
            raise ProgramError(
                f"the C++ compiler {self.compiler[0]} failed with exit status {done.returncode}; set CXX to one that "
                f"knows C++20\n{done.stderr[-2000:]}".rstrip()
            )


def _cache_folder() -> Path | None:
    """
    The user's own folder for compiled programs, or None where there is none that can be written.

    Raises:
        ProgramError: another user could write into it.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vanilla_transformer"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid():
            folder.chmod(0o700)
    except (OSError, RuntimeError):  # read-only, or a user without a home
        return None
    _refuse_foreign(folder)
    return folder if os.access(folder, os.W_OK) else None


def _refuse_foreign(path: Path) -> None:
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ProgramError(
            f"{path} belongs to user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}, so somebody else could "
            f"have written it: delete it, or set XDG_CACHE_HOME to a folder of your own"
        )


def _loaded(file: Path) -> ctypes.PyDLL:
    """
    Raises:
        ProgramError: it cannot be loaded, or its structures are not the ones above.
    """
    try:
        # PyDLL: Python looks for an exception after each call, such as the KeyboardInterrupt of a Ctrl-C.
        library = ctypes.PyDLL(str(file))
        functions = [library.vt_create, library.vt_search, library.vt_destroy, library.vt_message, library.vt_layout]
    except (OSError, AttributeError) as error:
        raise ProgramError(f"the compiled program cannot be loaded: {error}; delete {file}") from error
    create, search, destroy, message, layout = functions
    create.argtypes, create.restype = [_POINTER, _POINTER, _INDEX, _POINTER], _INDEX
    search.argtypes, search.restype = [_POINTER, _POINTER], _INDEX
    destroy.argtypes, destroy.restype = [_POINTER], None
    message.argtypes, message.restype = [], ctypes.c_char_p
    layout.argtypes, layout.restype = [_INDEX], ctypes.POINTER(_INDEX)
    for number, structure in enumerate((Sizes, Job)):
        names = [name for name, *_ in structure._fields_]  # type: ignore[attr-defined]
        ours = [ctypes.sizeof(structure), *(getattr(structure, name).offset for name in names)]
        theirs = layout(number)[: len(ours)]
        if ours != theirs:
            raise ProgramError(f"the compiled program lays out its data as {theirs}, Python as {ours}: delete {file}")
    return library


_lock = threading.Lock()
_future: Future | None = None


def load() -> ctypes.PyDLL:
    """
    The program, compiled first if need be.

    Raises:
        ProgramError: it cannot be compiled or loaded here.
    """
    return _started().result()


def load_soon() -> ctypes.PyDLL | None:
    """
    The program if it is there; None while it is being compiled, which the first call begins in a thread.

    Raises:
        ProgramError: it cannot be compiled or loaded here.
    """
    future = _started()
    return future.result() if future.done() else None


def load_if_possible() -> None:
    """For programs that decode much: waits for the compiler. Where there is no program, `generate()` says so."""
    with suppress(ProgramError):
        load()


def _started() -> Future:
    global _future
    with _lock:
        if _future is None:
            _future = Future()
            _start(_future)
        return _future


def _start(future: Future) -> None:
    """Loads a program that is there at once, and compiles one that is not in a thread."""

    def compile_it(program: _Program) -> None:
        try:
            future.set_result(program.compiled())
        except BaseException as error:
            future.set_exception(error)

    try:
        program = _Program()
        if file := program.cached():
            future.set_result(_loaded(file))
        else:
            threading.Thread(target=compile_it, args=(program,), name="compiling").start()
    except ProgramError as error:
        future.set_exception(error)


def forget() -> None:
    """The next call looks anew: after a fork, for the thread that compiles is not in the child, and in tests."""
    global _future, _lock
    _future, _lock = None, threading.Lock()


if os.name == "posix":
    os.register_at_fork(after_in_child=forget)
