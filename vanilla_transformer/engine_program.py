"""The compiled program of engine_compiled.cpp: for which processor, by which compiler, where it is kept.

It is compiled at its first use on a machine, which takes about ten seconds, and kept in the user's cache folder. Where
that folder cannot be used, each process compiles it for itself. `load` waits for the compiler; `load_soon` never does.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


SOURCE = Path(__file__).with_name("engine_compiled.cpp")
HEADER = Path(__file__).with_name("engine_instructions.h")
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
        self.key = _digest(text + repr(self.command).encode())

    def cached(self) -> ctypes.PyDLL | None:
        """
        The program from the cache folder, if it is there. A file that is damaged is deleted: a crash or a full disk may
        have left a part of it, and to run that would end the process. One that this machine cannot load stays: where
        several machines share a home, it may be another's.

        Raises:
            ProgramError: another user could have written it.
        """
        folder = _cache_folder()
        for file in sorted(folder.glob(f"{self.key}-*.so")) if folder else ():
            with suppress(OSError):  # another process may have deleted it
                _refuse_foreign(file)
                if file.stem != self._stem(file):
                    file.unlink()
                    continue
                with suppress(ProgramError):
                    return _loaded(file)
        return None

    def compiled(self) -> ctypes.PyDLL:
        """
        Compiles it, loads it, and keeps it. Beside, then renamed: other processes may be doing the same.

        Raises:
            ProgramError: it cannot be compiled, written or loaded.
        """
        folder = _cache_folder()
        folder = folder if folder and os.access(folder, os.W_OK) else None
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix="compiling-") as beside:
                file = Path(beside) / "program.so"
                self._run([*self.command, "-o", str(file)])
                library = _loaded(file)  # a loaded file may be moved, or deleted
                if folder is not None:
                    file.replace(folder / f"{self._stem(file)}.so")
                return library
        except OSError as error:
            raise ProgramError(f"the compiled program cannot be written: {error}") from error

    def _stem(self, file: Path) -> str:
        """The name of a file with these bytes."""
        return f"{self.key}-{_digest(file.read_bytes())}"

    def _run(self, command: list[str]) -> None:
        try:
            # In English, which `_why_failed` reads.
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
        except OSError as error:
            raise ProgramError(f"the C++ compiler {self.compiler[0]} cannot be run: {error}") from error
        if done.returncode:
            raise ProgramError(f"the C++ compiler {self.compiler[0]} {_why_failed(done)}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _why_failed(done: subprocess.CompletedProcess) -> str:
    """What ended a compiler, in words."""
    if done.returncode < 0:
        return f"was killed by {signal.Signals(-done.returncode).name}: is there enough memory?"
    for line in done.stderr.splitlines():
        if "No space left on device" in line or "quota exceeded" in line:
            return f"found the disk full: {line.strip()}"
        # Of a program that it runs: "Killed signal terminated program cc1plus", "ld terminated with signal 9 [Killed]",
        # "unable to execute command: Killed".
        if ("signal" in line and "terminated" in line) or "unable to execute command" in line:
            return f"broke off: {line.strip()}: is there enough memory?"
    told = done.stderr[-2000:]
    return f"failed with exit status {done.returncode}; set CXX to one that knows C++20\n{told}".rstrip()


def _cache_folder() -> Path | None:
    """
    The user's own folder for compiled programs, or None where there is none, or none that programs can be loaded from.

    Raises:
        ProgramError: another user could write into it.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vanilla_transformer"
        with suppress(OSError):  # read-only, which does if it is there
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid == os.getuid():
                folder.chmod(0o700)
        if not folder.is_dir() or _is_noexec(folder):
            return None
    except (OSError, RuntimeError):  # in a folder that is closed to this user, or a user without a home
        return None
    _refuse_foreign(folder)
    return folder


def _is_noexec(path: Path) -> bool:
    """Whether its file system is mounted so that no program can be loaded from it."""
    return bool(os.statvfs(path).f_flag & getattr(os, "ST_NOEXEC", 0))


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
        why = f"{file.parent} is on a file system mounted noexec, set TMPDIR to another" if _is_noexec(file) else error
        raise ProgramError(f"the compiled program cannot be loaded: {why}") from error
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
            raise ProgramError(f"the compiled program lays out its data as {theirs}, Python as {ours}: install it anew")
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
            _future = _start()
        return _future


def _start() -> Future:
    """Loads a program that is there at once, and compiles one that is not in a thread."""
    future: Future = Future()

    def compile_it(program: _Program) -> None:
        try:
            future.set_result(program.compiled())
        except BaseException as error:
            future.set_exception(error)

    try:
        program = _Program()
        if library := program.cached():
            future.set_result(library)
        else:
            threading.Thread(target=compile_it, args=(program,), name="compiling").start()
    except ProgramError as error:
        future.set_exception(error)
    return future


def forget() -> None:
    """The next call looks anew: after a fork, for the thread that compiles is not in the child, and in tests."""
    global _future, _lock
    _future, _lock = None, threading.Lock()


if os.name == "posix":
    os.register_at_fork(after_in_child=forget)
